"""What the router would do."""

from tests.shop import BANKING, SQL


def test_a_route_says_the_mix_that_auto_would_answer_with(front):
    for text, name in ((BANKING, "banking"), (SQL, "sql")):
        got = front.post("/v1/route", text=text).json()
        assert got["mix"] == front.chat(text, model="auto").json()["model"] == name
        assert got["weights"] == {name: 1}
        assert got["scores"].keys() == {"banking", "sql"}
        assert 0 <= got["none"] <= 1
        assert got["reasons"]
        turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]
        assert front.post("/v1/route", messages=turns).json()["mix"] == name

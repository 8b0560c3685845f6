from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loramix.cli import main
from loramix.folders import POCKET_LIBRARY
from loramix.formats import peft
from loramix.library import Library
from tests.shop import BANKING, SQL
from tests.tiny import random_adapter, tiny_base

SHORT = ["--max-tokens", "6", "--temperature", "0"]


@pytest.fixture
def loramix(capsys, monkeypatch, tmp_path):
    """Run a command line in this process; give back its stdout."""
    monkeypatch.setenv("LORAMIX_LIBRARY", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str, stdin: str = "", status: int = 0) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        found = main(words)
        out, err = capsys.readouterr()
        assert found == status, err
        call.err = err
        return out

    return call


def test_ask_prints_the_answer_and_nothing_else(loramix, shop):
    text = loramix("ask", SQL, *shop.flags, *SHORT)
    assert loramix.err == ""
    reply = json.loads(loramix("ask", SQL, *shop.flags, *SHORT, "--json"))
    assert text == reply["text"] + "\n"


def test_ask_json_is_one_object_with_these_keys(loramix, shop):
    out = loramix("ask", BANKING, *shop.flags, *SHORT, "--json")
    reply = json.loads(out)
    assert out.count("\n") == 1
    assert [*reply] == ["text", "mix", "scores", "none", "reasons", "usage", "ms"]
    assert reply["mix"].startswith("banking")
    assert set(reply["scores"]) == {"banking", "sql"}
    assert sum(reply["scores"].values()) + reply["none"] == pytest.approx(1, abs=0.01)
    assert set(reply["usage"]) == {"prompt_tokens", "completion_tokens"}
    assert reply["usage"]["completion_tokens"] <= 6


def test_the_mix_is_what_was_asked_for(loramix, shop):
    for mix in ("base", "sql", "banking:-0.5+sql:1.25"):
        reply = json.loads(loramix("ask", BANKING, *shop.flags, *SHORT, "--json", "-m", mix))
        assert (reply["mix"], reply["scores"], reply["none"]) == (mix, {}, None)


def test_a_file_is_answered_line_by_line_in_one_batch(loramix, shop):
    Path("queries.txt").write_text(f"{BANKING}\n\n{SQL}\n", "utf-8")
    lines = loramix("ask", "--file", "queries.txt", *shop.flags, *SHORT, "--json").splitlines()
    mixes = [json.loads(line)["mix"] for line in lines]
    assert [mix.partition(":")[0].partition("+")[0] for mix in mixes] == ["banking", "sql"]
    assert len(loramix("ask", "--file", "queries.txt", *shop.flags, *SHORT).splitlines()) >= 2


def test_text_comes_from_stdin(loramix, shop):
    piped = loramix("ask", "-", *shop.flags, *SHORT, stdin=SQL)
    assert piped == loramix("ask", SQL, *shop.flags, *SHORT)


def test_a_seed_repeats_a_sampled_answer(loramix, shop):
    sampled = ["ask", SQL, *shop.flags, "--max-tokens", "12", "--temperature", "2"]
    assert loramix(*sampled, "--seed", "7") == loramix(*sampled, "--seed", "7")
    assert len({loramix(*sampled, "--seed", str(seed)) for seed in range(4)}) > 1


def test_route_says_which_mix_and_why(loramix, shop):
    decision = json.loads(loramix("route", SQL, *shop.flags, "--json"))
    assert [*decision] == ["mix", "scores", "none", "coldness", "reasons", "ms"]
    assert decision["mix"].startswith("sql")
    words = loramix("route", SQL, *shop.flags)
    assert words.splitlines()[0] == decision["mix"]
    assert "(none)" in words


def test_chat_keeps_the_history_while_the_mix_changes(loramix, shop):
    lines = [BANKING, "/mix sql:0.5", SQL, "/mix nobody", "/oops", "/save talk.json", "/quit", "no"]
    out = loramix("chat", *shop.flags, *SHORT, "--json", stdin="\n".join(lines))
    first, second = map(json.loads, out.splitlines())
    assert first["mix"].startswith("banking")
    assert second["mix"] == "sql:0.5"
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    saved = json.loads(Path("talk.json").read_text("utf-8"))["messages"]
    assert [turn["content"] for turn in saved] == [BANKING, first["text"], SQL, second["text"]]
    assert saved[3]["mix"] == "sql:0.5"
    assert "No adapter 'nobody'" in loramix.err
    assert "'/oops'" in loramix.err


def test_chat_commands(loramix, shop):
    lines = ["/help", "/adapters", "/mix base", BANKING, "/reset", "/auto", BANKING]
    out = loramix("chat", *shop.flags, *SHORT, "--json", stdin="\n".join(lines))
    bare, routed = map(json.loads, out.splitlines())
    assert (bare["mix"], routed["mix"].partition(":")[0]) == ("base", "banking")
    assert bare["usage"]["prompt_tokens"] == routed["usage"]["prompt_tokens"]  # /reset forgot it
    assert "/save FILE" in loramix.err
    assert "sql" in loramix.err


def test_chat_never_overwrites_a_file(loramix, shop):
    Path("mine.txt").write_text("keep", "utf-8")
    loramix("chat", *shop.flags, stdin="/save mine.txt")
    assert Path("mine.txt").read_text("utf-8") == "keep"
    assert "exists already" in loramix.err


@pytest.fixture(scope="module")
def poem(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter's folder, as another program would leave it."""
    folder = tmp_path_factory.mktemp("made") / "Poem v2"
    peft.write(random_adapter(tiny_base(seed=1).model, "poem", seed=5), folder)
    return str(folder)


def test_an_adapter_is_added_listed_shown_and_removed(loramix, poem):
    loramix("adapters", "add", poem)
    assert "Added poem-v2" in loramix.err
    assert Library("own").names() == ["poem-v2"]
    listed = [json.loads(line) for line in loramix("adapters", "list", "--json").splitlines()]
    assert "poem-v2" in [card["name"] for card in listed]
    assert "poem-v2" in loramix("adapters", "list")
    assert json.loads(loramix("adapters", "show", "poem-v2", "--json"))["name"] == "poem-v2"
    assert "poem-v2" in loramix("adapters", "show", "poem-v2")
    loramix("adapters", "remove", "poem-v2")
    assert Library("own").names() == []


def test_a_name_is_not_taken_twice_without_replace(loramix, poem):
    loramix("adapters", "add", poem, "--name", "poem")
    loramix("adapters", "add", poem, "--name", "poem", status=1)
    loramix("adapters", "add", poem, "--name", "poem", "--replace")


def test_check_proves_that_the_logits_change(loramix, shop):
    words = ("adapters", "check", "sql", *shop.flags)
    assert json.loads(loramix(*words, "--json"))
    assert loramix(*words)


def test_an_adapter_with_examples_is_routed_to_at_once(loramix, shop, poem):
    library = Path("copied")
    subprocess.run(["cp", "-r", shop.library, str(library)], check=True)
    where = ["--base", shop.base, "--library", str(library)]
    lines = [f"write a {kind} about {what}" for kind in ("poem", "verse", "rhyme", "sonnet", "song")
             for what in ("love", "rain", "the sea", "my dog", "autumn", "the moon")]  # fmt: skip
    Path("poems.txt").write_text("\n".join(lines), "utf-8")
    loramix("adapters", "add", poem, "--name", "poem", "--library", str(library),
            "--examples", "poems.txt")  # fmt: skip
    route = lambda text: json.loads(loramix("route", text, *where, "--json"))["mix"]  # noqa: E731
    assert route("write a verse about the sea").startswith("poem")
    assert route(SQL).startswith("sql")
    loramix("adapters", "remove", "poem", "--library", str(library))
    assert "poem" not in route("write a verse about the sea")


def test_a_router_is_fitted_from_examples(loramix, shop):
    library = Path("copied")
    subprocess.run(["cp", "-r", shop.library, str(library)], check=True)
    subprocess.run(["rm", "-r", str(library / "_router")], check=True)
    where = ["--base", shop.base, "--library", str(library)]
    loramix("ask", SQL, *where, status=1)
    assert "route fit" in loramix.err
    fit = ["route", "fit", "--library", str(library), "--encoder", "ngrams"]
    loramix(*fit, labelled({"text": "hi", "route": "nobody"}), status=1)
    assert "No adapter 'nobody'" in loramix.err
    loramix(*fit, labelled(*[{"text": f"list {what}", "route": "sql"} for what in "abcdefghijkl"]))
    assert "banking has no examples: it is known by its card." in loramix.err
    decision = json.loads(loramix("route", "i mean banking", *where, "--json"))
    assert (decision["mix"], decision["coldness"]) == ("banking", 1)
    loramix(*fit)
    assert json.loads(loramix("route", "i mean sql", *where, "--json"))["mix"] == "sql"


def test_version_and_bare_words(loramix):
    assert loramix("--version").startswith("loramix ")
    assert "Usage: loramix" in loramix()
    loramix("frobnicate", status=2)
    loramix("ask", "hi", "--no-such-flag", status=2)


def test_a_real_process_keeps_stdout_clean_and_ends_well(shop):
    words = [sys.executable, "-m", "loramix", "ask", SQL, *shop.flags, *SHORT, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, "")
    json.loads(done.stdout)


def labelled(*rows: dict[str, object]) -> str:
    Path("labelled.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return "labelled.jsonl"


def test_a_router_is_evaluated_on_labelled_rows(loramix, shop):
    turns = [
        {"role": "user", "content": SQL},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": BANKING},
    ]
    data = labelled(
        {"text": BANKING, "route": "banking"},
        {"text": SQL, "routes": ["sql"]},
        {"messages": turns, "route": "banking"},
        {"text": "hello", "route": None},
    )
    out = json.loads(loramix("route", "eval", data, *shop.flags, "--json"))
    assert out["in_scope"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    assert out["none_recall"]["n"] == 1
    assert "first choice" in loramix("route", "eval", data, *shop.flags, "--html", "page.html")
    assert "<svg" in Path("page.html").read_text("utf-8")
    router = f"{shop.library}/_router"
    both = json.loads(
        loramix("route", "eval", data, "--router", router, "--compare", router, "--json")
    )
    assert both["gain"]["value"] == 0
    words = ("--router", "nearest", "--compare", "fixed:sql", *shop.flags)
    out = json.loads(loramix("route", "eval", data, *words, "--json"))
    assert (out["compare"]["accuracy"]["value"], out["gain"]["n"]) == (0.25, 4)
    assert out["gain"]["value"] == out["accuracy"]["value"] - 0.25
    assert "fixed:sql on the same rows" in loramix("route", "eval", data, *words)
    assert "spectral on" in loramix("route", "eval", data, "--compare", "spectral", *shop.flags)
    loramix("route", "eval", data, "--router", "nobody", *shop.flags, status=1)
    assert "No router is called 'nobody'" in loramix.err


def test_an_evaluation_fails_below_the_least_accuracy(loramix, shop):
    data = labelled({"text": BANKING, "route": "sql"}, {"text": SQL, "route": "sql"})
    loramix("route", "eval", data, *shop.flags, "--min-accuracy", "0.5")
    loramix("route", "eval", data, *shop.flags, "--min-accuracy", "0.6", status=1)
    assert "less than 0.6" in loramix.err


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "route": "nobody"},
        {"text": "a", "messages": []},
        {"route": "sql"},
        {"text": 5, "route": "sql"},
        {"text": "a", "routes": [1]},
        {"text": "a", "adapter": "sql"},
        {"messages": [{"role": "king"}], "route": "sql"},
        {"text": " ", "route": "sql"},
    ],
)
def test_rows_that_cannot_be_evaluated_are_named(loramix, shop, row):
    loramix("route", "eval", labelled(row), *shop.flags, status=1)
    assert loramix.err.startswith("Error: ")


def test_a_text_that_is_a_commands_name_can_be_routed(loramix, shop):
    assert loramix("route", "text", "eval", *shop.flags)
    assert loramix("route", "--json", SQL, *shop.flags)
    loramix("route", status=1)
    assert "Expected a text" in loramix.err


def test_the_router_is_corrected_and_the_correction_undone(loramix, shop):
    shutil.copytree(shop.library, "library")
    where = ("--library", "library")
    assert loramix("route", BANKING, *where).splitlines()[0] == "banking"
    made = loramix("route", "feedback", "--query", BANKING, "--right", "none", *where)
    assert loramix("route", "feedback", *where) == made
    assert loramix("route", BANKING, *where).splitlines()[0] == "base"
    loramix("route", "feedback", "--undo", made.split()[0], *where)
    assert loramix("route", BANKING, *where).splitlines()[0] == "banking"
    assert json.loads(loramix("route", "feedback", *where, "--json")) == {"corrections": []}
    loramix("route", "feedback", "--query", BANKING, *where, status=1)
    assert "--right" in loramix.err
    assert "kept the gate" in loramix("route", "refit", *where)
    loramix("route", "feedback", "--query", BANKING, "--right", "sql", *where)
    assert "held-out score" in loramix("route", "refit", *where)


@pytest.mark.parametrize(
    "words", [("feedback", "--query", "hello", "--right", "none"), ("refit",)], ids=lambda w: w[0]
)
def test_the_packaged_router_stays_as_it_was_installed(loramix, words):
    loramix("route", *words, status=1)
    assert "part of the package and stays as it is" in loramix.err
    assert not (POCKET_LIBRARY / "_router.feedback.jsonl").exists()


def test_a_router_learns_who_answers_best(loramix, shop):
    labels = {"sql": "list", "banking": "my card"}
    rows = [
        {"text": f"{verb} {what}", "route": n} for n, verb in labels.items() for what in "abcdefgh"
    ]
    answered = [
        {"query": f"{verb} {what}", "answer": "yes", "adapter": name}
        for what in "ijkl"
        for name, verb in labels.items()
    ]
    Path("answered.jsonl").write_text("\n".join(map(json.dumps, answered)), "utf-8")
    words = ("--out", "r", "--measure", "answered.jsonl", "--encoder", "ngrams", *shop.flags)
    told = loramix("route", "fit", labelled(*rows), *words, "--targets", "targets.jsonl")
    assert "of 4 rows are answered best by it" in told
    assert told.count("nats an answer over the oracle") == 2
    targets = [json.loads(line) for line in Path("targets.jsonl").read_text("utf-8").splitlines()]
    assert [t["query"] for t in targets] == [row["query"] for row in answered]
    for target in targets:
        assert {*target["nats"]} == {"sql", "banking", "base"}
        assert max(target["target"], key=target["target"].get) == min(
            target["nats"], key=target["nats"].get
        )
    loramix("route", "fit", labelled(*rows), *words, "--targets", "targets.jsonl", status=1)
    strange = labelled(*rows, {"text": "a", "route": "nobody"})
    loramix("route", "fit", strange, *words, status=1)
    assert "No adapter 'nobody'" in loramix.err


def test_a_router_is_calibrated_by_rows_it_has_not_learned(loramix, shop):
    rows = [{"text": f"{verb} the cars", "route": "sql"} for verb in "abcdefghijklmnopqrstuvwx"]
    rows += [
        {"text": f"my {thing} was eaten", "route": "banking"} for thing in "abcdefghijklmnopqrst"
    ]
    rows += [{"text": f"sing of {what}", "route": None} for what in "abcdefghijkl"]
    words = ("route", "calibrate", labelled(*rows), "--library", shop.library, "--out", "new")
    told = loramix(*words, "--keep-of", "sql=0.5", "--threshold", "banking=-99")
    assert "100.0% of    20 stay  banking (threshold -99.00)" in told
    assert "of    12 of nobody go to the base" in told
    out = json.loads(loramix("route", "eval", "labelled.jsonl", "--router", "new", "--json"))
    assert out["routes"]["sql"]["recall"] < 0.8
    assert "100.0% of    12 of nobody" in loramix(*words, "--oos-recall", "0.9")
    for wrong in (
        ["--keep-of", "sql"],
        ["--keep", "0.9", "--oos-recall", "0.9"],
        ["--keep-of", "x=0.5"],
    ):
        loramix(*words, *wrong, status=1)


def test_a_router_is_fitted_from_labelled_rows_and_asked_what_it_lacks(loramix, shop):
    rows = [{"text": f"list {what}", "route": "sql"} for what in "abcdefghijkl"]
    rows += [{"text": f"my card {what}", "route": "banking"} for what in "abcdefghijkl"]
    rows += [{"text": "sing me a song", "route": None}]
    loramix("route", "fit", labelled(*rows), "--out", "fitted", "--encoder", "ngrams")
    out = json.loads(loramix("route", "eval", labelled(*rows[:24]), "--router", "fitted", "--json"))
    assert out["in_scope"]["value"] > 0.9
    assert "sql has 12 examples" in loramix("route", "suggest", "--router", "fitted")
    found = json.loads(loramix("route", "suggest", "--router", "fitted", "--json"))
    assert found["short"] == {"banking": 12, "sql": 12}
    both = labelled({"text": "a", "routes": ["sql", "banking"]})
    loramix("route", "fit", both, "--out", "other", status=1)
    Path("mine").mkdir()
    loramix("route", "fit", labelled(*rows), "--out", "mine", status=1)
    assert "no router" in loramix.err
    assert not [*Path("mine").iterdir()]

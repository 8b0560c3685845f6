"""Routers that learn nothing."""

import json
from pathlib import Path

import pytest

from loramix.chat import Message
from loramix.errors import RouteError
from loramix.mix import Mix
from loramix.route.fixed import FixedRouter, RulesRouter

RULES = """
rules:
  sql: [select, 'joins?', "group by"]
  banking: [card, '\\d+ ?(euros|dollars)']
"""


DOCS = Path(__file__).parents[2] / "docs" / "router.md"


def routed(router, text):
    return router.route([Message("user", "card"), Message("assistant", "?"), Message("user", text)])


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    return RulesRouter.load(path)


def test_the_rules_in_the_docs_are_rules(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(DOCS.read_text("utf-8").split("```yaml\n")[1].split("```")[0])
    documented = RulesRouter.load(path)
    assert routed(documented, "where is my refund?").mix == Mix.parse("support")
    assert routed(documented, "did 12 dollars arrive?").mix == Mix.parse("banking")


@pytest.mark.parametrize(
    ("text", "mix", "why"),
    [
        ("My CARD was stolen", "banking", "'CARD'"),
        ("send 20 Euros home", "banking", "'20 Euros'"),
        ("two joins for my card", "sql", "'joins'"),
        ("a discarded cardigan", "base", "no rule"),
        ("hello", "base", "no rule"),
    ],
)
def test_the_first_rule_that_a_query_meets(rules, text, mix, why):
    decision = routed(rules, text)
    assert decision.mix == Mix.parse(mix)
    assert why in decision.reasons[0]
    assert decision.none == float(mix == "base")
    assert rules.scores([text]) == [[decision.scores[name] for name in rules.adapters]]


def test_all_rules_share_the_query(tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"match": "all", "rules": {"sql": "join", "banking": ["card"]}}))
    router = RulesRouter.load(path)
    assert routed(router, "join the card table").mix == Mix({"banking": 0.5, "sql": 0.5})
    assert routed(router, "card").mix == Mix({"banking": 1.0})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("rules: [", "cannot be read"),
        ("- a", "expected a mapping"),
        ("rulez: {a: b}", "expected a mapping"),
        ("match: first", "expected rules"),
        ("rules: {}", "expected rules"),
        ("rules: {sql: []}", "needs a pattern"),
        ("rules: {sql: ['']}", "needs a pattern"),
        ("rules: {sql: [3]}", "needs a pattern"),
        ("rules: {sql: ['a)(b']}", "is wrong"),
        ("rules: {'a b+c': x}", "is wrong"),
        ("rules: {3: x}", "is wrong"),
        ("rules: {sql: x}\nmatch: some", "expected first or all"),
    ],
)
def test_wrong_rules_are_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "rules.yaml"
    path.write_text(content)
    with pytest.raises(RouteError, match=problem) as caught:
        RulesRouter.load(path)
    assert "\n" not in str(caught.value)


def test_no_rules_file(tmp_path):
    with pytest.raises(RouteError, match="cannot be read"):
        RulesRouter.load(tmp_path / "rules.yaml")


@pytest.mark.parametrize("text", ["base", "sql", "banking:0.5+sql:-0.25"])
def test_a_fixed_mix_answers_everything(text):
    router = FixedRouter(Mix.parse(text))
    decision = routed(router, "anything")
    assert decision.mix == Mix.parse(text)
    assert decision.none == float(text == "base")
    assert router.scores(["a", "b"]) == [[1.0] * len(router.adapters)] * 2


def test_a_conversation_needs_a_user(rules):
    for router in (rules, FixedRouter(Mix())):
        with pytest.raises(RouteError, match="No user message"):
            router.route([Message("system", "be brief")])

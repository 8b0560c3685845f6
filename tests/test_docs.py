"""What the documents show is run: commands, Python blocks, examples."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from docs.refresh import BLOCK, commands, refreshed
from loramix.cli import main
from loramix.folders import POCKET

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
BUILT = (POCKET / "queries.jsonl").is_file()
needs_pocket = pytest.mark.skipif(not BUILT, reason="pocket is not built")

COMMANDS = [(d.name, line) for d in DOCUMENTS for line in commands(d.read_text("utf-8"))]


@needs_pocket
@pytest.mark.parametrize(("document", "line"), COMMANDS, ids=str)
def test_a_command_in_a_document_runs(document, line, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert words[0] == "loramix", "show other programs in ```sh blocks"
    assert main(words[1:]) == 0
    assert capsys.readouterr().out


def python_blocks() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for n, block in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.S)):
            found.append((f"{document.name}-{n}", block))
    return [(name, block) for name, block in found if "import loramix" in block]


@needs_pocket
@pytest.mark.parametrize(("name", "code"), python_blocks())
def test_a_python_block_runs(name, code, capsys):
    exec(compile(code, name, "exec"), {})
    assert capsys.readouterr().out


@needs_pocket
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(script, capsys):
    assert len(script.read_text("utf-8").splitlines()) < 40
    runpy.run_path(str(script))
    assert capsys.readouterr().out


def test_the_loramix_commands_that_are_not_run_exist(capsys):
    shell = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S))
    for line in shell.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["loramix"]:
            verbs = words[1 : 3 if words[1] in {"adapters", "keys"} else 2]
            assert main([*verbs, "--help"]) == 0
            named = {word for word in words if word.startswith("--")}
            assert named <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        elif words:
            assert words[0] == "make"
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)


def test_ci_runs_the_tests_as_the_readme_does():
    assert "make test" in (ROOT / "README.md").read_text("utf-8")
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")


@needs_pocket
def test_the_files_that_documents_name_are_there():
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md"]:
        for name in re.findall(
            r"`((?:docs|tests|src|examples|recipes)/[\w./]+)`", document.read_text()
        ):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_outputs_are_replaced_and_the_rest_is_kept():
    document = "before\n```console\n$ one 1\nold\n$ two\n```\nafter\n"
    fresh = refreshed(document, lambda line: f"<{line}>\n")
    assert fresh == "before\n```console\n$ one 1\n<one 1>\n$ two\n<two>\n```\nafter\n"
    assert refreshed(fresh, lambda line: f"<{line}>\n") == fresh
    assert len(BLOCK.findall(fresh)) == 1

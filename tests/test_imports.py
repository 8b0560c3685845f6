"""Imports point down, and what needs no model does not load one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "sklearn", "numpy")


def test_imports_point_down():
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize(
    "code",
    [
        "import loramix",
        "import loramix; loramix.Mix.parse('a:0.5'), loramix.LoramixError",
        "from loramix.cli import main; main(['--help'])",
        "from loramix.cli import main; main(['--version'])",
        "from loramix.cli import main; main(['ask', '--help'])",
        "from loramix.cli import main; assert main(['adapters', 'list']) == 0",
        "from loramix.cli import main; assert main(['ask', 'hi', '--mix', 'a++b']) == 1",
        "from loramix.cli import main; assert main(['ask', 'hi', '-m', 'nobody']) == 1",
        "from loramix.cli import main; assert main(['ask', '']) == 1",
    ],
)
def test_torch_stays_unloaded(code, tmp_path):
    check = f"import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "LORAMIX_LIBRARY": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"

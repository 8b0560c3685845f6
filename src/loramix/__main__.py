"""`python -m loramix` is `loramix`."""

from loramix.cli import run

run()

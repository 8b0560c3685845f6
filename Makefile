# `make run` serves the model inside the package, asks it real queries, and stays up with the chat
# page; `make test` runs the tests; `make browser` those in a browser;
# `make check` is everything a change must pass. Each sets up .venv by itself, once.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes torch's download small.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test lint check clients browser readme clean

run: $(READY)
	@$(BIN)/loramix demo

test: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

clients: $(READY)
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --requirement tests/serve/clients.txt
	$(BIN)/pytest -m clients

browser: $(READY)
	$(BIN)/pytest -m browser

readme: $(READY)
	$(BIN)/python docs/refresh.py README.md

clean:
	rm -rf .venv .venv-clients .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("loramix needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

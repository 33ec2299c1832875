# Two commands do everything on a fresh clone: `make serve` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=

.PHONY: help serve test test-fast check format model clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

serve: .venv/installed  ## Serve the default model on http://127.0.0.1:8000 (ARGS="--port 9000" passes options)
	@exec $(BIN)/evermoe serve $(ARGS)

test: .venv/installed-dev  ## Run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: .venv/installed-dev  ## Run the tests that need no Ray cluster
	$(BIN)/python -m pytest -m "not ray" $(ARGS)

check: .venv/installed-dev  ## Lint, format check and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev  ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: .venv/installed  ## Train the default model again (about half an hour on two cores)
	$(BIN)/python -m deploy.model.train $(ARGS)

clean:  ## Remove the virtual environment and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	@touch $@

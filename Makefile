# make demo   the whole story on a laptop: learn, open up, report
# make test   lint, types, the import contract, then the tests
# Each sets itself up in .venv first. Another interpreter: make PYTHON=/path/to/python3.11

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format clean

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

venv: $(READY) ## set up .venv; runs again only when pyproject.toml or constraints.txt changed

# torch goes first, by its pin alone, so that no later choice of the resolver swaps the build that pip found.
# setuptools is pinned with it, so that building this package needs no second download.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here. Give one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt setuptools torch
	@$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(READY) ## learn a pineapple from four pictures, open it up, write a report
	@$(BIN)/atomtune demo

lint: $(READY) ## style, types and the import contract
	$(BIN)/ruff check --quiet --output-format concise .
	$(BIN)/ruff format --check --output-format concise .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

test: lint ## lint, then every test
	$(BIN)/python -m pytest

format: $(READY) ## rewrite the files in house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove caches and build products; .venv and runs stay
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Everything a contributor types. `make setup` is implied by the others and does nothing when it is up to date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
DOCS := $(VENV)/.docs-done
AGENT := src/tartarus/guest/bin/tartarus-guest
AGENT_SOURCES := $(wildcard src/tartarus/guest/agent/*.c src/tartarus/guest/agent/*.h src/tartarus/guest/agent/Makefile)
PYTEST_ARGS ?=
# Files of tests side by side; what is in one file stays together, and slow files begin first (tests/conftest.py).
PYTEST_WORKERS ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

.PHONY: help setup hello test lint format bench docs docs-serve clean agent

help:
	@echo "make hello   set up and run code in a sandbox, cold and warm"
	@echo "make test    the tests"
	@echo "make lint    ruff, mypy, import-linter, project checks"
	@echo "make bench   the figures, beside every peer that is installed"
	@echo "make docs    the documentation, into site/"
	@echo "make format  let ruff rewrite the code"
	@echo "make clean   remove what the others made"

setup: $(SETUP) $(AGENT)

$(SETUP): pyproject.toml hatch_build.py scripts/setup-venv.sh
	@scripts/setup-venv.sh $(VENV) dev
	@touch $@

# The editable install compiled the agent once; this follows changes of its sources.
agent: $(AGENT)
$(AGENT): $(AGENT_SOURCES) scripts/build_agent.py | $(SETUP)
	@$(BIN)/python scripts/build_agent.py $(abspath $@)

hello: setup
	@$(BIN)/python examples/hello.py

test: setup
	@$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/check_project.py

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@$(BIN)/tartarus bench --all $(BENCH_ARGS)

$(DOCS): pyproject.toml | $(SETUP)
	@scripts/setup-venv.sh $(VENV) docs
	@touch $@

docs: setup $(DOCS)
	@$(BIN)/python scripts/generate_docs.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "site/index.html"

docs-serve: setup $(DOCS)
	@$(BIN)/python scripts/generate_docs.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	@rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(AGENT)
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

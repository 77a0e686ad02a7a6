# `make help` lists the targets. Each one makes the virtual environment first if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that share the test files; each compiles on one core.
WORKERS ?= 2
# Newer than both files it depends on, or the environment is brought up to date.
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install lint ruff format-check types layers format test test-fast test-slow golden demo bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(STAMP) ## make the environment, or bring it up to date

$(STAMP): pyproject.toml constraints.txt
	@echo "== install into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,export,reports]'
	@touch $@

lint: ruff format-check types layers ## ruff check, ruff format --check, mypy, import-linter

ruff: $(STAMP) ## ruff check alone
	@echo "== ruff check"
	@$(BIN)/ruff check --quiet .

format-check: $(STAMP) ## ruff format --check alone
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check --quiet .

types: $(STAMP) ## mypy alone
	@echo "== mypy"
	@$(BIN)/mypy

layers: $(STAMP) ## who may import whom, alone
	@echo "== import-linter"
	@$(BIN)/lint-imports --no-logo --no-cache

format: $(STAMP) ## rewrite the files: ruff's safe fixes, then its format
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

test: lint ## lint, then the default tests and doctests with coverage
	@echo "== pytest"
	@$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term

test-fast: $(STAMP) ## the tests that compile no model, in about a minute
	@echo "== pytest, without tests/compile"
	@$(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests --ignore tests/compile

test-slow: $(STAMP) ## the tests marked slow
	@echo "== pytest -m slow"
	@$(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m slow

golden: $(STAMP) ## write the golden files anew: read the diff before you commit it
	@echo "== pytest -k golden, accepting"
	@EXPECTTEST_ACCEPT=1 $(BIN)/pytest -q tests -k golden

demo: $(STAMP) ## one recogniser and four cameras, then a network that grows while it trains
	@$(BIN)/python examples/four_cameras.py
	@$(BIN)/python examples/grow_digits.py

bench: $(STAMP) ## what seeds cost on this CPU, beside what is kept in benchmarks/cpu.json
	@$(BIN)/python benchmarks/overhead.py --device cpu --seeds 1024 --against benchmarks/cpu.json

clean: ## remove caches and build outputs, keep the environment
	rm -rf build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kasmina_fx passes tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

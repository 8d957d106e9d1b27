# `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Nothing here asks a hub or a server.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-cluster lint format reproduce report methods docs bench clean distclean

help: ## this list
	@echo "Targets (they set up $(VENV) first where it is missing):"
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  %-10s %s\n", $$1, $$2}'

setup: $(VENV)/installed ## create the environment (.venv) with the tested versions

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version), and Python 3.11 to 3.13 is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@echo "setting up $(VENV), once: a minute or more"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed ## Table 2 of the paper at scale mini, one seed, offline: minutes
	@$(BIN)/python scripts/sweep.py table=2 scale=mini seeds=1 out=results/demo
	@$(BIN)/python scripts/report.py out=results/demo

test: $(VENV)/installed ## all tests but those that start a cluster
	@$(BIN)/pytest -n 2 --dist worksteal -m 'not cluster'

test-cluster: $(VENV)/installed ## the tests on a Slurm of two nodes, which they start here (as root)
	@$(BIN)/pytest -m cluster tests/slurm

test-fast: $(VENV)/installed ## the tests without whole runs: under two minutes
	@$(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not gpu'

lint: $(VENV)/installed ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/installed ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Where `make reproduce` puts what it makes; QUICK=1: the paper's tables alone, one seed, and the recipes' rates.
OUT ?= results
TABLE := $(if $(QUICK),paper,all)
SEEDS := $(if $(QUICK),1,3)
SEARCH := $(if $(QUICK),false,true)
reproduce: $(VENV)/installed ## every table and figure at scale mini: rate search, three seeds (hours); QUICK=1: the recipes, one seed
	@$(BIN)/python scripts/sweep.py table=$(TABLE) scale=mini seeds=$(SEEDS) search=$(SEARCH) out=$(OUT)
	@$(BIN)/python scripts/spectrum.py table=figure5 scale=mini out=$(OUT)
	@$(BIN)/python scripts/report.py out=$(OUT)

report: $(VENV)/installed ## tables, figures, verdicts and report from the records in results/, and README's part of them
	@$(BIN)/python scripts/report.py readme=README.md

methods: $(VENV)/installed ## all methods with their parameters on LLaMA-2 7B (results/methods.csv)
	@$(BIN)/python scripts/methods.py

docs: $(VENV)/installed ## docs/: what each benchmark asks, and the JSON Schema of a record
	@$(BIN)/python scripts/docs.py

bench: $(VENV)/installed ## speed and memory beside PEFT's methods, and of the suite: benchmarks/results/ (QUICK=1: five minutes)
	@for part in layer step generate suite growth; do $(BIN)/python benchmarks/$$part.py $(if $(QUICK),--quick) || exit 1; done

clean: ## remove working files and the demo's output; records, tables and the environment stay
	rm -rf results/demo results/data results/work .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environment
	rm -rf $(VENV) src/*.egg-info

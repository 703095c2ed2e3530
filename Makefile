# The recipes that people and the continuous integration both run. Needs: python3 with venv, make.
# A newer Python: make PYTHON=python3.13 demo

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

BENCH  ?= all
# Two for each core would fill a small machine's memory; one leaves cores idle while tests wait.
TEST_PROCESSES ?= 3

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo finetune-demo test check fmt bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/  make \1\t/p' $(MAKEFILE_LIST)

# Stamps: what a user needs, what fine-tuning needs beside it, what the tests need. Each is made
# once, and made again when a dependency, a pin or a kernel changes.
RUN_STAMP  := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
FINETUNE_STAMP := $(VENV)/.installed-finetune
BENCH_STAMP := $(VENV)/.installed-bench

venv: $(RUN_STAMP)  ## make .venv and install Comboio into it

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Comboio needs Python 3.11 or later; $$($(PYTHON) --version) is what" \
	    "'$(PYTHON)' starts. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu:" \
	    "sudo apt install python3-venv" >&2; exit 1; }

$(RUN_STAMP): pyproject.toml constraints.txt $(wildcard engine/kernels/*.[ch]) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(TEST_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

$(FINETUNE_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[finetune]'
	@touch $@

$(BENCH_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(RUN_STAMP)  ## two workers on this machine write text with the demo model
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh

finetune-demo: $(FINETUNE_STAMP)  ## fine-tune the demo model, and show that its text changed
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/finetune_demo.sh

test: $(TEST_STAMP)  ## the whole test suite (PYTEST_ARGS="-k name" for a part)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(PYTEST_ARGS)

check: $(TEST_STAMP)  ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases bench

fmt: $(TEST_STAMP)  ## put the code into the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BENCH_STAMP)  ## measure this machine (BENCH_ARGS=--quick; BENCH=hop for one of bench/*.py)
	@$(BIN)/python bench/$(BENCH).py $(BENCH_ARGS)

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

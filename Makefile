# Every target sets itself up: `make demo` on a fresh clone is enough (Python 3.11+ with pip, nothing else).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread count for every figure and test, and no bytecode ban: without a bytecode cache Ray starts three times slower.
unexport PYTHONDONTWRITEBYTECODE
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help setup demo test check fix bench chaos soak constraints clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

setup: $(STAMP)  ## .venv with everything pinned by constraints.txt (the other targets do this by themselves)

$(STAMP): pyproject.toml constraints.txt hatch_build.py brainenc/guard/_glances.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## the whole path on a small subject, under two minutes on two cores
	$(BIN)/brainenc demo $(if $(OUT),--out $(OUT))

test: $(STAMP)  ## every test that needs no fault on purpose, under eight minutes on two cores
	$(BIN)/python -m pytest -m "not chaos and not soak"

check: $(STAMP)  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fix: $(STAMP)  ## format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## speed and memory as ratios of one run; writes BENCHMARKS.md
	$(BIN)/python -m benchmarks

chaos: $(STAMP)  ## faults on purpose: kills, full disks, memory limits, power cuts; under 40 minutes
	$(BIN)/python -m pytest -m chaos

soak: $(STAMP)  ## the long repetitions of the same
	$(BIN)/python -m pytest -m soak

constraints: $(STAMP)  ## resolve the pins again from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	  --no-header --no-annotate --quiet --output-file constraints.txt

clean:  ## remove what was built, never data
	rm -rf $(VENV) build dist brainenc/guard/_glances*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

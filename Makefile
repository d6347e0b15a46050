# Two commands do everything on a fresh machine that has Python 3.11 or 3.12 and pip:
#   make audit   installs Sonde and audits the bundled model; prints where the report is
#   make test    installs what developers need, then runs lint, types, documentation and tests
# PYTHON chooses the interpreter, MODEL and ARGS what is audited: make audit MODEL=path/to/model ARGS="--text book.txt"

PYTHON ?= python3
VENV ?= .venv
MODEL ?= organism:pebble
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help audit test lint types unit docs docs-serve clean

help:
	@sed -n 's/^#   //p' Makefile

# torch first: its version decides which of the other wheels fit
$(STAMP)-core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sonde needs Python 3.11 or later; choose one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(STAMP)-dev: $(STAMP)-core
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

audit: $(STAMP)-core
	$(BIN)/sonde audit $(MODEL) $(ARGS)

test: lint types docs unit

lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# one thread to a worker: two workers on two cores, and the same numbers however many workers there are; one hash seed,
# because workers must collect the same tests in the same order
unit: $(STAMP)-dev
	OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations 15

docs: $(STAMP)-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(STAMP)-dev
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .hypothesis

# Two commands do everything: `make ask` and `make test`.
# PIP_ARGS adds what your network needs (a mirror, another index with CPU builds of torch, ...).
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
QUESTION ?= What is the capital of France?
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)
# Tests run side by side: one thread each, two 2-thread processes on two cores ruin each other.
WORKERS ?= auto

.PHONY: ask test test-all lint format bench clean
.DEFAULT_GOAL := ask

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One torch only: it is installed first, by the pinned number, so that nothing later pulls another build.
.venv/.ask: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable ".[lm]"
	@touch $@

.venv/.dev: .venv/.ask
	$(PIP) --editable ".[all,dev]"
	@touch $@

ask: .venv/.ask
	@$(BIN)/selfdoubt demo
	@echo
	@echo 'Ask your own:  .venv/bin/selfdoubt ask "What is the capital of Japan?"'

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.quality

clean:
	rm -rf .venv

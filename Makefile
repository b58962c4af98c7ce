# Two commands do everything: `make ask` and `make test`.
# PIP_ARGS adds what your network needs (a mirror, another index with CPU builds of torch, ...).
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
# A famous fact, a town it has rarely read about, and a place that does not exist.
QUESTIONS ?= "What is the capital of France?" "In which country is Tartu?" "In which country is Zorbelheim?"
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)
# Tests run side by side: one thread each, two 2-thread processes on two cores ruin each other.
WORKERS ?= auto

.PHONY: ask test test-all coverage build docs lint format bench clean
.DEFAULT_GOAL := ask

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One torch only: it is installed first, by the pinned number, so that nothing later pulls another build. Without a GPU
# the CPU build is asked for; an index that has none gives its usual one.
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
.venv/.ask: pyproject.toml constraints.txt | $(BIN)/python
	@command -v nvidia-smi >/dev/null || $(PIP) "$(TORCH)+cpu" 2>/dev/null || echo "no CPU build of torch: taking the usual one"
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[lm]"
	@touch $@

.venv/.dev: .venv/.ask .venv/.oracles
	$(PIP) --editable ".[all,dev,docs]"
	@touch $@

# What tests compare with. It lies apart and comes without the versions it asks for: nothing else can see it or is
# changed by it. tests/oracles.py finds it.
.venv/.oracles: tests/oracles.txt | $(BIN)/python
	rm -rf .venv/oracles
	$(PIP) --no-deps --target .venv/oracles --requirement tests/oracles.txt
	@touch $@

ask: .venv/.ask
	@$(BIN)/selfdoubt ask $(QUESTIONS)
	@echo
	@echo 'Ask your own:  .venv/bin/selfdoubt ask "What is the capital of Japan?"    (more: --help)'

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# The tests of `make test`, with the share of lines that they run and those that they do not. It takes about 1.6 times as long.
coverage: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" --cov

# A source distribution and a wheel, in dist/.
build: .venv/.dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The documentation, in site/: open site/index.html. `make test` builds it, too, and checks each link.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.quality

clean:
	rm -rf .venv

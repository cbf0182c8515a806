# make serve [MODEL=name] [PORT=8000]   bring up a server
# make test                             run every test
# make aot                              compile the kernels for every chip, none of them needed
# make pods                             compile large models for pods that `make aot` leaves out
# All make .venv first, on a machine that has Python 3.12 and nothing else.

PYTHON ?= python3
MODEL ?= smollm2-135m-instruct
PORT ?= 8000
BIN := .venv/bin

.PHONY: install serve test lint aot pods clean

install: .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "Python 3.12 or newer is needed: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ .venv/installed

.venv-aot/installed: pyproject.toml | .venv/bin/python
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,aot]'
	@touch $@

serve: install
	$(BIN)/fastserve serve $(MODEL) --port $(PORT)

test: .venv/installed-dev  # whose programs are compiled for longer than they run
	XLA_FLAGS=--xla_backend_optimization_level=0 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

aot: .venv-aot/installed  # apart: with these installed, jax looks for chips at every start
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -n 2 -o faulthandler_timeout=1800 \
		-m "aot and not pods" tests/aot tests/kernels tests/serve

pods: .venv-aot/installed
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -n 2 -m pods tests/aot

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-aot

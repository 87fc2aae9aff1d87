# `make` alone says what there is. Everything is installed into .venv and nowhere else.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# What is installed here is JAX for the CPU. On a machine with a GPU or TPU it would warn of that at
# every start; whoever installs jax[cuda] into .venv says so: make quickstart JAX_PLATFORMS=cuda
export JAX_PLATFORMS ?= cpu

.PHONY: help quickstart test test-all lint
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  install, write a small data set, train, evaluate and export a small model"
	@echo "make test        install what the tests need and pass the tests"
	@echo "make test-all    the same with the tests that take minutes"
	@echo "make lint        ruff: rules and format; the direction of imports"
	@echo "A Python of 3.11 or newer is needed; name one with PYTHON=python3.12."

quickstart: .venv/installed
	$(BIN)/python -m ov2_jax.quickstart

# A failure is shown when it happens; a test that hangs, or kills its process, ends them all.
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder --instafail \
  --timeout=1800 --timeout-method=thread --max-worker-restart=0

test: .venv/installed-test .venv-beam/installed
	$(PYTEST) -m "not long"
	$(BEAM)

test-all: .venv/installed-test .venv-beam/installed
	$(PYTEST)
	$(BEAM)

lint: .venv/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python docs/packages.py --check

# Apache Beam pins packages that training wants newer, so its test has an environment of its own.
BEAM := .venv-beam/bin/python -m pytest tests/data/prepare/test_prepare.py -k beam

.venv-beam/installed: pyproject.toml .venv/installed
	@echo "Installing Apache Beam into .venv-beam ..."
	@$(PYTHON) -m venv .venv-beam
	@.venv-beam/bin/python -m pip --disable-pip-version-check --quiet install --editable \
	  '.[prepare]' beartype jaxtyping psutil pytest
	@touch $@

# Stamps: a second call installs nothing, a changed pyproject.toml or a broken-off install does.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is no Python of 3.11 or newer; name one with PYTHON=python3.12."; exit 1; }
	@echo "Installing into .venv ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) install --editable .
	@touch $@

.venv/installed-test: .venv/installed
	@echo "Installing what the tests need ..."
	@$(PIP) install --editable '.[test]'
	@touch $@

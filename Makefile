# Every target makes what it needs: a machine with python3 (venv, pip) and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Checks run on the CPU and leave no cache files behind in the tree.
export JAX_PLATFORMS ?= cpu

.PHONY: help demo test test-slow test-oldest lint bench notebooks dist clean
.NOTPARALLEL:

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/demo.stamp ## Train a Flax CNN on real digits with momentum, race five rules, draw the curves
	$(BIN)/python -m momentum_optax.demo $(ARGS)

test: $(VENV)/test.stamp ## Run the fast tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(VENV)/test.stamp ## Run the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-oldest: ## Run the fast tests on the oldest supported versions
	$(MAKE) test VENV=.venv-oldest PIP_CONSTRAINT=tests/oldest.txt

lint: $(VENV)/lint.stamp ## Check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp ## Count what a compiled step costs; writes benchmarks/*.json
	$(BIN)/python benchmarks/step_cost.py $(ARGS)

notebooks: $(VENV)/notebooks.stamp ## Execute every notebook in a fresh kernel
	$(BIN)/python -m pytest -o addopts='' --nbmake --nbmake-timeout=300 notebooks $(ARGS)

dist: $(VENV)/test.stamp ## Build the wheel and the source archive
	$(BIN)/python -m build

clean: ## Remove the environments and what was built
	rm -rf $(VENV) .venv-oldest build dist *.egg-info

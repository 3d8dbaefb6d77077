# Every target makes what it needs: a machine with python3 (venv, pip) and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Half of the CPU time of the tests is XLA compiling, mostly programs that it compiled in the run before: all of them are kept
# in JAX's persistent cache, those too that take less than JAX's limits. What tests count is not changed by it: compilations
# are counted in the memory of `jit`, and programs from the cache have their text and their sizes; compilers for devices that
# are not here do without. Another folder: `make test JAX_COMPILATION_CACHE_DIR=FOLDER`; no cache:
# `JAX_ENABLE_COMPILATION_CACHE=false make test`; a cache that has grown: `make clean`.
JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
PYTEST := JAX_COMPILATION_CACHE_DIR='$(JAX_COMPILATION_CACHE_DIR)' JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 $(BIN)/python -m pytest -n 2 --dist loadgroup
# Checks run on the CPU and leave no cache files behind in the tree.
export JAX_PLATFORMS ?= cpu

.PHONY: help demo lm demo-distributed test test-slow test-oldest lint bench compiled-bytes real-models accelerator compilers golden notebooks docs dist clean
.NOTPARALLEL:

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/demo.stamp ## Train a Flax CNN on real digits with momentum, race five rules, draw the curves
	$(BIN)/python -m examples.demo $(ARGS)

lm: $(VENV)/demo.stamp ## Train a small language model: optimizer, rule, storage and more by ARGS, with checkpoints
	$(BIN)/python -m examples.lm $(ARGS)

demo-distributed: $(VENV)/demo.stamp ## Train it on four processes that meet rarely, count what they send, kill one and go on
	$(BIN)/python -m examples.demo_distributed $(ARGS)

test: $(VENV)/test.stamp ## Run the fast tests
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/test.stamp ## Run the tests that take minutes
	$(PYTEST) -m slow $(ARGS)

test-oldest: ## Run the fast tests on the oldest supported versions
	$(MAKE) test VENV=.venv-oldest PIP_CONSTRAINT=tests/oldest.txt

lint: $(VENV)/lint.stamp ## Check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp ## Measure cost, time and quality, reproduce known numbers (over an hour); writes benchmarks/*.json
	$(BIN)/python -m benchmarks.step_cost
	$(BIN)/python -m benchmarks.storage_quality --plot docs/figures/storage_quality.png
	$(BIN)/python -m benchmarks.step_time --trees '4000 x 4000' '4096 x 4096' transformer
	$(BIN)/python -m benchmarks.step_time --trees 'small leaves' --output benchmarks/step_time_small_leaves.json \
	  --optimizers optax.sgd 'optax.sgd again' optax.adamw 'mo.sgd, float32' 'mo.sgd, bfloat16' 'mo.sgd, int8'
	$(BIN)/python -m benchmarks.published_numbers
	$(BIN)/python -m benchmarks.outer_quality
	$(BIN)/python -m benchmarks.race --plot docs/figures/momentum.png
	$(BIN)/python -m benchmarks.suggested_settings
	$(BIN)/python -m benchmarks.yellowfin
	$(BIN)/python -m benchmarks.accumulation
	$(BIN)/python -m benchmarks.row_sparse
	$(BIN)/python -m benchmarks.weight_averages
	$(BIN)/python -m benchmarks.muon_collectives
	$(BIN)/python -m benchmarks.muon_compile
	$(BIN)/python -m benchmarks.muon_storages
	$(BIN)/python -m benchmarks.bfloat16_weights
	$(BIN)/python -m benchmarks.transfer --plot docs/figures/transfer.png
# These two go on where an earlier run was stopped; to measure anew, remove their files.
	$(BIN)/python -m benchmarks.transfer_lm --plot docs/figures/transfer_lm.png --write
	$(BIN)/python -m benchmarks.board --plot docs/figures/board.png --write

compiled-bytes: compilers ## Count the bytes of a compiled step for TPU and H200, neither of which need be here
	.venv-compilers/bin/python -m benchmarks.compiled_bytes $(ARGS)

real-models: compilers ## Trace, compile and count the steps of real models for the same
	.venv-compilers/bin/python -m benchmarks.real_models $(ARGS)

accelerator: $(VENV)/bench.stamp ## Time a step on the GPU or TPU that is here (6 minutes)
	$(BIN)/python -m benchmarks.accelerator $(ARGS)

# NVIDIA's compiler without the gigabytes that only a GPU needs, in a separate environment: JAX looks for a GPU there.
compilers:
	$(MAKE) .venv-compilers/compilers.stamp VENV=.venv-compilers
	version=$$(.venv-compilers/bin/python -c 'import jax; print(jax.__version__)') && \
	  .venv-compilers/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
	  jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12

# In a separate environment: PyTorch's package for Linux brings CUDA along.
golden: ## Record the trajectories of other libraries again, with the libraries themselves; ARGS=--check compares
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/python -m pip --disable-pip-version-check install --quiet -r tests/golden/requirements.txt
	PYTHONPATH=. .venv-golden/bin/python tests/golden/make_golden.py $(ARGS)

notebooks: $(VENV)/notebooks.stamp ## Execute every notebook in a fresh kernel
	$(BIN)/python -m pytest -o addopts='' --nbmake --nbmake-timeout=300 notebooks $(ARGS)

# The variable silences a notice of the theme about the next MkDocs; warnings of the build stay errors.
docs: $(VENV)/docs.stamp ## Build the documentation into site/, offline; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/test.stamp ## Build the wheel and the source archive
	$(BIN)/python -m build

clean: ## Remove the environments and what was built
	rm -rf .cache $(VENV) .venv-oldest .venv-compilers .venv-golden build dist site *.egg-info

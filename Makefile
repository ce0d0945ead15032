# make run     the quickstart: SFT, reward model and PPO of a real small chat model
# make test    the test suite
# make lint    ruff and mypy
# make bench   kernels, then generation against HF

VENV ?= .venv
BIN := $(VENV)/bin
export VENV

.PHONY: run test lint format bench clean

$(VENV)/.installed: setup.py constraints.txt .ci/venv
	.ci/venv

run: $(VENV)/.installed
	$(BIN)/dschat train --config recipes/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

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

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

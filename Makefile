# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow oldest lint gpu bench

demo: $(VENV)/installed
	$(BIN)/ssmscan train --config recipes/demo.yaml

test: $(VENV)/installed
	$(BIN)/pytest -n auto -m "not gpu and not slow"

# What takes too long for `make test`.
slow: $(VENV)/installed
	$(BIN)/pytest -n auto -m "slow and not gpu"

# On the oldest transformers and Triton that are supported, put beside the environment and not into it: the models, and
# the kernels as Triton compiles them.
oldest: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target .oldest transformers==5.17.0 triton==3.6.0 "numpy<2.4" "huggingface_hub<2" httpx httpcore certifi
	PYTHONPATH=.oldest $(BIN)/pytest -n auto -W "ignore:Conversion of an array:DeprecationWarning" -m "not gpu and not slow" tests/models tests/ops/test_architectures.py tests/benchmarks/test_sass.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a CUDA device: the same cases and every shipped kernel configuration there, in the current Python.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

bench: $(VENV)/installed
	$(BIN)/ssmscan bench linear_scan

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

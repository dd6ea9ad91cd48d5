# `make train` and `make test` do all set-up on a fresh machine with Python >= 3.11.
# TORCH_INDEX names another package index for torch, e.g. the CPU builds on PyTorch's own: make test TORCH_INDEX=URL

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= tiny
ARGS ?=
WORKERS ?= 2
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
INSTALLED := $(VENV)/.installed

.PHONY: train test lint proof bench gpu gpu-test install clean

train: install
	$(BIN)/adagrpo train $(RECIPE) $(ARGS)

# Two processes of one thread each: torch's threads would only take turns on two cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

proof: install
	$(BIN)/python -m pytest -q -m proof $(ARGS)

# Times the parts of an iteration on this machine (pytest-benchmark).
bench: install
	$(BIN)/python -m pytest -q bench --benchmark-enable --benchmark-only $(ARGS)

# Needs a CUDA device: kernels, forwards and iterations, each checked and timed, into bench/results/<device>/.
gpu: install
	$(BIN)/adagrpo bench gpu $(ARGS)

# Needs a CUDA device: the tests of the kernels on it, repetitions and graph replays.
gpu-test: install
	$(BIN)/python -m pytest -q -m gpu tests/gpu tests/kernels $(ARGS)

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adagrpo needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

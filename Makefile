PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install train test lint test-slow test-faults bench bench-full bench-checkpoints bench-search bench-family results parity lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED) ## make .venv with the locked versions of everything

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "purejaxppo needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# uv installs in a fifth of pip's time, but does not read pip's settings of a package index.
	@# Bytecode for all packages at once: importing JAX without it takes three seconds longer.
	$(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.lock \
		|| $(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

train: $(INSTALLED) ## train CartPole with 4 seeds; prints the result and where the curve is
	$(BIN)/purejaxppo train configs/cartpole.toml --num-seeds 4

lint: $(INSTALLED) ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

test: lint ## lint, types and tests
	$(BIN)/pytest -n auto --dist worksteal --durations=20

test-slow: $(INSTALLED) ## the tests that take minutes
	$(BIN)/pytest -n auto -m slow

test-faults: $(INSTALLED) ## kills, failing writes and power loss at every call (an hour)
	$(BIN)/pytest -n auto -m faults

bench: $(INSTALLED) ## how fast it trains beside its peers; writes the README's table (ten minutes)
	$(BIN)/python benchmarks/speed.py

bench-full: $(INSTALLED) ## the same with longer trainings, more seeds, and memory (two hours)
	$(BIN)/python benchmarks/speed.py --full

bench-checkpoints: $(INSTALLED) ## what checkpoints cost; writes the README's table (ten minutes)
	$(BIN)/python benchmarks/checkpoints.py

bench-search: $(INSTALLED) ## what each search strategy of a sweep finds; writes the README's table (ten minutes)
	$(BIN)/python benchmarks/search.py

bench-family: $(INSTALLED) ## all objectives on four environments, searched and compared (an hour)
	$(BIN)/python benchmarks/family.py

results: $(INSTALLED) ## train each config with 10 seeds; writes the README's table (half an hour)
	$(BIN)/python benchmarks/results.py

parity: ## write the numbers of PyTorch's autograd that the tests compare with
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/pip install --quiet torch==2.13.0 numpy
	.venv-torch/bin/python tests/parity/make_fixture.py

lock: $(INSTALLED) ## write requirements.lock anew from pyproject.toml
	$(BIN)/pip-compile --quiet --upgrade --extra dev --extra notebooks --extra tensorboard --extra optuna --extra ray \
		--strip-extras --no-emit-index-url --no-emit-find-links --no-header --output-file requirements.lock pyproject.toml

clean: ## remove the environments and caches, not the runs
	rm -rf $(VENV) .venv-torch .bench .pytest_cache .ruff_cache *.egg-info

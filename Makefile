PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install train test lint docs docs-serve test-slow test-faults bench bench-full bench-checkpoints bench-search bench-family bench-rlhf bench-over-optimization bench-worlds results results-worlds parity lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(INSTALLED) ## create .venv with the locked version of every package

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "purejaxppo needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# uv takes a fifth of pip's time, but does not read pip's package index settings.
	@# Compile bytecode for all packages: without it, the first import of JAX takes three seconds longer.
	$(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.lock \
		|| $(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

train: $(INSTALLED) ## train CartPole with 4 seeds; print the result and the path of the learning curve
	$(BIN)/purejaxppo train configs/cartpole.toml --num-seeds 4

lint: $(INSTALLED) ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

test: lint ## lint, types and tests
	$(BIN)/pytest -n auto --dist worksteal --durations=20

docs: $(INSTALLED) ## build the documentation site in site/; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(INSTALLED) ## show the documentation at http://localhost:8000, rebuilt on changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

test-slow: $(INSTALLED) ## tests that take minutes
	$(BIN)/pytest -n auto -m slow

test-faults: $(INSTALLED) ## tests of kills, failing writes and power loss at every system call (an hour)
	$(BIN)/pytest -n auto -m faults

bench: $(INSTALLED) ## compare training speed with other libraries; update the table (ten minutes)
	$(BIN)/python benchmarks/speed.py

bench-full: $(INSTALLED) ## the same with longer runs, more seeds, and memory (two hours)
	$(BIN)/python benchmarks/speed.py --full

bench-checkpoints: $(INSTALLED) ## measure the cost of checkpoints; update the table (ten minutes)
	$(BIN)/python benchmarks/checkpoints.py

bench-search: $(INSTALLED) ## compare search strategies of sweeps; update the table (ten minutes)
	$(BIN)/python benchmarks/search.py

bench-family: $(INSTALLED) ## tune and compare all objectives on four environments; update the table (an hour)
	$(BIN)/python benchmarks/family.py

bench-rlhf: $(INSTALLED) ## tune and compare the objectives for language models; update the tables (half an hour)
	$(BIN)/python benchmarks/rlhf.py

bench-over-optimization: $(INSTALLED) ## policies against a learned reward and the exact optimum; update the page (a quarter of an hour)
	$(BIN)/python benchmarks/over_optimization.py

bench-worlds: $(INSTALLED) ## compare the speed of suites' environments with their own auto-reset; update the table (ten minutes)
	$(BIN)/python benchmarks/worlds.py

results: $(INSTALLED) ## train each config with 10 seeds; update the table (half an hour)
	$(BIN)/python benchmarks/results.py

results-worlds: $(INSTALLED) ## train on environments of suites with 5 seeds; update the table (two hours)
	$(BIN)/python benchmarks/world_scores.py

parity: ## regenerate the PyTorch reference values for the tests
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/pip install --quiet torch==2.13.0 numpy
	.venv-torch/bin/python tests/parity/make_fixture.py

lock: $(INSTALLED) ## update requirements.lock from pyproject.toml
	$(BIN)/pip-compile --quiet --upgrade --extra dev --extra docs --extra notebooks --extra tensorboard --extra optuna --extra ray \
		--extra brax --extra craftax --extra jumanji --extra navix --extra pgx --extra xminigrid \
		--strip-extras --no-emit-index-url --no-emit-find-links --no-header --output-file requirements.lock pyproject.toml

clean: ## remove virtual environments and caches, but not runs
	rm -rf $(VENV) .venv-torch .bench .pytest_cache .ruff_cache *.egg-info

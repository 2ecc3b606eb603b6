# make train  installs what is needed into .venv, trains the steps on MNIST and compares them
# make test   the same for the tests; make test-all adds those that repeat, or need root
# make gpu    the tests for a machine with a GPU; with python3 as it is: torch, torchvision, pytest and tqdm
# make soak   interrupts training at 100 random moments and compares how it ends
# make mutants  takes each line of the scripts out, and sees whether a test turns red: hours, goes on where it was
# make bench  each step beside what it could be, in 20 minutes; make record  runs the commands of the pages
# make docs   fills the pages from scripts and records, draws their pictures, and makes docs/index.html
# What they install, they install once. DATA_DIR=<folder> uses MNIST from there, ARGS="…" adds flags.

PYTHON ?= python3
DATA_DIR ?= data
GPU_PRETEND ?= no
VENV := .venv/bin

.PHONY: train test test-all gpu soak mutants bench record docs lint clean

train: .venv/installed
	$(VENV)/python compare_steps.py --data-dir $(DATA_DIR) $(ARGS)

test: .venv/installed-dev
	$(VENV)/python -m pytest --data-dir=$(DATA_DIR) $(ARGS)

test-all: .venv/installed-dev
	$(VENV)/python -m pytest --all --data-dir=$(DATA_DIR) $(ARGS)

# Not from .venv: a GPU's machine comes with a torch that fits its driver. Without pytest-xdist, so no addopts.
gpu:
	GPU_PRETEND=$(GPU_PRETEND) $(PYTHON) -m pytest -o addopts= -ra --durations=0 --durations-min=1 --all $(ARGS) \
		tests/clusters/test_gpu.py

soak: .venv/installed-dev
	$(VENV)/python tests/harness/soak.py $(ARGS)

mutants: .venv/installed-dev
	$(VENV)/python tests/harness/mutants.py --data-dir $(DATA_DIR) $(ARGS)

bench: .venv/installed
	$(VENV)/python benchmarks/bench.py --data-dir $(DATA_DIR) $(ARGS)

record: .venv/installed-dev
	$(VENV)/python benchmarks/record.py --data-dir $(DATA_DIR) $(ARGS)

docs: .venv/installed-dev
	$(VENV)/python docs/generate/build.py

lint: .venv/installed-dev
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

clean:
	rm -rf .venv checkpoints .mutants comparison.json comparison.png .mypy_cache .pytest_cache .ruff_cache \
		tests/pages/browser/node_modules

# Touched last, so that an installation that was interrupted is done again.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(VENV)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

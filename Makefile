# make train: the default job. make test: lint, types and the suite. make check: lint, types and the tests that
# start no processes, in about a minute. All set up .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: train test check lint

train: $(READY)
	$(BIN)/python -m mm train configs/digits.yaml

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not dist and not e2e"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $(PYTHON). Try: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

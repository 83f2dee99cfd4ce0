# make train: the default job. make test: lint, types and the suite. make all: its slow tests too. make check: lint,
# types and the tests that start no processes, in about a minute. make docs: API pages in build/api. All set up .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
PACKAGES := parallel encoders llm mm

# Two at a time: one fills the cores while the other waits. A file stays in one process, with its fixtures.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: train test all check lint docs

train: $(READY)
	$(BIN)/python -m mm train configs/digits.yaml

test: lint
	$(PYTEST) -m "not slow"

all: lint $(VENV)/.ready-remote
	$(PYTEST)

check: lint
	$(PYTEST) -m "not dist and not e2e and not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every module by name: of a package pdoc shows what its __init__ names, and no more.
MODULES = $$(find $(PACKAGES) -name '*.py' ! -name __main__.py | sort | sed 's|/__init__.py||; s|[.]py$$||; s|/|.|g')

docs: $(VENV)/.ready-docs
	PYTHONWARNINGS=ignore $(BIN)/pdoc --docformat markdown --template-directory docs/api_theme \
	  --output-directory build/api $(MODULES)
	@echo "wrote build/api/index.html"

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

# The packages of the tests that start an S3 server; without them those are skipped.
$(VENV)/.ready-remote: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,remote-test]'
	touch $@

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $(PYTHON). Try: make PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

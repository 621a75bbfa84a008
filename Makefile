# The two commands of the README are `make demo` and `make test`; both need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_TRANSFORMERS := 5.16.0

.PHONY: demo test test-all test-oldest conformance docs lint format clean

demo: $(VENV)/.installed
	$(BIN)/pyramiddrop demo

test: $(VENV)/.tested lint
	$(BIN)/python -m pytest

test-all: $(VENV)/.tested lint test-oldest
	$(BIN)/python -m pytest -m "slow or not slow"

# The fast tests on the oldest Transformers that is supported, in an environment of its own.
test-oldest: $(OLDEST)/.tested
	$(OLDEST)/bin/python -m pytest

# Every check on every family, with a progress bar; writes docs/conformance.md.
conformance: $(VENV)/.tested
	PYTHONPATH=tests $(BIN)/python -m conformance

# The page that is generated from what the library knows of model families.
docs: $(VENV)/.tested
	$(BIN)/pyramiddrop families --markdown > docs/families.md

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.tested: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.installed

$(OLDEST)/.tested: pyproject.toml constraints.txt
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' transformers==$(OLDEST_TRANSFORMERS)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo build dist

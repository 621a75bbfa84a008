# The two commands of the README are `make demo` and `make test`; both need nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The Transformers of `make test`: named, so that a release breaks `make test-newest` alone.
TRANSFORMERS := 5.24.0
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
OLDEST := .venv-oldest
NEWEST := .venv-newest
LOWEST := .venv-lowest
MADE_OF := pyproject.toml constraints.txt Makefile

# Python compiles what is imported, and keeps it for the many processes that tests start; pip would compile all.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
# One process a core, each with one thread: tiny models gain nothing from several.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all test-oldest test-newest test-lowest conformance docs release-check lint format clean

demo: $(VENV)/.installed
	$(BIN)/pyramiddrop demo

test: $(VENV)/.tested lint
	$(BIN)/python $(PYTEST)

test-all: $(VENV)/.tested lint test-oldest test-newest test-lowest
	$(BIN)/python $(PYTEST) -m "slow or not slow"
	VENV=$(VENV) .ci/deepspeed

# The fast tests on the oldest Transformers that is supported, in an environment of its own.
test-oldest: $(OLDEST)/.tested
	$(OLDEST)/bin/python $(PYTEST)

# The fast tests on the newest Transformers that pip finds for this package, unless `make test` has that one.
test-newest: $(VENV)/.tested
	@newest=$$($(BIN)/python .ci/newest-transformers) && \
	if [ "$$newest" = "$(TRANSFORMERS)" ]; then \
	  echo "Transformers $$newest is the newest that pip finds: make test has run on it, and nothing is run again"; \
	else \
	  echo "Transformers $$newest is newer than $(TRANSFORMERS), the one of make test" && \
	  { test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST); } && \
	  $(NEWEST)/bin/python $(INSTALL) -e '.[test]' transformers==$$newest && \
	  $(NEWEST)/bin/python $(PYTEST); \
	fi

# The fast tests on exactly the lower bound of every dependency.
test-lowest: $(LOWEST)/.tested
	$(LOWEST)/bin/python $(PYTEST)

# Every check on every family, with a progress bar; writes docs/conformance.md.
conformance: $(VENV)/.tested
	PYTHONPATH=tests $(BIN)/python -m conformance

# The page that is generated from what the library knows of model families, then the whole site, into site/.
docs: $(VENV)/.documented
	$(BIN)/pyramiddrop families --markdown > docs/families.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site: site/index.html; mkdocs serve shows it while you write"

# Builds sdist and wheel, and tries both in clean environments.
release-check: $(VENV)/.tested
	$(BIN)/python $(INSTALL) build twine
	.ci/release-check $(abspath $(BIN)/python)

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: $(MADE_OF)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -e . transformers==$(TRANSFORMERS)
	touch $@

$(VENV)/.tested: $(MADE_OF)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -e '.[test]' transformers==$(TRANSFORMERS)
	touch $@ $(VENV)/.installed

$(VENV)/.documented: $(VENV)/.tested
	$(BIN)/python $(INSTALL) -e '.[docs]' transformers==$(TRANSFORMERS)
	touch $@

$(OLDEST)/.tested: $(MADE_OF)
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) -e '.[test]' transformers==$(OLDEST_TRANSFORMERS)
	touch $@

$(LOWEST)/.tested: $(MADE_OF) .ci/lower-bounds
	test -d $(LOWEST) || $(PYTHON) -m venv $(LOWEST)
	.ci/lower-bounds > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(LOWEST) demo build dist site

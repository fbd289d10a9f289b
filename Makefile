# Every target makes .venv and installs what it needs: Python >= 3.10 is all that has to
# be there. PYTHON=python3.12 chooses the interpreter, ARGS="..." goes to the program.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A worker for each core; each has its share of the files, and takes over what is left.
PYTEST = $(BIN)/pytest -n auto --dist worksteal
BUILD_DOCS = $(BIN)/sphinx-build -W --keep-going -qEa docs build/docs

.PHONY: help demo test test-fast docs bench clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/installed-examples  ## meta-train on characters, evaluate, draw
	$(BIN)/python examples/maml_omniglot.py $(ARGS)

test: $(VENV)/installed-test  ## lint, types, docs, every test and doctest
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BUILD_DOCS)
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed-test  ## the tests that take under a few seconds each
	$(PYTEST) -m "not slow" $(ARGS)

docs: $(VENV)/installed-docs  ## build/docs/index.html, a warning is an error
	$(BUILD_DOCS)

bench: $(VENV)/installed-benchmarks  ## the main benchmarks, on a CPU (an hour)
	for name in maml step unroll ensemble cold overhead; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## remove what make made: .venv, built docs, caches (not runs/)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras: installed once, and again when what it depends on changes.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# make demo            annotate, embed and generate real cells with the packaged model; writes demo/report.html
# make demo INPUT=x.h5ad   the same for your own cells
# make test            the test suite, warnings as errors, with coverage
# make lint            ruff, mypy, and the direction of imports
# make docs            the documentation pages, warnings as errors
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU is enough for everything here; set TORCH to another build to use a GPU.
TORCH ?= torch==2.13.0
INPUT ?=

.PHONY: install demo test lint docs clean
.DEFAULT_GOAL := demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "scmulan needs Python 3.11 or newer; set PYTHON=python3.11 (or later)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	@touch $@

demo: install
	$(BIN)/python tools/demo.py demo $(if $(INPUT),--input "$(INPUT)")

test: install
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: install
	$(BIN)/sphinx-build -W -q docs docs/_build

clean:
	rm -rf $(VENV) demo docs/_build

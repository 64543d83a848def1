# Everything runs in a virtual environment of its own: VENV=… to choose another place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?=
CHAOS ?= --kills 50
STUDY ?=
DOCS ?= build --strict

.PHONY: demo test test-all chaos study lint types docs wheel clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: a range alone may pull another build of several gigabytes.
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## fine-tune the shipped model three ways and print the ID/OOD table (DEMO='--backend zero3' …)
	$(BIN)/digrap-scale demo $(DEMO)

test: $(VENV)/installed  ## all tests but the slow ones
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(VENV)/installed  ## the slow ones, too
	$(BIN)/python -m pytest

chaos: $(VENV)/installed  ## a run that is killed fifty times equals one that is not, in every bit (CHAOS='--kills 10' …)
	$(BIN)/python -m tests.distributed.chaos $(CHAOS)

study: $(VENV)/installed  ## the robustness study; hours, kept from run to run (STUDY='pictograms lite0' …)
	PYTHON=$(abspath $(BIN))/python benchmarks/robustness/study $(STUDY)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

docs: $(VENV)/installed  ## the site, into build/site; a warning is an error (DOCS=serve shows it while you write)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(DOCS)

wheel: $(VENV)/installed  ## build the wheel and try it in a fresh environment, away from this folder
	.ci/wheel $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info runs/demo

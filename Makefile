PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
JOBS ?= 2

.PHONY: help demo test test-oldest lint unit gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.ready: pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c requirements/tested.txt torch 'setuptools>=77'
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c requirements/tested.txt -e '.[dev]'
	touch $@

$(OLDEST)/.ready: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c requirements/oldest.txt torch 'setuptools>=77'
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c requirements/oldest.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## run the main job on this machine
	$(VENV)/bin/python examples/demo.py

lint: $(VENV)/.ready  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

unit: $(VENV)/.ready  ## the tests that need no GPU
	$(VENV)/bin/python -m pytest -n $(JOBS)

test: lint unit test-oldest  ## everything: lint, types, tests, tests with the oldest transformers

test-oldest: $(OLDEST)/.ready  ## the tests with the oldest supported transformers
	$(OLDEST)/bin/python -m pytest -n $(JOBS) -m 'not gpu and not slow'

gpu:  ## the tests that need a CUDA device, with the Python at hand
	$(PYTHON) -m pytest -m gpu

clean:  ## remove environments and caches
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

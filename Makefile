# `make demo` and `make test` set up everything they need; `make help` lists the rest.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help install dev tools demo test test-full test-py312 test-natten lint format types \
	contract docs wheel bench clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An editable install in strict mode links the files that exist, so a new file needs another install.
EDITABLE := --config-settings editable_mode=strict -e
ROOMS := src/conceptax flax_models methods kernels converters

# A stamp's name carries a digest of what the installation depends on: pyproject.toml and the list
# of files (not their content, which the links follow).
DIGEST := $(shell { cat pyproject.toml; find $(ROOMS) -type f ! -name '*.pyc' | LC_ALL=C sort; } \
	| sha256sum | cut -c 1-16)
RUNTIME_STAMP := $(VENV)/stamps/runtime-$(DIGEST)
DEV_STAMP := $(VENV)/stamps/dev-$(DIGEST)
DOCS_STAMP := $(VENV)/stamps/docs-$(DIGEST)
PY312_STAMP := .venv312/stamps/dev-$(DIGEST)

# The reference that tests compare with. Pinned and installed first: an unpinned torch picks the
# newest build, which brings gigabytes of CUDA where a CPU build of this version is at hand.
TORCH := torch==2.13.0

# Lowering Triton kernels takes a part of jax for NVIDIA, not the CUDA libraries that it depends on,
# nor a GPU. $(call lowering,PYTHON) installs it; where there is none, the tests that lower skip.
define lowering
$(1) -m pip --disable-pip-version-check install -q --no-deps \
	"jax-cuda13-plugin==$$($(1) -c 'import jaxlib; print(jaxlib.__version__)')" || \
	echo "no jax-cuda13-plugin for this jax: tests that lower Triton kernels will skip"
endef

# NATTEN, whose Flex backend runs on a CPU; apart, so that other tests do not find it.
NATTEN := .cache/natten-0.21.7

# Test files go whole to a worker, so that fixtures that compile are shared; in the order of
# tests/conftest.py, the longest first (xdist's own order goes by the number of tests).
PYTEST := pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

help:
	@echo "make install     create $(VENV) and install conceptax"
	@echo "make demo        install, then erase a concept from the bundled model"
	@echo "make test        install what tests need, then run the fast tests"
	@echo "make test-full   all tests, full-size ones included"
	@echo "make test-py312  the tests that need no torch, on Python 3.12 and jax 0.11"
	@echo "make test-natten compare neighborhood attention with NATTEN, which this installs"
	@echo "make tools       all that tests and documentation need, installed"
	@echo "make docs        the documentation, into build/site"
	@echo "make lint | format | types | contract | wheel | bench | clean"

install: $(RUNTIME_STAMP)
dev: $(DEV_STAMP)
tools: $(DOCS_STAMP)

demo: install
	$(BIN)/conceptax demo

$(BIN)/python:
	@python=$$(.ci/find-python 3.11 3.12 3.13) || { \
		echo "conceptax needs Python 3.11 or newer with venv (Debian, Ubuntu: apt install python3-venv)." >&2; \
		echo "Found: $$(python3 --version 2>&1 || echo no python3)." >&2; \
		exit 1; }; \
	echo "creating $(VENV) with $$python"; \
	"$$python" -m venv $(VENV)

$(RUNTIME_STAMP): | $(BIN)/python
	$(PIP) install -q $(EDITABLE) '.[demo]'
	@mkdir -p $(@D) && touch $@

# torch has a CPU build for Python 3.11 here; elsewhere only a CPU build is taken, and without one
# the tests that compare with torch skip.
$(DEV_STAMP): | $(BIN)/python
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		set -x; $(PIP) install -q '$(TORCH)' && $(PIP) install -q $(EDITABLE) '.[torch,dev]'; \
	elif $(PIP) install -q '$(TORCH)+cpu' 2>/dev/null; then \
		set -x; $(PIP) install -q $(EDITABLE) '.[torch,dev]'; \
	else \
		echo "no CPU build of $(TORCH) for this Python: tests that compare with torch will skip"; \
		set -x; $(PIP) install -q $(EDITABLE) '.[dev]'; \
	fi
	@$(call lowering,$(BIN)/python)
	@mkdir -p $(@D) && touch $@ $(RUNTIME_STAMP)

test: $(DEV_STAMP)
	$(BIN)/$(PYTEST)

test-full: $(DEV_STAMP)
	$(BIN)/pytest -m 'slow or not slow'

$(PY312_STAMP):
	@python=$$(.ci/find-python 3.12) || { echo "no Python 3.12 with venv on this machine" >&2; exit 1; }; \
	[ -x .venv312/bin/python ] || "$$python" -m venv .venv312
	.venv312/bin/python -m pip install -q --disable-pip-version-check 'jax>=0.11,<0.12' $(EDITABLE) '.[dev]'
	@$(call lowering,.venv312/bin/python)
	@mkdir -p $(@D) && touch $@

# Also with NNX's tree mode, which a later flax may make the default: models must not rely on graphs.
# What nvcc makes of the sources does not depend on Python.  TESTS names files, for a shorter run.
TESTS :=
test-py312: $(PY312_STAMP)
	NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false .venv312/bin/$(PYTEST) -k 'not compiles_for_gpus' $(TESTS)

$(NATTEN): $(DEV_STAMP)
	$(PIP) install -q wheel packaging
	$(PIP) install -q --no-deps --no-build-isolation --upgrade --target $@ natten==0.21.7

test-natten: $(NATTEN)
	PYTHONPATH=$(NATTEN) $(BIN)/pytest tests/kernels/gna/test_natten.py

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

contract: $(DEV_STAMP)
	$(BIN)/lint-imports

# Strict: any warning is an error, such as a broken link, a page outside the navigation or an argument
# that a docstring names and its function lacks.  Not --quiet, which hides the warnings from --strict.
docs: $(DOCS_STAMP)
	@told=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict 2>&1) || \
		{ printf '%s\n' "$$told" | grep -v '^INFO'; exit 1; }

$(DOCS_STAMP): $(DEV_STAMP)
	$(PIP) install -q $(EDITABLE) '.[docs]'
	touch $@

# Builds the sdist and from it the wheel, and imports the wheel in another environment, from another
# directory; that environment sees the dependencies of $(VENV) behind its own packages.
wheel: $(DEV_STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	@set -e; there=$$(mktemp -d); trap 'rm -rf "$$there"' EXIT; here=$$PWD; \
	$(BIN)/python -m venv --without-pip "$$there/venv"; \
	$(PIP) --python "$$there/venv" install -q --no-deps dist/*.whl; \
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$site" > "$$("$$there/venv/bin/python" -c "$$site")/dependencies.pth"; \
	cd "$$there"; \
	venv/bin/python -W error::ImportWarning "$$here/.ci/check_wheel.py" "$$here"; \
	venv/bin/conceptax --help >/dev/null

bench: $(DEV_STAMP)
	@set -e; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:
	rm -rf build dist *.egg-info src/*.egg-info .cache .pytest_cache .ruff_cache .hypothesis

# `make` alone explains itself. Every target that needs the environment makes it first.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
# Written last, so that an interrupted installation is never taken for a complete one.
DEPENDENCIES := $(VENV)/.dependencies-installed
BUILD := $(VENV)/.package-built

# Everything the compiled module is made from: a change rebuilds it.
NATIVE_SOURCES := $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

# Ranks are processes: more than one thread in each would fight over the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help
help:
	@echo 'qtarget_megatron: supervised fine-tuning on Megatron-Core with designed target distributions'
	@echo
	@echo '  make demo        fine-tune a real pretrained model on real data with 6 ranks, then export it'
	@echo '  make test        run every test'
	@echo '  make test-unit   run those of tests/unit, which start no ranks'
	@echo '  make test-quick  run the tests that are not marked slow (about two minutes)'
	@echo '  make test-lowest, make test-newest'
	@echo '                   run tests/unit with the lowest and the newest versions, in environments of their own'
	@echo '  make bench       measure time and memory next to torch and Megatron (about 45 minutes, idle machine)'
	@echo '  make study       train and compare every objective on small models (about 2 hours, goes on where it ended)'
	@echo '  make study-quick the same with four of them on three kinds of data (about 10 minutes)'
	@echo '  make study-real  the same with a real model (about 90 minutes)'
	@echo '  make gpu         on a machine with a GPU: run what needs one, write benchmarks/GPU.md'
	@echo '  make docs        build the documentation into site/'
	@echo '  make lint        check style (ruff) and types (mypy)'
	@echo '  make format      apply the style'
	@echo '  make install     only make the environment in $(VENV) and build the package'
	@echo '  make clean       remove what these targets made here (not the demo cache in ~/.cache)'
	@echo
	@echo 'Each target installs what it needs first: Python 3.12, a C++ compiler and a package index'
	@echo 'must be there; a GPU need not. Options:'
	@echo '  PYTHON=/path/to/python3.12   the interpreter to use'
	@echo '  PYTEST_ARGS="-k trust -x"    more arguments for pytest'
	@echo '  DEMO_ARGS="--help"           arguments for the demo'
	@echo '  BENCH_ARGS="kernels --quick" what to measure (--help lists it; default: all)'
	@echo '  STUDY_ARGS="--help"          arguments for the studies'
	@echo '  GPU_ARGS="--only kernels"    which steps of make gpu (--help lists all options)'
	@echo 'By hand: $(PY) -m qtarget_megatron.finetune --help'

.PHONY: install
install: $(BUILD)

# A fresh environment each time the pins change: nothing stale stays behind. Bytecode is made once: where
# PYTHONDONTWRITEBYTECODE is set, every rank would compile Megatron again.
$(DEPENDENCIES): pyproject.toml constraints.txt tools/find_python.sh
	@rm -f $@ $(BUILD)
	@python=$$(bash tools/find_python.sh); \
	echo "Installing into $(VENV) with $$python ..."; \
	if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then \
	    uv=uv; \
	else \
	    uv=.venv-uv/bin/uv; \
	    "$$python" -m venv --clear .venv-uv; \
	    .venv-uv/bin/python -m pip install --quiet --constraint constraints.txt uv; \
	fi; \
	"$$uv" venv --quiet --clear --no-project --python "$$python" $(VENV); \
	"$$uv" pip install --quiet --compile-bytecode --python $(PY) --constraint constraints.txt \
	    --requirement pyproject.toml --extra demo --extra test --extra dev \
	    pybind11 setuptools wheel
	@touch $@

$(BUILD): $(DEPENDENCIES) $(NATIVE_SOURCES)
	@rm -f $@
	@command -v "$${CXX:-c++}" >/dev/null || \
	    { echo 'No C++ compiler was found: install g++ or clang (Debian, Ubuntu: apt-get install g++).' >&2; exit 1; }
	@echo 'Building the package ...'
	@$(PY) -m pip install --no-build-isolation --no-deps --verbose --editable . >$(VENV)/build.log 2>&1 || \
	    { tail -n 40 $(VENV)/build.log >&2; echo 'The build failed; all of it: $(VENV)/build.log' >&2; exit 1; }
	@touch $@

.PHONY: demo
demo: $(BUILD)
	@$(PY) -m examples.demo.run $(DEMO_ARGS)

# Two files at a time: each has launches of several ranks of its own. In the order of their names: those with few long
# tests come before those with many short ones, which end at about one time.
PYTEST = $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(BUILD)
	@$(PYTEST) $(PYTEST_ARGS)

.PHONY: test-unit
test-unit: $(BUILD)
	@$(PYTEST) tests/unit $(PYTEST_ARGS)

# In environments of their own, .venv-lowest and .venv-newest: what pyproject.toml allows at least, and what the index
# has newest.
LOWEST := torch==2.11.0 transformers==5.8.0 megatron-core==0.19.2
NEWEST := torch transformers megatron-core
NAMES := torch transformers megatron-core numpy datasets safetensors pybind11

.PHONY: test-lowest test-newest
test-lowest: VERSIONS := $(LOWEST)
test-newest: VERSIONS := $(NEWEST)
test-lowest test-newest: test-%: $(BUILD)
	@uv=$$(command -v uv || echo .venv-uv/bin/uv); \
	"$$uv" venv --quiet --clear --no-project --python $(PY) .venv-$*; \
	"$$uv" pip install --quiet --compile-bytecode --python .venv-$*/bin/python \
	    --requirement pyproject.toml --extra demo --extra test pybind11 setuptools wheel $(VERSIONS); \
	.venv-$*/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@.venv-$*/bin/python -c "from importlib.metadata import version; \
	    print(*(f'{name} {version(name)}' for name in '$(NAMES)'.split()), sep=', ')"
	@.venv-$*/bin/python -m pytest -n 2 --dist loadfile tests/unit $(PYTEST_ARGS)

.PHONY: test-quick
test-quick: $(BUILD)
	@$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

.PHONY: bench
bench: $(BUILD)
	@$(PY) tools/benchmark.py $(or $(BENCH_ARGS),all)

# Ended at any point, the same command goes on. A folder of results each: study-output, quick-output, real-output.
.PHONY: study study-quick study-real
study: STUDY := study
study-quick: STUDY := quick
study-real: STUDY := real
study study-quick study-real: $(BUILD)
	@$(PY) -m examples.study.run --study examples/study/$(STUDY).toml $(STUDY_ARGS)

# The variable: without the theme's advertisement of its successor.
.PHONY: docs
docs: $(BUILD)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The first hour on a GPU; on a machine without one it says so in a line.
.PHONY: gpu
gpu: $(BUILD)
	@$(PY) tools/gpu.py $(GPU_ARGS)

.PHONY: lint
lint: $(BUILD)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

.PHONY: format
format: $(BUILD)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: clean
clean:
	@rm -rf $(VENV) .venv-uv .venv-lowest .venv-newest build dist site *.egg-info qtarget_megatron/_C*.so demo-output .demo-output.* demo-output-failed.log \
	    study-output quick-output real-output \
	    .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

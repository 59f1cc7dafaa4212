# Targets for people; CMake (CMakePresets.json) and pyproject.toml do the work.
VENV ?= .venv
PRESET ?= release
ARGS ?=
# CUDA kernels take minutes to compile: by default where a card is. (CMake and pip by themselves
# build them wherever nvcc is.)
CUDA ?= $(if $(shell nvidia-smi -L 2> /dev/null),AUTO,OFF)

export PATH := $(abspath $(VENV))/bin:$(PATH)
BUILD := build/$(PRESET)
PACKAGE_SOURCES := pyproject.toml CMakeLists.txt \
  $(shell find cmake include src python -type f -not -path '*/__pycache__/*')
CPP_FILES = $(shell git ls-files '*.cc' '*.c' '*.h' '*.cu' '*.cuh')
# Those that include no other engine's headers and are read quickly.
TIDY_FILES := src/api.cc src/backend.cc src/c_api.cc src/validate.cc src/index/block_index.cc

.DEFAULT_GOAL := help
.PHONY: help setup demo build test test-cpp test-python lint format eval bench docs clean

help:  ## Say what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | \
	  awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.tools: tools/setup pyproject.toml
	tools/setup $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(PACKAGE_SOURCES)
	@echo "Building the Python package (CUDA=$(CUDA))"
	@pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps \
	  --config-settings=cmake.define.FLEXPREFILL_CUDA=$(CUDA) .
	@touch $@

setup: $(VENV)/.package  ## Virtual environment, dependencies and the Python package

demo: setup  ## Answer a question hidden in a long document, with dense attention and with ours
	flexprefill demo $(ARGS)

$(BUILD)/build.ninja: $(VENV)/.tools
	cmake --preset $(PRESET) -DCMAKE_PREFIX_PATH=$(abspath $(VENV)) \
	  $(if $(filter release dev,$(PRESET)),-DFLEXPREFILL_CUDA=$(CUDA))

build: $(BUILD)/build.ninja  ## The C++ library and its tests (PRESET=dev: warnings are errors)
	cmake --build $(BUILD)

test: test-cpp test-python  ## All tests, C++ and Python

test-cpp: build
	ctest --preset $(PRESET) -j2 $(ARGS)

test-python: setup
	pytest $(ARGS)

lint: $(VENV)/.tools  ## Format, lint and types; the core's includes
	clang-format --dry-run --Werror $(CPP_FILES)
	ruff format --check .
	ruff check .
	mypy
	tools/check_core_includes
	cmake --preset dev -DCMAKE_PREFIX_PATH=$(abspath $(VENV)) -DFLEXPREFILL_CUDA=$(CUDA) > /dev/null
	clang-tidy -p build/dev --quiet $(TIDY_FILES)

format: $(VENV)/.tools  ## Format everything in place
	clang-format -i $(CPP_FILES)
	ruff format .
	ruff check --fix .

$(VENV)/.eval: $(VENV)/.tools
	@echo "Installing lm-eval"
	@pip --disable-pip-version-check install --quiet 'lm-eval[hf,ruler]==0.4.13'
	@touch $@

eval: setup $(VENV)/.eval  ## Accuracy of the built-in model under patterns, against its table
	flexprefill eval --suite quick $(ARGS)

bench: setup  ## Measure what README.md states and write it there; 15 minutes, on an idle machine
	bench/run

$(VENV)/.docs: $(VENV)/.tools
	pip --disable-pip-version-check install --quiet 'sphinx>=8' furo myst-parser
	@touch $@

docs: setup $(VENV)/.docs  ## HTML documentation in build/docs
	sphinx-build -q -W docs build/docs

clean:  ## Remove what was built, but for the virtual environment
	rm -rf build build-python dist
	rm -f $(VENV)/.package

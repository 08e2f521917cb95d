# For a Debian or Ubuntu machine with Python >= 3.10, a C++17 compiler and make; `make help` lists
# the targets.

PYTHON ?= python3
VENV ?= .venv
# The tested release. `make test TORCH=torch==2.12.1` installs another, also into an existing .venv.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TRANSFORMERS ?= transformers==5.24.0
# CUDA kernels take two minutes to compile; without a driver they are left to the compiler gate in
# the tests. CUDA=AUTO compiles them where nvcc is, as `pip install .` does.
CUDA ?= $(if $(shell command -v nvidia-smi),AUTO,OFF)
# Test processes; each runs kernels on up to two threads, which must not spin for one another.
WORKERS ?= $(shell nproc | awk '{ print $$1 < 4 ? $$1 : 4 }')
PYTEST_ARGS ?=
# Of `make sanitize`, per row and instruction set; each row's own count takes an hour.
TRIALS ?=
HIPCC ?= hipcc
HIP_ARGS ?=
# wave64, wave64, wave32
HIP_ARCHITECTURES := gfx908 gfx90a gfx1030
AARCH64 ?= aarch64-linux-gnu
# Not those that fork or map gigabytes: more than qemu emulates.
AARCH64_ROWS := host,exact,activations,parity,edge,determinism,panels,steps,allocation,threads
# What is never imported need not be compiled to bytecode.
export PIP_NO_COMPILE ?= 1

# make splits names at spaces.
$(if $(filter-out 1,$(words $(CURDIR)) $(words $(VENV))),$(error \
  '$(CURDIR)' or VENV, '$(VENV)', has a space in it or is empty: expected paths without))

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help venv install demo test sanitize hip aarch64 clean distclean FORCE

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CLI := $(BIN)/hf-fusion
RESULTS := build/demo
PACKAGE := $(abspath build/package)
DEMO_RUNGS := stock,attention,attention+up,full
SOURCES := CMakeLists.txt pyproject.toml $(wildcard README.md LICENSE) \
  $(shell find csrc hf_fusion patches -type f -not -path '*/__pycache__/*')
CMAKE := $(shell command -v cmake || echo $(BIN)/cmake)
OWN_CMAKE := $(filter $(BIN)/%,$(CMAKE))
# GCC 12's ThreadSanitizer finds no room for its shadow where the kernel randomises 32 address bits.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

help:
	@echo 'make demo       set up .venv, build, run the ablation and the perplexity parity'
	@echo '                (tables, JSON and plots in $(RESULTS))'
	@echo 'make test       set up .venv, build, run the test suite'
	@echo 'make sanitize   native cases under address, undefined-behaviour and thread sanitizers,'
	@echo '                TRIALS=20 for a short run'
	@echo 'make hip        the attention kernels for AMD GPUs, where hipcc is: compiled, not run'
	@echo 'make aarch64    the portable kernels for ARM, where a cross-compiler and qemu are: native cases'
	@echo 'make venv       .venv with torch; make install: with this package, not editable'
	@echo 'make clean      remove build/ and caches; make distclean: .venv as well'
	@echo 'Variables: PYTHON VENV TORCH TORCH_INDEX TRANSFORMERS CUDA WORKERS PYTEST_ARGS TRIALS'

venv: $(VENV)/torch.stamp
install: $(VENV)/install.stamp

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
	  f"Python is {v[0]}.{v[1]}: expected 3.10 or later, see make PYTHON=python3.x")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'cannot create $(VENV); on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }

# Changes only with the requirements, so that another TORCH or TRANSFORMERS installs again.
$(VENV)/wanted: FORCE | $(VENV)/bin/python
	@[[ -f $@ && $$(<$@) == '$(TORCH) $(TRANSFORMERS)' ]] || echo '$(TORCH) $(TRANSFORMERS)' >$@

# PyPI's torch for Linux brings gigabytes of CUDA libraries. Without a GPU, in this order: a wheel
# that pip's find-links has at hand, PyTorch's own index of CPU wheels, PyPI. A torch that is
# already there stays, unless TORCH is given.
$(VENV)/torch.stamp: $(VENV)/wanted
	@if [[ '$(origin TORCH)' == file ]] && $(BIN)/python -c 'import torch' 2>/dev/null; then \
	  echo 'the torch in $(VENV) stays'; \
	elif command -v nvidia-smi >/dev/null; then \
	  $(PIP) install '$(TORCH)'; \
	elif $(PIP) install --quiet --no-index --no-deps '$(TORCH)' 2>/dev/null; then \
	  $(PIP) install --quiet '$(TORCH)'; \
	else \
	  $(PIP) install --retries 1 --timeout 15 --index-url '$(TORCH_INDEX)' '$(TORCH)' || \
	    { echo 'no CPU wheel; taking the default build' >&2; $(PIP) install '$(TORCH)'; }; \
	fi
	@$(BIN)/python -W ignore -c 'import torch; print("torch", torch.__version__)'
	@touch $@

# Not editable: what is tested is what a user installs. The tests' own build takes the kernels from
# $(PACKAGE).
$(VENV)/install.stamp: $(VENV)/torch.stamp $(SOURCES)
	@[[ -n "$${CXX:-}" ]] || command -v c++ g++ clang++ >/dev/null || { \
	  echo 'no C++ compiler; on Debian and Ubuntu: apt-get install g++' >&2; exit 1; }
	rm -rf $(PACKAGE)
	$(PIP) install --quiet '$(TRANSFORMERS)' '.[harness,test]' \
	  --config-settings=cmake.define.HFF_CUDA=$(CUDA) --config-settings=build-dir=$(PACKAGE)
	@touch $@

# Inside tests/, so that Python imports the installed package and not this tree.
test: $(VENV)/install.stamp | $(OWN_CMAKE)
	cd tests && OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

demo: $(VENV)/install.stamp
	@mkdir -p $(RESULTS)
	$(CLI) info
	$(CLI) ablate --model tiny --dtype fp32 --rungs $(DEMO_RUNGS) \
	  --json $(RESULTS)/tiny.json --plot $(RESULTS)/tiny.png
	$(CLI) ablate --model pythia-70m --dtype bf16 --rungs $(DEMO_RUNGS) \
	  --json $(RESULTS)/pythia-70m.json --plot $(RESULTS)/pythia-70m.png
	$(CLI) perplexity --model tiny --dtype fp32 --rungs attention,attention+up,full --windows 4 \
	  --json $(RESULTS)/perplexity-fp32.json
	$(CLI) perplexity --model tiny --dtype bf16 --windows 4 \
	  --json $(RESULTS)/perplexity-bf16.json
	@echo 'results and plots: $(RESULTS)'

$(BIN)/cmake: | $(VENV)/bin/python
	$(PIP) install --quiet 'cmake>=3.18'

export ASAN_OPTIONS ?= detect_leaks=1
export UBSAN_OPTIONS ?= print_stacktrace=1
export TSAN_OPTIONS ?= halt_on_error=1

sanitize: build/address/hff_cases build/thread/hff_cases
	build/address/hff_cases test $(TRIALS:%=--trials %)
	build/address/hff_cases fuzz $(TRIALS:%=--trials %00)
	build/address/hff_port_cases --seeds 100
	$(FIXED_ADDRESSES) build/thread/hff_cases test $(TRIALS:%=--trials %)

build/address/hff_cases: SANITIZERS := address,undefined
build/thread/hff_cases: SANITIZERS := thread
build/address/hff_cases build/thread/hff_cases: FORCE | $(OWN_CMAKE)
	$(CMAKE) -S . -B $(@D) -DCMAKE_BUILD_TYPE=Release -DHFF_TESTS=ON -DHFF_FAULTS=ON \
	  -DHFF_SANITIZE=$(SANITIZERS)
	$(CMAKE) --build $(@D) --parallel $(shell nproc) --target hff_cases hff_port_cases

# The script guesses a platform, and guesses NVIDIA where nvcc is. Contraction off, as elsewhere.
hip:
	@if ! command -v $(HIPCC) >/dev/null; then \
	  echo 'hipcc was not found, nothing is compiled; on Debian and Ubuntu: apt-get install hipcc'; \
	else \
	  mkdir -p build/hip && HIP_PLATFORM=amd $(HIPCC) -std=c++17 -O3 -ffp-contract=off -Wall -Wextra \
	    $(HIP_ARGS) $(addprefix --offload-arch=,$(HIP_ARCHITECTURES)) -Icsrc -x hip \
	    -c csrc/cuda/attend.cu -o build/hip/attend.o && \
	  echo 'build/hip/attend.o: attention kernels for $(HIP_ARCHITECTURES)'; \
	fi

aarch64: | $(OWN_CMAKE)
	@if ! command -v $(AARCH64)-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then \
	  echo '$(AARCH64)-g++ and qemu-aarch64 were not both found, nothing is built; on Debian and' \
	    'Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user'; \
	else \
	  $(CMAKE) -S . -B build/aarch64 -DCMAKE_BUILD_TYPE=Release -DHFF_TESTS=ON -DHFF_FAULTS=ON \
	    -DHFF_CUDA=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=$(AARCH64)-g++ && \
	  $(CMAKE) --build build/aarch64 --parallel $(shell nproc) --target hff_cases && \
	  qemu-aarch64 -L /usr/$(AARCH64) build/aarch64/hff_cases test --only $(AARCH64_ROWS) \
	    $(TRIALS:%=--trials %) && \
	  qemu-aarch64 -L /usr/$(AARCH64) build/aarch64/hff_cases fuzz $(TRIALS:%=--trials %00); \
	fi

clean:
	rm -rf build .pytest_cache .hypothesis tests/.pytest_cache tests/.hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

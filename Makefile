# make setup       virtual environment, pinned dependencies, the package with its C++ library
# make bench       the benchmark and its report -> out/bench/index.html
# make test        every test that needs no GPU -> out/test
# make clean       removes what was written, except the virtual environment
#
# On a machine with a GPU, with its own Python and packages; nothing is downloaded and each part ends within 8 minutes:
# make gpu         every part below -> out/gpu
# make gpu-test    the tests, kernels compiled and run on the GPU
# make gpu-verify  `fastadapt verify`
# make gpu-bench   the benchmark
# make gpu-tune    tile configurations for this GPU
# make sanitize    compute-sanitizer over the CUDA C++ kernels: memory, races, uninitialised reads -> out/sanitize
#
# Variables: make test PYTHON=python3.12 VENV=/tmp/venv OUT=/tmp/out WORKERS=8

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: setup bench test clean gpu gpu-test gpu-verify gpu-bench gpu-tune sanitize

IN_VENV := $(VENV)/bin/python
PIP_INSTALL := $(IN_VENV) -m pip install --constraint constraints.txt

setup: $(VENV)/.package

# torch and triton are named so that the constraints choose them, not the newest package that asks for any torch
$(VENV)/.dependencies: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools wheel torch triton
	touch $@

$(VENV)/.package: $(VENV)/.dependencies pyproject.toml setup.py fastadapt/native.py $(wildcard csrc/*)
	$(PIP_INSTALL) --no-build-isolation --editable '.[bench,cpu,peft,test]'
	touch $@

bench: OUT ?= out/bench
bench: setup
	$(IN_VENV) -m bench --out $(OUT)

# Kernels are interpreted in one process and compiled in the other; the second runs whatever the first one finds.
test: OUT ?= out/test
test: setup
	mkdir -p $(OUT)
	failed=0
	$(IN_VENV) -m pytest tests -n $(WORKERS) 2>&1 | tee $(OUT)/interpreted.txt || failed=1
	TRITON_INTERPRET=0 $(IN_VENV) -m pytest tests/codegen -n $(WORKERS) 2>&1 | tee $(OUT)/codegen.txt || failed=1
	tail -n 1 $(OUT)/interpreted.txt $(OUT)/codegen.txt
	exit $$failed

clean:
	rm -rf out build dist *.egg-info fastadapt/*.so $(VENV)/.package .pytest_cache .benchmarks
	find fastadapt bench tests -name __pycache__ -prune -exec rm -rf {} +

OPERATIONS := $(notdir $(patsubst %/op.py,%,$(wildcard fastadapt/kernels/*/op.py)))
METHODS := $(notdir $(patsubst %/method.py,%,$(filter-out %/common/method.py,$(wildcard fastadapt/models/*/method.py))))
GPU_PARTS := gpu-test gpu-verify gpu-bench gpu-tune
gpu $(GPU_PARTS): OUT ?= out/gpu
PART = mkdir -p $(OUT); PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} timeout 480 $(PYTHON)

gpu:
	$(MAKE) --keep-going $(GPU_PARTS) OUT=$(OUT)

gpu-test:
	$(PART) -m fastadapt.native || echo "the tests of the C++ library will fail"
	$(PART) -m pytest tests 2>&1 | tee $(OUT)/tests.txt

gpu-verify:
	$(PART) -m fastadapt.cli verify --json $(OUT)/verify.json 2>&1 | tee $(OUT)/verify.txt

gpu-bench:
	$(PART) -m bench --out $(OUT)/bench
	for op in $(OPERATIONS); do $(PART) -m bench ops --op $$op --out $(OUT)/ops/$$op; done
	for method in $(METHODS); do $(PART) -m bench methods --method $$method --out $(OUT)/methods/$$method; done

gpu-tune:
	$(PART) -m bench tune --out $(OUT)/tune

# races look at shared memory only; uninitialised reads are told where torch's own memory is, so its cache is switched off
sanitize: OUT ?= out/sanitize
sanitize:
	mkdir -p $(OUT)
	$(PART) -m fastadapt.native
	failed=0
	for tool in memcheck racecheck initcheck; do
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} timeout 480 \
	    compute-sanitizer --tool $$tool --kernel-name kernel_substring=side_fusion --error-exitcode 9 \
	    $(PYTHON) -m tests.cuda.sanitize 2>&1 | tee $(OUT)/$$tool.txt || failed=1
	done
	exit $$failed

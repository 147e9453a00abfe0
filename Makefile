# Every target sets up what it needs: `make run` and `make test` work on a fresh clone.
CONFIG    ?= configs/cells.yaml
PRECISION ?=
BACKEND   ?= auto
BUILD     ?= build
PYTHON    ?= python3

VENV     := .venv
READY    := $(VENV)/.ready
TYPING   := $(VENV)/typing
TRITON   := $(VENV)/triton
UNET_TRT := $(VENV)/bin/unet-trt
TEST      = $(VENV)/bin/python -m pytest -n auto --dist worksteal
# SET="a.b=c d.e=f" overrides keys of the configuration.
SETS      = $(foreach pair,$(SET),--set $(pair))
COMMON    = -c $(CONFIG) --build-dir $(BUILD) $(SETS)
CHOSEN    = $(foreach precision,$(PRECISION),-p $(precision)) --backend $(BACKEND)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-matrix test-gpu triton coverage lint docs export clean-graph calibrate engine validate benchmark report regress train

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'
	@echo "Variables: CONFIG=$(CONFIG) PRECISION=fp32|fp16|int8|mixed BACKEND=$(BACKEND) BUILD=$(BUILD) SET=\"section.key=value …\""

setup: $(READY) ## make .venv and install everything, pinned
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14) and "unet-trt needs Python 3.10 to 3.13, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,rtx,serve,ray,dev]'
	@touch $@

run: $(READY) ## the whole pipeline on CONFIG
	$(UNET_TRT) run $(COMMON) $(CHOSEN)

test: $(READY) $(TRITON)/.ready ## all tests that need no GPU
	$(TEST)

test-matrix: $(READY) ## every export: exporters × opsets × sizes × upsampling
	HYPOTHESIS_PROFILE=default $(TEST) tests/matrix tests/integration/test_foreign.py tests/unit/graph/test_properties.py -m "matrix or not matrix"

test-gpu: ## tests on a GPU host, with the interpreter PYTHON that has TensorRT
	$(PYTHON) -m pytest tests/gpu -m gpu

# NVIDIA's own server with its Python backend, which is built for numpy 1: in an environment of its own. Where there is
# none for this Python or machine, the tests that need it say so.
triton: $(TRITON)/.ready ## Triton Inference Server for tests and small deployments
$(TRITON)/.ready: $(READY)
	rm -rf $(TRITON)
	$(VENV)/bin/python -m venv $(TRITON)
	-$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		nvidia-pytriton==0.7.0 numpy==1.26.4 "$$(grep ^onnxruntime== constraints.txt)" \
		&& cd $(TRITON)/lib/python*/site-packages/pytriton/tritonserver \
		&& cp python_backend_stubs/$$(basename $$(cd ../../../ && pwd) | tr -d python)/triton_python_backend_stub backends/python/
	@touch $@

coverage: $(READY) $(TRITON)/.ready ## the tests again, and which lines of pipeline/ they leave out
	$(TEST) --cov --cov-report=term-missing

lint: $(READY) $(TYPING)/.ready ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs ## the reference from the sources, and build/docs/index.html; a broken link is an error
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/python -m sphinx -n -W --keep-going -q -b html docs $(BUILD)/docs
$(VENV)/.docs: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# TensorRT's API for mypy. Not in the environment: there the stubs would ask for TensorRT itself, and look like it.
# sed mends what is no Python in them: parameters named "in", and one without a default behind some that have one.
$(TYPING)/.ready: $(READY)
	rm -rf $(TYPING)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --target $(TYPING) tensorrt-stubs
	sed -i -e 's/\bin: list\[/in_: list[/' -e 's/channel_axis: int) -> /channel_axis: int = ...) -> /' $(TYPING)/tensorrt_bindings/tensorrt.pyi
	@touch $@

export: $(READY) ## torch to ONNX
	$(UNET_TRT) export $(COMMON)
clean-graph: $(READY) ## rewrite the ONNX graph for TensorRT
	$(UNET_TRT) clean $(COMMON)
calibrate: $(READY) ## choose INT8 ranges
	$(UNET_TRT) calibrate $(COMMON)
engine: $(READY) ## build engines: PRECISION=int8, or all of the configuration
	$(UNET_TRT) engine $(COMMON) $(CHOSEN)
validate: $(READY) ## judge engines against FP32 and labels
	$(UNET_TRT) validate $(COMMON) $(CHOSEN)
benchmark: $(READY) ## time what runs here
	$(UNET_TRT) benchmark $(COMMON) $(CHOSEN)
report: $(READY) ## write the HTML page
	$(UNET_TRT) report $(COMMON) $(CHOSEN)
regress: $(READY) ## compare with baselines/<config>.json; JUNIT=FILE and MARKDOWN=FILE for CI
	$(UNET_TRT) regress $(COMMON) $(CHOSEN) $(if $(JUNIT),--junit $(JUNIT)) $(if $(MARKDOWN),--markdown $(MARKDOWN))
train: $(READY) ## train CONFIG's network from scratch
	$(UNET_TRT) train -c $(CONFIG) $(SETS)

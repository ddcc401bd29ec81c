# `make demo` trains a real model from nothing; `make test` runs the tests. Both set up .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready$(if $(filter 1,$(AIO)),-aio)
PIP_VERSION := 26.3
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST_ARGS ?=
# 1 also compiles what training state on a disk needs (libaio-dev), which takes minutes.
AIO ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup examples demo test lint format bench-latency bench-standby bench-train bench-checkpoint \
	bench-memory bench-simulate bench-scheduler bench-admission chaos clean

help:
	@echo "make demo           set up, then fine-tune MiniLM on two processes through a local yard"
	@echo "make test           set up, then run the tests (PYTEST_ARGS='-k sampler' narrows them)"
	@echo "make setup          make .venv and build DeepSpeed's CPU operations (PYTHON=python3.12 picks another)"
	@echo "make examples       fetch the example models and data (CAUSAL_LM=1: the language model, too)"
	@echo "make lint           ruff, mypy and the import contracts"
	@echo "make format         let ruff rewrite what it can"
	@echo "make bench-latency  measure how long a job takes from submit to its first step"
	@echo "make bench-standby  measure how long an attempt takes to its first step, with a standby and without"
	@echo "make bench-train    measure training on this CPU beside the textbook's loop, transformers' Trainer and TRL"
	@echo "make bench-checkpoint  measure what saving and loading a GiB of state costs beside stock ways"
	@echo "make bench-memory   measure predicted memory beside what trainings really hold, and beside published peaks"
	@echo "make bench-simulate  simulate a week of a public trace, under the yard's scheduler and under others"
	@echo "make bench-scheduler  measure what a scheduling decision costs, to 100,000 queued gangs on 10,000 nodes"
	@echo "make bench-admission  measure how many jobs a second are admitted on a Ray yard, beside Ray's own rate"
	@echo "make chaos          kill a rank in 200 saves, damage 1000 checkpoints, and break a yard in 60 ways: what is lost"
	@echo "make clean          remove caches, .venv and the example yard (.tuneyard)"

setup: $(READY)

define CHECK_PYTHON
import pathlib, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(f"setup: Tuneyard needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}.\n"
             "       Name another one: make setup PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("setup: this Python has no venv module. On Debian or Ubuntu: apt-get install python3-venv")
if not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file():
    sys.exit("setup: this Python has no headers (Python.h), which DeepSpeed's CPU operations need.\n"
             "       On Debian or Ubuntu: apt-get install python3-dev")
endef
export CHECK_PYTHON

# Compiled into the installation, not on first use: a job that is killed while it compiles leaves torch's lock behind,
# and the next one waits for it without end.
define CHECK_OPERATIONS
import os
from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, CPUAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder
from deepspeed.git_version_info import installed_ops
asked = [PinMemoryBuilder(), AsyncIOBuilder()] if os.environ["DS_BUILD_AIO"] == "1" else []
for builder in (ShareMemCommBuilder(), CPUAdamBuilder(), *asked):
    assert installed_ops[builder.NAME] or not builder.is_compatible()
    if installed_ops[builder.NAME]:
        builder.load(verbose=False)
endef
export CHECK_OPERATIONS
OPERATIONS := DS_ACCELERATOR=cpu DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 DS_BUILD_CPU_ADAM=1 DS_BUILD_AIO=$(AIO) DS_BUILD_PIN_MEMORY=$(AIO)
ifeq ($(AIO),1)
# DeepSpeed links its operations for CPUs with no library of its own choice when they are compiled into an installation.
OPERATIONS += LDFLAGS="-Wl,--no-as-needed -laio $(LDFLAGS)"
endif

# torch goes first: DeepSpeed's own set-up imports it, which is also why builds are not isolated.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: no $(PYTHON); install Python 3.11 or newer, or name one: make setup PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || { \
	  echo "setup: no C++ compiler; DeepSpeed's CPU operations need one. On Debian or Ubuntu: apt-get install g++" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setup: making .venv"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing packages (the first time downloads several hundred megabytes)"
	@$(BIN)/python -m pip --version | grep -q "^pip $(PIP_VERSION) " || $(PIP) install pip==$(PIP_VERSION)
	@$(PIP) install -c constraints.txt setuptools wheel hatchling editables ninja packaging py-cpuinfo numpy torch
	@$(OPERATIONS) $(BIN)/python -c "$$CHECK_OPERATIONS" >/dev/null 2>&1 || { \
	  echo "setup: building DeepSpeed's CPU operations (once, two minutes or so)"; \
	  $(OPERATIONS) PATH="$(BIN):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation --no-cache-dir \
	    --force-reinstall --no-deps deepspeed; }
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(OPERATIONS) $(BIN)/python -c "$$CHECK_OPERATIONS"
	@touch $@

examples: setup
	@$(BIN)/python configs/jobs/examples.py $(if $(CAUSAL_LM),--causal-lm)

demo: examples
	@export TUNEYARD_HOME="$(CURDIR)/.tuneyard" PATH="$(BIN):$$PATH"; \
	trap 'tuneyard down' EXIT; \
	tuneyard up && tuneyard submit configs/jobs/sms-spam.yaml --wait

# Those tests that start no worlds of processes share the cores; the others each have the machine for themselves.
ALONE := tests/unit tests/properties
ifeq ($(strip $(PYTEST_ARGS)),)
test: examples
	@status=0; \
	$(BIN)/python -m pytest -n 2 $(ALONE) || status=$$?; \
	$(BIN)/python -m pytest $(ALONE:%=--ignore=%) || status=$$?; \
	exit $$status
else
test: examples
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-latency: examples
	$(BIN)/python -m benchmarks.latency

bench-train: examples
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,bench]'
	@$(BIN)/python configs/jobs/examples.py --causal-lm
	$(BIN)/python -m benchmarks.train

bench-standby: examples
	$(BIN)/python -m benchmarks.standby

bench-checkpoint: setup
	$(BIN)/python -m benchmarks.checkpoint

bench-scheduler: setup
	$(BIN)/python -m benchmarks.scheduler

bench-admission: setup
	$(BIN)/python -m benchmarks.admission

bench-simulate: setup
	$(BIN)/python -m benchmarks.simulate_philly

bench-memory: setup
	$(BIN)/python -m benchmarks.memory_published
	$(BIN)/python -m benchmarks.memory

chaos: setup
	$(BIN)/python -m benchmarks.checkpoint_crash --kills 200 --flips 1000
	$(BIN)/python -m benchmarks.chaos --faults 60

clean:
	rm -rf .venv .tuneyard .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

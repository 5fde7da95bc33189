# Needs Python 3.11 or newer and make; everything else is installed into .venv from requirements.lock.
PYTHON ?= python3
PROFILE ?= cifar10-resnet20
REBUILD ?=
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
PAGES := $(VENV)/.pages
READY := $(VENV)/.ready
PIP := $(BIN)/uv pip install --quiet --python $(BIN)/python
BOOK := $(BIN)/python -m book.making
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist loadscope --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONPATH :=
export PYTHONDONTWRITEBYTECODE :=
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter

VARIABLES := PYTHON PROFILE REBUILD SEED
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(word 1,$(origin $(name)))),$(name)))
$(foreach name,$(filter-out $(VARIABLES) MAKEFLAGS,$(GIVEN)),$(error No variable $(name): there are $(VARIABLES)))

.DEFAULT_GOAL := help
.PHONY: help env book pages notebooks slides student check test lint benchmarks lab lock clean

help:  ## list what make can do
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo "Variables: PROFILE (default cifar10-resnet20), REBUILD=1 (compute the study afresh), SEED, PYTHON"

env: $(READY)  ## make the environment in .venv

$(PAGES): requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.x')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(PIP) --group pages --constraint requirements.lock
	@touch $@

$(READY): $(PAGES)
	$(PIP) --compile-bytecode --no-deps -r requirements.lock
	$(PIP) --no-deps --editable .
	@mkdir -p _build  # papermill writes into folders that are there
	@touch $@

book: $(READY)  ## execute the chapters and build the pages: make book [PROFILE=...] [REBUILD=1] [SEED=...]
	$(BOOK) book --profile $(PROFILE) --seed $(SEED) $(if $(REBUILD),--rebuild)

pages: $(PAGES)  ## build the pages from the outputs that book/*.ipynb have; needs 700 MB, and no PyTorch
	$(BOOK) pages

notebooks: $(READY)  ## execute the chapters and refresh the outputs of book/*.ipynb
	$(BOOK) notebooks --profile $(PROFILE)

slides: $(READY)  ## execute the chapters and make slides of their marked cells: make slides [PROFILE=...] [REBUILD=1]
	$(BOOK) slides --profile $(PROFILE) $(if $(REBUILD),--rebuild)

student: $(READY)  ## copy the notebooks without outputs and solutions into _build/student
	$(BOOK) student

lint: $(READY)
	$(BIN)/ruff check emq_lib tests benchmarks book/*.py book/making book/studies
	$(BIN)/ruff format --check emq_lib tests benchmarks book/*.py book/making book/studies

check: lint  ## what one runs before every commit: lint, types, and the quick tests
	$(PYTEST) -m "not slow and not browser and not chapters"

test: lint  ## everything: also the slow tests, the pages in a browser, and every chapter live on digits-resnet8
	$(PYTEST) --durations=8

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
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --group pages --no-header --no-annotate \
		--output-file requirements.lock pyproject.toml

clean:  ## remove what was built, and the environment
	rm -rf _build $(VENV)

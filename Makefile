# AutoCircuit. Each target sets up what it needs in $(VENV), from nothing but Python and
# make, and a second call installs nothing unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run robustness test fuzz lint format bench architectures docs explorer pocket-autoencoders pocket-model datasets lock clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
	  | awk -F ':.*## ' '{ printf "  make %-19s %s\n", $$1, $$2 }'
	@echo
	@echo '  ARGS="..." is handed on; PYTHON=python3.12 picks the Python for a new $(VENV).'

run: $(VENV)/.stamp-run  ## run a sweep: make run ARGS="--help"
	$(BIN)/python experiments.py $(ARGS)

robustness: $(VENV)/.stamp-run  ## test the same circuits in other ways, and draw what changes
	$(BIN)/python experiments.py robustness $(ARGS)

# Compiled files are kept, whatever the environment says: many tests start a Python.
test: $(VENV)/.stamp-dev  ## run the tests: make test ARGS=--runslow
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.stamp-dev  ## check format, lint, types, spelling, layers and lock file
	$(BIN)/black --check --quiet --diff .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/poetry check --lock

FUZZ_EXAMPLES ?= 10000
fuzz: $(VENV)/.stamp-dev  ## try many random inputs on every public reader
	FUZZ=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  -o addopts= --import-mode=importlib -n 2 --dist worksteal tests/fuzz $(ARGS)

format: $(VENV)/.stamp-dev  ## format the code and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/black .

bench: $(VENV)/.stamp-run  ## measure speed and memory
	$(BIN)/python benchmarks/bench.py $(ARGS)
	$(BIN)/python -m benchmarks.graphs

architectures: $(VENV)/.stamp-dev  ## check every architecture, and write the site's table
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architecture_table $(ARGS)

docs: $(VENV)/.stamp-dev  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)
	@echo 'To read it, with search: $(BIN)/python -m http.server --directory site'

explorer:  ## build the explorer's JavaScript from its source (needs Node)
	cd auto_circuit/explorer && npm ci && npm run build

pocket-autoencoders: $(VENV)/.stamp-run  ## train the autoencoders that the package carries
	$(BIN)/python scripts/train_pocket_autoencoders.py $(ARGS)

POCKET_MODELS := gpt2 llama gemma2
pocket-model: $(VENV)/.stamp-run  ## train the small models that the package carries
	@set -e; for model in $(POCKET_MODELS); do \
	  echo "$$model"; $(BIN)/python scripts/train_pocket_model.py $$model $(ARGS); \
	done

datasets: $(VENV)/.stamp-run  ## write the prompt files anew
	@set -e; for generator in $(sort $(wildcard datasets/*_generator.py datasets/*/*_generator.py)); do \
	  echo "$$generator"; $(BIN)/python "$$generator"; \
	done

lock: $(VENV)/.stamp-dev  ## bring poetry.lock up to date with pyproject.toml
	$(BIN)/poetry lock

clean:  ## remove $(VENV), caches and builds (results/ stays)
	rm -rf $(VENV) build dist site *.egg-info .*_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment with a pip that knows dependency groups. One that is already
# there (poetry's, for example) is used as it is.
$(VENV)/.stamp-pip: constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 15) or sys.exit("AutoCircuit needs Python 3.10 to 3.14; $(PYTHON) is %d.%d. Choose another one: make PYTHON=python3.12" % v)' \
	  && $(PYTHON) -m venv $(VENV); \
	fi
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade
	$(INSTALL) --quiet pip
	@touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-pip pyproject.toml
	@echo "Installing AutoCircuit into $(VENV); the first time takes a few minutes."
	$(INSTALL) --quiet --editable .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-pip pyproject.toml
	@echo "Installing AutoCircuit and its developers' tools into $(VENV); the first time takes a few minutes."
	$(INSTALL) --quiet --editable . --group dev
	@touch $@ $(VENV)/.stamp-run

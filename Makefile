# Everything starts from nothing: each target makes .venv first (Python 3.11 or newer with venv is all it takes).
VENV ?= .venv
PYTHON ?= python3
PORT ?= 8000
UV := uv==0.13.9
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
PAGES := $(shell find nbs -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -not -path '*/runs/*' 2>/dev/null)
LAB_FLAGS := $(if $(filter 0,$(shell id -u)),--allow-root)
export PATH := $(BIN):$(PATH)
# Compiled modules are kept, wherever Python was told not to: or each kernel would compile PyTorch once more.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install demo test lab docs docs-serve export lint types benchmark clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv is missing or broken: install it (Debian: python3-venv), then try again."; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	@echo "Installing adaptkit and its tools into $(VENV) (about a minute, 6 GB with PyTorch) ..."
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)  ## make .venv and install everything into it

demo: $(STAMP)  ## adapt an ImageNet network to solar cells: notebook, report and model in runs/demo
	@$(BIN)/adaptkit run nbs/seven_steps.ipynb -o runs/demo/seven_steps.ipynb -p out runs/demo -p size 224 -p views 4 -p epochs 6 $(DEMO)
	@echo "Everything is in runs/demo: open runs/demo/report.html in a browser, or the executed notebook with  make lab"

test: $(STAMP)  ## run every test: the package, the rules of the house, every page
ifdef TESTS
	@$(BIN)/python -m pytest $(TESTS)
else
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder || beside=failed; \
	$(BIN)/python -m pytest -m alone && test -z "$$beside"
endif

lab: $(STAMP)  ## open JupyterLab at the home page
	@$(BIN)/jupyter lab $(LAB_FLAGS) nbs/index.ipynb

docs: $(STAMP)  ## execute the pages and build the site in _proc/_docs
	@$(BIN)/python -m adaptkit.notebooks.site build

docs-serve: $(STAMP)  ## show the built site at http://127.0.0.1:8000 (PORT=... for another)
	@test -f _proc/_docs/index.html || $(MAKE) docs
	@echo "http://127.0.0.1:$(PORT)/  (Ctrl-C to stop)"
	@$(BIN)/python -m http.server --directory _proc/_docs --bind 127.0.0.1 $(PORT)

export: $(STAMP)  ## after editing a page: format and strip it, write the package, the sidebar and README.md
	@$(BIN)/ruff check --quiet --fix nbs
	@$(BIN)/ruff format --quiet nbs
	@$(BIN)/nbstripout --keep-id $(PAGES)
	@$(BIN)/nbdev_export
	@$(BIN)/python -m adaptkit.notebooks.site sidebar
	@$(BIN)/python -m adaptkit.notebooks.site readme

lint: $(STAMP)  ## ruff on the pages, the package and the tests
	@$(BIN)/ruff check nbs adaptkit tests benchmarks
	@$(BIN)/ruff format --check nbs

types: $(STAMP)  ## mypy --strict on the package
	@$(BIN)/mypy --strict adaptkit

benchmark: $(STAMP)  ## compare with what you would use instead (long; results in benchmarks/results)
	@VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e '.[dev,benchmark]'
	@$(BIN)/python benchmarks/run.py $(BENCHMARK)

clean:  ## remove what was built (not .venv, not runs/demo)
	rm -rf _proc _docs build runs/docs .mypy_cache .ruff_cache .pytest_cache .hypothesis

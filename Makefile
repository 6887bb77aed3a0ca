# Fedge from a checkout: `make demo` shows it, `make test` checks it. Everything is put into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.ready-for-demo
DEV_READY := $(VENV)/.ready-for-development

# Three workers also on two cores: the tests start programs of their own, and wait for them. A worker
# that has loaded torch takes about half a gigabyte. A file's tests stay together, because they share
# running demonstrations.
TEST_OPTIONS ?= -n 3 --dist loadfile

SECONDS = 600
SEED = 1

.PHONY: help demo test chaos lint types clean distclean
.DEFAULT_GOAL := help

help:  ## Say what can be made
	@echo "make demo    a broker, a coordinator and 4 agents learn handwritten digits, on this computer"
	@echo "             other wishes: make demo DEMO='--devices 8 --split shards'; fedge demo --help"
	@echo "make test    every test, unit and end to end; one of them: make test TEST_OPTIONS='-k name'"
	@echo "make chaos   a fleet under seeded faults; checks that nothing was lost or counted twice"
	@echo "             other wishes: make chaos SECONDS=600 SEED=1 CHAOS='--devices 8 --list'"
	@echo "             needs Mosquitto; the first time it installs the development extra, as test does"
	@echo "make lint    ruff, rules and formatting"
	@echo "make types   mypy, strict"
	@echo "make clean   remove what was built, measured and shown; distclean removes .venv, too"

demo: $(DEMO_READY)  ## Show a whole federation
	$(BIN)/fedge demo $(DEMO)

test: $(DEV_READY)  ## Run every test
	$(BIN)/python -m pytest $(TEST_OPTIONS)

chaos: $(DEV_READY)  ## Break everything at random moments and check the promise
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED) $(CHAOS)

lint: $(DEV_READY)  ## Check the rules and the formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_READY)  ## Check the types
	$(BIN)/mypy

clean:  ## Remove what was made, but for .venv
	rm -rf demo-out build dist benchmarks/out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv, too
	rm -rf $(VENV)

# The stamps: an installation is repeated only when pyproject.toml has changed.

$(DEMO_READY): pyproject.toml
	@$(MAKE) --no-print-directory check-python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[coordinator]'
	@touch $@

$(DEV_READY): pyproject.toml
	@$(MAKE) --no-print-directory check-python
	@echo "installing Fedge with its development extra into $(VENV); only this once, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@ $(DEMO_READY)

.PHONY: check-python
check-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) was not found. Debian, Ubuntu, Raspberry Pi OS:" \
	       "sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Fedge needs Python 3.11 or newer; $(PYTHON) is" \
	       "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments. Debian, Ubuntu, Raspberry Pi OS:" \
	       "sudo apt-get install python3-venv" >&2; exit 1; }

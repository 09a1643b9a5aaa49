# Every target does its own set-up, into .venv in this checkout; a second run does none.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo live-demo test fuzz soak check bench docs clean

setup: .venv/ready

.venv/ready: pyproject.toml
	@rm -rf .venv
	$(PYTHON) -c 'import sys; sys.exit("memshr needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/memshr demo

live-demo: setup
	@PYTHONPATH=tests $(BIN)/python -m guests.live_demo

test: setup
	@$(BIN)/python -m pytest

# Searches for inputs that break what reads bytes of strangers: make fuzz FUZZ_SECONDS=60 for a shorter one.
FUZZ_SECONDS ?= 600
fuzz: .venv/fuzz-ready
	@PYTHONPATH=tests $(BIN)/python -m fuzz.campaign --seconds $(FUZZ_SECONDS)

.venv/fuzz-ready: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	@touch $@

# The long form of the kill tests: make soak KILLS=100 for a shorter one. Three of four kills are of a worker that does
# nothing but share and unshare, one is of a command that people run. KSM is switched on for a while, and put back.
KILLS ?= 1000
soak: setup
	@PYTHONPATH=tests $(BIN)/python -m live.kill_campaign $(KILLS)

check: setup
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

bench: setup
	@PYTHONPATH=tests $(BIN)/python benchmarks/run.py

docs: setup
	@$(BIN)/python -m memshr.cli.reference > docs/commands.md

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis

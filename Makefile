# Each target makes .venv and installs what it needs; a second run finds it there.
# With uv on the PATH it is used, else pip. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test lint bench install clean

demo: $(VENV)/.run
	$(BIN)/python -m tools.demo

# Test files run side by side, one thread each, in the order of tests/conftest.py: most of their time is spent starting
# processes and decoding.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --no-error-summary

# Every benchmark with small settings; tables and figures in runs/bench.
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

install: $(VENV)/.run

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 10) or sys.exit("Python 3.10 or newer is needed, $(PYTHON) is %d.%d; choose one with make PYTHON=..." % v)'
ifdef UV
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
endif
	@touch $@

$(VENV)/.run: requirements.txt $(VENV)/.python
	$(call install,requirements.txt)
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt $(VENV)/.python
	$(call install,requirements-dev.txt)
	@touch $@ $(VENV)/.run

ifdef UV
install = $(UV) pip install --quiet --python $(BIN)/python -r $(1)
else
install = $(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(1)
endif

clean:
	rm -rf $(VENV) runs

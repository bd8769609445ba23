# Two commands for a newcomer: `make demo` and `make test`. BUILD.md has the rest.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo smoke test lint format types unit bench clean

demo: .venv/.demo
	$(BIN)/python -m experiments.quickstart $(ARGS)

smoke: .venv/.demo
	$(BIN)/python -m experiments.quickstart --smoke

test: lint types unit

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/pyright

unit: .venv/.test
	$(BIN)/python -m pytest $(ARGS)

bench: .venv/.demo
	$(BIN)/python -m experiments.bench_extract $(ARGS)

format: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[experiments]'
	touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[experiments,test]'
	touch $@ .venv/.demo

clean:
	rm -rf .venv build *.egg-info

# Two commands for a newcomer: `make demo` and `make test`. BUILD.md has the rest.
PYTHON ?= python3
# Python compiles what it imports; pip would compile all of torch first.
INSTALL := pip install --quiet --no-compile --editable
BIN := .venv/bin
# The accelerators' compilers stay out of the environment of everything else.
AOT := .venv/aot
# On a machine with a Hopper card.
GPU := .venv/gpu
# Models of other packages, and all that these need.
FOREIGN := .venv/foreign
# What makes pages and wheels.
DOCS := .venv/docs

.PHONY: demo smoke test lint format types unit bench test-aot bench-kernels \
  test-gpu bench-gpu test-long test-families test-foreign \
  test-merges fuzz \
  bench-scoring bench-serving bench-sweep docs dist clean

demo: .venv/.demo
	$(BIN)/python -m experiments.quickstart $(ARGS)

smoke: .venv/.demo
	$(BIN)/python -m experiments.quickstart --smoke

# Types are checked beside the tests: alone they would leave a core idle.
test: lint
	$(MAKE) --jobs=2 types unit

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.test
	$(BIN)/pyright

unit: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=40 $(ARGS)

# Tests that `make test` leaves out, for their time.
test-long: .venv/.test
	$(BIN)/python -m pytest -m long $(ARGS)

# Every model type of the installed transformers; an hour or two on two cores.
test-families: .venv/.test
	$(BIN)/python -m tests.families $(ARGS)

# Recipes over all families against float64, and layers in other orders.
test-merges: .venv/.test
	$(BIN)/python -m tests.merges $(ARGS)

test-foreign: $(FOREIGN)/.done
	$(FOREIGN)/bin/python -m tests.foreign $(ARGS)
	$(FOREIGN)/bin/python -m pytest tests/jlora/formats/test_jax_consumers.py

# Damaged files through every door; ten thousand take some minutes.
fuzz: .venv/.test
	$(BIN)/python -m tests.fuzz $(ARGS)

bench: .venv/.demo
	$(BIN)/python -m experiments.bench.extract $(ARGS)

bench-scoring: .venv/.test
	$(BIN)/python -m experiments.bench.scoring $(ARGS)

bench-serving: .venv/.test
	$(BIN)/python -m experiments.bench.serving $(ARGS)

bench-sweep: .venv/.demo
	$(BIN)/python -m experiments.bench.sweep $(ARGS)

test-aot: $(AOT)/.done
	JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest tests/pallas_kernels/aot \
	  tests/experiments/test_pod_programs.py \
	  --durations=0 $(ARGS)

bench-kernels: $(AOT)/.done
	JAX_PLATFORMS=cpu $(AOT)/bin/python -m pallas_kernels.bench $(ARGS)

test-gpu: $(GPU)/.done
	JAX_PLATFORMS=cuda,cpu $(GPU)/bin/python -m pytest $(ARGS) \
	  tests/pallas_kernels/lora_dot/test_lora_dot_on_cards.py

bench-gpu: $(GPU)/.done
	JAX_PLATFORMS=cuda,cpu $(GPU)/bin/python -m pallas_kernels.bench.gpu $(ARGS)

# A warning, a link or an anchor that leads nowhere is an error.
docs: $(DOCS)/.done
	$(DOCS)/bin/python -m sphinx -W --keep-going -q -c docs -b html . build/site
	@echo "built: build/site/index.html"

# The wheel and the source distribution, as they would be uploaded.
dist: $(DOCS)/.done
	rm -rf dist build/lib
	$(DOCS)/bin/python -m build --outdir dist .
	$(DOCS)/bin/python -m twine check --strict dist/*

format: .venv/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml
	$(BIN)/$(INSTALL) '.[experiments]'
	touch $@

.venv/.test: .venv/bin/python pyproject.toml
	$(BIN)/$(INSTALL) '.[experiments,test,formats]'
	touch $@ .venv/.demo

$(AOT)/.done: .venv/bin/python pyproject.toml
	.venv/bin/python -m venv $(AOT)
	$(AOT)/bin/$(INSTALL) '.[aot]'
	touch $@

$(GPU)/.done: .venv/bin/python pyproject.toml
	.venv/bin/python -m venv $(GPU)
	$(GPU)/bin/$(INSTALL) '.[test-gpu]'
	touch $@

$(FOREIGN)/.done: .venv/bin/python pyproject.toml
	.venv/bin/python -m venv $(FOREIGN)
	$(FOREIGN)/bin/$(INSTALL) '.[foreign]'
	touch $@

$(DOCS)/.done: .venv/bin/python pyproject.toml
	.venv/bin/python -m venv $(DOCS)
	$(DOCS)/bin/$(INSTALL) '.[docs,dist]'
	touch $@

clean:
	rm -rf .venv build dist docs/reference *.egg-info

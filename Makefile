# `make demo` and `make test` set up everything they need on a machine with only Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo docs test test-slow test-long lint install constraints clean

demo: $(VENV)/installed
	$(BIN)/babel demo --out runs/demo

# Half of the tests' time was XLA's, which here compiles almost without optimizing, and each program as one piece. The emitters of
# fusions alone took 40% of the time of tests that compile much. `make test-slow` compiles as users do.
QUICK_TO_COMPILE = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false
# Tests start many processes. Each would compile every Python file again if the environment said not to keep compiled ones.
export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/installed-test lint
	JAX_PLATFORMS=cpu XLA_FLAGS="$(QUICK_TO_COMPILE)" $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long"

# Tests of over 20 seconds each: whole pods' programs, many processes, many kills. SLOW_TESTS_UNTIL (seconds since 1970) skips what has
# not begun by then.
test-slow: $(VENV)/installed-test
	JAX_PLATFORMS=cpu SLOW_TESTS_UNTIL=$(SLOW_TESTS_UNTIL) $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not long" -rs

# Tests of minutes each: a rehearsal of every shipped config.
test-long: $(VENV)/installed-test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m long

lint: $(VENV)/installed-test
	$(BIN)/ruff check babel_jax tests benchmarks docs
	$(BIN)/ruff format --check babel_jax tests benchmarks docs
	$(BIN)/mypy

# The documentation: build/docs/site/index.html.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/build.py

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# setuptools builds `promise`, which tensorflow-datasets needs and which has no wheel. A new environment of Python 3.11 has a setuptools
# that cannot build wheels, and one of Python 3.12 has none.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt editables hatchling setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	touch $@

# torch first and alone, at its exact version: the comparisons need no CUDA build of it.
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,reference]'
	touch $@

# Pins what pyproject.toml needs, for all extras, systems and versions of Python. Pins that are there stay; take one out to raise it.
constraints: | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make constraints" --output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .mypy_cache .ruff_cache

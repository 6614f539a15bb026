# make train   install what running needs into .venv and train on real images with four processes
# make test    install the rest too and run the test suite, a worker for each core
# make quick   one or two files of each subject, less what is slow: under three minutes
# make oldest  the suite with the oldest versions that pyproject.toml claims, in .oldest
# make check   lint, type-check, spell-check and build the documentation; changes nothing
# make docs    build the documentation into site/
# make dist    build wheel and source archive into dist/ and try both in clean environments
# make audit   cross-compile every Triton kernel and inspect the machine code; no GPU needed;
#              goes on where it was
# make compilers  the compiled loops by gcc and clang for three kinds of x86-64, and for aarch64
#              under qemu, against torch; names what is not installed
# make chaos   kill runs at random, and of any two options together; each must end with the same bits
# make soak    two hours of a run that is killed ten times: does it take more and more of anything?
# make mutants the code changed in random places, one at a time: do its quick tests see it?
# make gpu     whether all is right, small and fast on a GPU: gpu-report/, ten minutes
# make bench   all that the documentation shows measured at this revision, kept in
#              benchmarks/results/, its tables and pictures made of it; hours, resumable
# of Material for MkDocs, about a version to come
export NO_MKDOCS_2_WARNING := 1

PYTHON ?= python3
NPROC ?= 4
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed

.PHONY: train test quick oldest check docs dist audit compilers chaos soak mutants gpu bench install
.PHONY: clean

install: $(STAMP)

$(RUNS): pyproject.toml effdense/version.py
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(STAMP): $(RUNS)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

train: $(RUNS)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc_per_node $(NPROC) train_ddp.py $(ARGS)

# a worker for each core, of one thread: more would wait for each other
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
PYTEST += -n auto --maxprocesses 8 --dist worksteal

test: $(STAMP)
	$(PYTEST) $(ARGS)

QUICK := exactness/test_parity.py memory/test_estimation.py conversion/test_conversion.py kernels engine/test_config.py
QUICK += engine/test_shards.py engine/test_records.py benchmarks/test_gate.py project

quick: $(STAMP)
	$(PYTEST) -m 'not slow' $(QUICK:%=tests/%) $(ARGS)

oldest: $(STAMP)
	$(BIN)/python -m tests.project.oldest $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && \
	  PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m mkdocs build --strict --site-dir "$$site"

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --site-dir site

dist: $(STAMP)
	$(BIN)/python tests/project/release.py $(ARGS)

audit: $(STAMP)
	$(BIN)/python -m effdense.kernels.audit $(ARGS)

compilers: $(STAMP)
	$(BIN)/python -m pytest tests/kernels/compilers.py $(ARGS)

# by whatever Python has torch, Triton and pytest, or by ours
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

chaos: $(STAMP)
	PYTHONPATH=benchmarks $(BIN)/python -m tests.helpers.chaos --combinations $(ARGS)

soak: $(STAMP)
	PYTHONPATH=benchmarks $(BIN)/python -m tests.helpers.soak $(ARGS)

mutants: $(STAMP)
	PYTHONPATH=benchmarks $(BIN)/python -m tests.helpers.mutants $(ARGS)

# hours, at a revision that is committed; interrupted, it goes on where it was
bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py $(ARGS)
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build dist site *.egg-info

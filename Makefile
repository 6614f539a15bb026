# make train   install into .venv and train on real images with four processes
# make test    install into .venv and run the test suite
# make quick   what of the suite takes three minutes, of every subject
# make oldest  the suite with the oldest versions that pyproject.toml claims, in .oldest
# make check   lint, type-check and build the documentation; changes nothing
# make docs    build the documentation into site/
# make dist    build wheel and source archive into dist/ and try both in clean environments
# make audit   cross-compile every Triton kernel and inspect the machine code; no GPU needed
# make chaos   kill a short run fifty times at random; each must end with the same bits
# make bench   the runs behind the README's table
# make figures the committed pictures; benchmarks whose results/figures/*.csv is there are not run again
PYTHON ?= python3
NPROC ?= 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test quick oldest check docs dist audit chaos bench figures install clean

install: $(STAMP)

$(STAMP): pyproject.toml effdense/version.py
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

train: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc_per_node $(NPROC) train_ddp.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

quick: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

oldest: $(STAMP)
	$(BIN)/python tests/project/oldest.py $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && \
	  PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m mkdocs build --strict --site-dir "$$site"

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --site-dir site

dist: $(STAMP)
	$(BIN)/python tests/project/release.py $(ARGS)

audit: $(STAMP)
	$(BIN)/python -m effdense.kernels.audit $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m tests.helpers.chaos $(ARGS)

RACE := --providers naive naive-channels-last checkpoint effdense-bottlenecks effdense-features

bench: $(STAMP)
	$(BIN)/python benchmarks/memory.py --depth 250
	$(BIN)/python benchmarks/throughput.py --depth 100 --growth-rate 12 --batch-size 64 $(RACE)
	$(BIN)/python benchmarks/throughput.py --depth 250 --growth-rate 24 --batch-size 16 $(RACE)
	$(BIN)/python benchmarks/throughput.py --arch densenet121 --image-size 224 --batch-size 8 $(RACE)
	$(BIN)/python benchmarks/scaling.py --processes 1 2 4
	$(BIN)/python benchmarks/memory.py --sweep depth --growth-rate 12 --batch-size 8 --providers naive checkpoint effdense-bottlenecks effdense-features
	$(BIN)/python benchmarks/memory.py --depth 1000 --growth-rate 12 --batch-size 8 --memory-limit 8GiB --threads 1 --providers naive effdense-features effdense-input

# Each picture from its benchmark's rows; a benchmark that fails leaves none.
FIGURES := memory-depth throughput timeline convergence pareto estimates
ROWS := results/figures

.DELETE_ON_ERROR:

figures: $(FIGURES:%=benchmarks/figures/%.png)

benchmarks/figures/%.png: $(ROWS)/%.csv
	$(BIN)/python benchmarks/draw.py $(ROWS)/$**.csv --output $@

$(ROWS)/memory-depth.csv: | $(STAMP)
	$(BIN)/python benchmarks/memory.py --sweep depth --growth-rate 12 --batch-size 8 --providers naive checkpoint effdense-bottlenecks effdense-features --output $@

$(ROWS)/throughput.csv: | $(STAMP)
	$(BIN)/python benchmarks/throughput.py --depth 100 --growth-rate 12 --batch-size 64 $(RACE) --output $@
	$(BIN)/python benchmarks/throughput.py --depth 250 --growth-rate 24 --batch-size 16 $(RACE) --output $(ROWS)/throughput-2.csv
	$(BIN)/python benchmarks/throughput.py --arch densenet121 --image-size 224 --batch-size 8 $(RACE) --output $(ROWS)/throughput-3.csv

$(ROWS)/timeline.csv: | $(STAMP)
	$(BIN)/python benchmarks/timeline.py --output $@

$(ROWS)/convergence.csv: | $(STAMP)
	$(BIN)/python benchmarks/convergence.py --output $@

$(ROWS)/pareto.csv: | $(STAMP)
	$(BIN)/python benchmarks/pareto.py --depth 250 --growth-rate 24 --batch-size 16 --steps 1 --output $@

# predictions that miss are drawn too
$(ROWS)/estimates.csv: | $(STAMP)
	-$(BIN)/python benchmarks/estimates.py --output $@

clean:
	rm -rf $(VENV) build dist site *.egg-info

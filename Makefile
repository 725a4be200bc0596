# Every target uses .venv, which scvi-init.sh creates or updates if necessary.
# PYTHON=python3.13 (or a path) creates .venv again with that Python.

DATA ?= ../shared/data
BENCH ?= bench
SEEDS ?= $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help env demo test fuzz lint notebooks bench bench-train bench-scale-out bench-index bench-blood bench-annotation

# One worker per core, at most four: each has torch and scvi-tools in memory. nproc would heed OMP_NUM_THREADS.
WORKERS := $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# The workers use all cores: more threads would wait for each other.
ONE_THREAD := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

help: ## list the targets; `census-scvi --help` lists the commands of the pipeline
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

env: ## create or update .venv (scvi-init.sh); the other targets do it, too
	@PYTHON="$(PYTHON)" ./scvi-init.sh

demo: env ## the whole pipeline on a small simulated Census
	.venv/bin/python -m census_scvi.stages.demo

notebooks: env ## run the notebooks on the results of `make demo` and save their output
	.venv/bin/python notebooks/execute.py

# Each worker starts with neighbouring tests, which share their module's fixtures; idle workers take over tests of others.
test: env ## all tests; passes on PYTEST_ARGS="-k name -x"
	$(ONE_THREAD) .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# New examples for every seed; add a failing one, which is printed, to its test as an @example.
fuzz: env ## property-based tests with new random examples; passes on SEEDS="1 2 3" and PYTEST_ARGS="tests/test_hvg.py"
	@for seed in $(SEEDS); do echo "seed $$seed"; \
	  $(ONE_THREAD) .venv/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -m hypothesis \
	    --hypothesis-profile=fuzz --hypothesis-seed=$$seed $(PYTEST_ARGS) || exit 1; done

lint: env ## ruff and mypy
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

bench: env ## speed and memory compared with other libraries (docs/performance.md), in BENCH=folder; 10 GB, 40 minutes
	.venv/bin/python -c 'import scdataset, tiledbsoma_ml' 2>/dev/null || .venv/bin/python -m pip install -q -e '.[bench]'
	.venv/bin/python benchmarks/scale.py --folder $(BENCH) $(if $(ANNBATCH),--annbatch $(ANNBATCH))
	.venv/bin/python benchmarks/stages.py --census $(BENCH)/census --folder $(BENCH)/stages --cells 50000 200000
	.venv/bin/python benchmarks/coding.py $(BENCH)/prepared/anndata_model.h5ad
	.venv/bin/python benchmarks/shuffle.py $(BENCH)/prepared/anndata_model.h5ad

bench-train: env ## speed of training compared with scvi-tools (docs/performance.md), in BENCH=folder; 15 minutes on a CPU
	.venv/bin/python benchmarks/train_step.py --folder $(BENCH)

bench-scale-out: env ## cost of parts and workers, memory with many cells (docs/scaling.md), in BENCH=folder; an hour on two cores
	.venv/bin/python benchmarks/scale_out.py --folder $(BENCH)/scale-out
	.venv/bin/python benchmarks/many_cells.py --folder $(BENCH)/many-cells

bench-index: env ## build and search an index for nearest cells, compared with other libraries (docs/nearest-cells.md); 15 minutes
	.venv/bin/python -c 'import usearch' 2>/dev/null || .venv/bin/python -m pip install -q -e '.[bench]'
	.venv/bin/python benchmarks/nearest_cells.py --folder $(BENCH)/nearest-cells

bench-blood: env ## label transfer on real blood cells (docs/blood.md), DATA=folder of the .h5ad files; 20 minutes
	.venv/bin/python benchmarks/label_transfer.py --data $(DATA)

bench-annotation: env ## annotation of real blood and pancreas (docs/annotation.md), DATA=folder of the .h5ad files; three hours
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/annotation.py --data $(DATA)

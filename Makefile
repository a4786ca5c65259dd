# make quickstart   install, compress the laboratory teacher on local Ray, print the table and the report's path
# make test         install, then run every test; ARGS="tests/unit -x" goes to pytest instead
# make fast         only the tests that start neither Ray nor an engine
# make bench        every benchmark; those that compare with a peer's package make .venv-bench for it
# Python 3.11 or newer. A GPU is detected; PLATFORM=cpu or PLATFORM=gpu overrides.

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
PLATFORM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STORE ?= .sdft
LAB := build/lab
BIN := $(VENV)/bin
UV := $(BIN)/uv

# uv does not read pip's variable for extra wheels. With such a folder torch's CPU build comes from there,
# otherwise from PyTorch's own index.
LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
ifneq ($(LINKS),)
SOURCES := $(foreach link,$(LINKS),--find-links $(link))
else ifeq ($(PLATFORM),cpu)
SOURCES := --torch-backend=cpu
else
SOURCES := --torch-backend=auto
endif
BENCH_SOURCES := $(if $(LINKS),$(SOURCES),--torch-backend=cpu)
OVERRIDES := $(if $(filter cpu,$(PLATFORM)),--override requirements/overrides.txt)
INSTALL := $(UV) pip install --quiet --python $(BIN)/python $(SOURCES) $(OVERRIDES)

# Ray starts a dozen Python processes; without cached bytecode each of them compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test fast check bench bench-env pins install dev clean
.DEFAULT_GOAL := quickstart

install: $(VENV)/.installed-$(PLATFORM)
dev: $(VENV)/.installed-dev

$(UV): requirements/uv.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/uv.txt
	@touch $(UV)

$(VENV)/.installed-$(PLATFORM): requirements/$(PLATFORM).txt requirements/overrides.txt pyproject.toml | $(UV)
	@echo "Installing exact pins for $(PLATFORM) into $(VENV) ..."
	$(INSTALL) -r requirements/$(PLATFORM).txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: requirements/dev.txt $(VENV)/.installed-$(PLATFORM)
	$(INSTALL) -r requirements/$(PLATFORM).txt -r requirements/dev.txt
	@touch $@

quickstart: install
	@$(BIN)/sdft lab export $(LAB) --quiet
	@$(BIN)/sdft compress $(LAB)/quickstart.yaml --store $(STORE) --name quickstart

# Two processes share the tests. Those that start engines or Ray come last: they wait a lot and may do it together,
# but for services, whose engines need the whole machine.
test: dev
ifdef ARGS
	$(BIN)/pytest $(ARGS)
else
	$(MAKE) --no-print-directory fast
	$(BIN)/pytest -n 2 --dist loadfile -m "slow or ray" --ignore=tests/serve
	$(BIN)/pytest -m "slow or ray" tests/serve
endif

fast: dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not ray and not gpu"

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Peers' packages, apart from ours. They are pinned to the CPU build of torch: on a GPU no peer is measured.
bench-env: $(BENCH_VENV)/.installed

$(BENCH_VENV)/.installed: requirements/bench.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(BIN)/python $(BENCH_VENV)
	$(UV) pip install --quiet --python $(BENCH_VENV)/bin/python $(BENCH_SOURCES) -r requirements/bench.txt
	@touch $@

bench: dev bench-env
	@for script in jobs/bench/*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

# Exact pins of what pyproject.toml and the *.in files ask for. No registry host is written into them. The tools take
# either platform's setuptools, which differ.
PIN := $(UV) pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links --python-version 3.11 \
	-c requirements/constraints.txt
ASKED := pyproject.toml --extra serve --extra eval
pins: $(UV)
	$(PIN) $(SOURCES) --override requirements/overrides.txt $(ASKED) --extra cpu -o requirements/cpu.txt
	$(PIN) $(ASKED) --extra gpu -o requirements/gpu.txt
	$(PIN) -c requirements/cpu.txt --no-emit-package setuptools requirements/dev.in -o requirements/dev.txt
	grep -v '^setuptools==' requirements/cpu.txt | $(PIN) $(BENCH_SOURCES) -c - requirements/bench.in -o requirements/bench.txt

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(LAB)

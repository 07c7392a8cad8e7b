# make demo and make test set everything up in .venv on a fresh machine: Python >= 3.11 (with venv),
# make and a C compiler are all they need. `make help` lists the targets.

# The interpreter that .venv is made from: the first of these that is new enough.
PYTHON ?= python3.11 python3.12 python3.13 python3

BIN := .venv/bin
NEEDS_SERVICES := services or slow
ON_ITS_OWN := tests/test_docker_image.py
# Tests run beside each other in processes of one thread: two threads that wait for each other lose more.
WORKERS ?= 2
# Of files that share what they have made, one after another. A process that dies ends it all: xdist gives one
# in its place nothing to do, and waits for it.
BY_FILE := --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --ignore=$(ON_ITS_OWN)
# A number that any other commit has another of; without Git the hour.
COMMIT = $$(printf %d 0x$$(git rev-parse --short=7 HEAD 2>/dev/null | cut -c1-7 | grep . || date +%H))

.DEFAULT_GOAL := help
STUDIES := $(filter-out lab,$(notdir $(basename $(wildcard studies/[a-z]*.py)) $(patsubst %/__main__.py,%,$(wildcard studies/*/__main__.py))))

.PHONY: help demo test test-ci test-all test-docker bench studies docs lint format install clean

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: install  ## a search on an embedded texture, without labels, then judged with them
	@$(BIN)/ssad-hpo demo

test: lint  ## style, types and all tests that need no service
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal --max-worker-restart 0 -m "not ($(NEEDS_SERVICES))"

test-ci: test  ## make test, then an eighth of the tests that test-all adds, another one with each commit
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(BY_FILE) -m "$(NEEDS_SERVICES)" --part $(COMMIT)/8 --durations=10

test-all: test  ## make test, then the slow tests and those that need services
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(BY_FILE) -m "$(NEEDS_SERVICES)"

# Not part of test-all: it needs root, Debian's packages and some 11 minutes, and starts a Docker engine.
test-docker: install  ## build docker/'s image and run its services; skipped, with the reason, where that cannot be
	@$(BIN)/pytest -v -s --durations=12 $(ON_ITS_OWN)

# The first run on a machine is kept in .benchmarks; minima, since what disturbs a run only adds to it.
bench: install  ## time the hot functions; fails where one takes 1.5 times as long as in the first run here
	@if ls .benchmarks/*/*_baseline.json >/dev/null 2>&1; \
	then how="--benchmark-compare --benchmark-compare-fail=min:50%"; else how="--benchmark-save=baseline"; fi; \
	$(BIN)/pytest tests/benchmarks/bench_hot.py $$how --benchmark-columns=min,median,stddev,rounds

studies: install  ## every study of studies/README.md in its smallest form, into runs/smoke
	@for study in $(STUDIES); do echo "studies.$$study"; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m studies.$$study --smoke || exit 1; done

docs: install  ## the documentation as pages, docs/_build/index.html
	@$(BIN)/python -m sphinx -W -q docs docs/_build && echo "docs/_build/index.html"

lint: install  ## ruff, mypy, and what docker/ holds
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint docker/Dockerfile
	@$(BIN)/check-jsonschema -q --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.cuda.yaml

format: install  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

install: .venv/.installed  ## the virtual environment

.venv/.installed: pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHON); do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then echo "Python 3.11 or newer with its venv module is needed, and none of" \
	  "these is: $(PYTHON). Install one (Debian: apt-get install python3-venv) or name it:" \
	  "make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "installing into .venv, about 2 minutes (6.6 GB on Linux, most of it PyTorch)"; \
	$$python -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch torchvision
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove what make made: .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks build dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

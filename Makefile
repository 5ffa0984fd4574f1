# make test         after each change: lint, types, documentation, doctests, the demo and all tests that are not slow
# make test-all     the same with the slow tests, the real tasks of ../shared and coverage; what .ci/run calls
# make test-oldest  the tests with the lowest versions that pyproject.toml declares
# make setup | lint | types | docs | doctest | demo | dist | campaign | golden | clean
.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PY := .venv/bin/python
STAMP := .venv/.stamp
OLDEST := .venv-oldest
CODE := $(wildcard src tests benchmarks)
# What test-all leaves out. The real tasks of ../shared run where it is there and skip where it is not.
MARKS ?= not gpu
# A worker per core, 8 at most: each takes 1 GB. Tests move to a worker that is idle, those of a file together.
WORKERS := -n logical --maxprocesses 8 --dist worksteal
# From make 4.0 on, what runs beside each other prints in one piece each.
SYNC := $(if $(findstring output-sync,$(.FEATURES)),--output-sync)

.PHONY: setup demo lint types docs doctest checks test test-all test-oldest dist campaign golden clean

setup: $(STAMP)

# A python that is on the PATH may be a shim that does not run, so each is asked for its version. 3.11 comes first: it
# is what the pinned torch has a CPU wheel for where one is at hand.
$(STAMP): pyproject.toml constraints.txt
	@runs() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if ! runs $(PY); then \
	  found=; \
	  for python in python3.11 python3.12 python3.13 python3; do \
	    if runs "$$python"; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "calque needs Python 3.11 or newer; none of python3.11, python3.12, python3.13, python3 is." >&2; exit 1; fi; \
	  "$$found" -m venv --clear .venv; \
	fi
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[demo,plot,openvino,qonnx,dev,docs]' --constraint constraints.txt
	@touch $@

demo: setup
	$(PY) -m calque demo

lint: setup
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)

types: setup
	$(PY) -m mypy $(CODE)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --site-dir site

doctest: setup
	$(PY) -m pytest --doctest-modules --quiet src

# What is no test of pytest's, two at a time.
checks: setup
	@$(MAKE) --no-print-directory -j2 $(SYNC) lint types docs demo

# pytest runs last: its closing line is the last line of the output.
test: checks
	$(PY) -m pytest $(WORKERS) --doctest-modules -m "not slow and not gpu and not real" -r fE src tests

test-all: checks
	$(PY) -m pytest $(WORKERS) --doctest-modules -m "$(MARKS)" --cov --cov-report=term src tests

# Builds the sdist, the wheel from it, and installs that with what it needs where nothing is installed; minutes.
dist: setup
	rm -rf dist .venv-dist
	$(PY) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check build
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl --constraint constraints.txt
	cd dist && ../.venv-dist/bin/python -I -m calque --version && ../.venv-dist/bin/calque doctor
	rm -rf .venv-dist

# The lowest versions that pyproject.toml declares, in an environment of its own (5 GB: torch brings CUDA's packages).
test-oldest: $(OLDEST)/.stamp
	$(OLDEST)/bin/python -m pytest $(WORKERS) -m "not slow and not gpu and not real" -p no:cacheprovider

$(OLDEST)/.stamp: $(STAMP) pyproject.toml constraints-oldest.txt
	$(PY) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,plot,dev]' --constraint constraints-oldest.txt
	@touch $@

# What may never go wrong, tried for ten minutes; writes docs/reliability.md.
campaign: setup
	nice $(PY) -m tests.campaign

# Whether codes, scales and biases are the recorded ones, bit for bit; RECORD=--record writes those of this machine.
golden: setup
	PYTHONPATH=tests $(PY) -m golden $(RECORD)

clean:
	rm -rf .venv-dist site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage src/*.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

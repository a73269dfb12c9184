# make demo: install and run the whole pipeline; make demo-lm: the same on a small language model; make test: install with test
# extras and test; make test-fast: without the tests that take long; make exhaustive: the few that try every moment.
# Paths are relative throughout, so that a checkout's own path may hold spaces.
PYTHON ?= python3.11
PIP = .venv/bin/python -m pip --disable-pip-version-check

# The paper authors' own code, for the one test that compares with it; it asks for Python 3.12 and runs on 3.11. Where it
# cannot be had, that test says so and is skipped.
PEER = $(PIP) install -q --no-deps --ignore-requires-python explaind==0.1.0 tqdm==4.70.1 || true

.PHONY: demo demo-lm test test-fast exhaustive zoo fuzz chaos lint types check clean
.DELETE_ON_ERROR:

demo: .venv/installed
	.venv/bin/python -m prunekit run recipes/demo.yaml --out runs/demo

demo-lm: .venv/installed-lm
	.venv/bin/python -m prunekit run recipes/stdlib-llama-small.yaml --out runs/stdlib-llama-small

test: .venv/installed-test
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not exhaustive"

exhaustive: .venv/installed-test
	.venv/bin/python -m pytest -n auto --dist worksteal -m exhaustive

test-fast: .venv/installed-test
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not slow and not exhaustive"

# Kinds of real models × steps, written to docs/zoo.md (a fast selection of it is part of make test), and tasks × verbs, written
# to docs/tasks.md.
zoo: .venv/installed-test
	.venv/bin/python -m benchmarks.zoo
	.venv/bin/python -m benchmarks.zoo.verbs

# Files that were changed, and processes that are killed, at every operation and at random moments: more than make test tries.
fuzz: .venv/installed-test
	.venv/bin/python -m tests.faults.fuzz 10000

chaos: .venv/installed-test
	.venv/bin/python -m tests.faults.kill
	.venv/bin/python -m tests.faults.kill --full-disk
	.venv/bin/python -m tests.faults.kill --random 10
	.venv/bin/python -m tests.faults.kill_ranks
	.venv/bin/python -m tests.faults.chaos

lint: .venv/installed-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: .venv/installed-dev
	.venv/bin/python -m mypy

check: test exhaustive lint types

clean:
	rm -rf .venv build dist

.venv/python: Makefile
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	@touch $@

.venv/installed-lm: .venv/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e ".[report,hf]"
	@touch $@

.venv/installed-test: .venv/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e ".[test]"
	$(PEER)
	@touch $@ .venv/installed .venv/installed-lm

.venv/installed-dev: .venv/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e ".[test,dev]"
	$(PEER)
	@touch $@ .venv/installed .venv/installed-lm .venv/installed-test

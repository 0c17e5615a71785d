# `make` alone lists the targets. Everything runs inside .venv, which the first target makes from $(PYTHON).
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
# Flags for pip, e.g. PIP_FLAGS="--extra-index-url URL" where torch should come from a CPU-only index.
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK_VENV := .venv-lock
TORCH_FILE := $(VENV)/torch
EXTRAS := demo,plots,ray,test,dev
LOCKS := requirements.lock requirements-extras.lock requirements-cuda.lock
# Without dependencies: what no lock names is not fetched unseen.
VERIFIED = $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --require-hashes
REFUSED = { echo "not what the locks pin: if a hash doesn't match, the head of requirements.lock says why" >&2; exit 1; }
# For `make lock`, the packages that may change: UPGRADE="redis torch" or UPGRADE=all.
UPGRADE ?=
# For pip-audit, e.g. AUDIT_FLAGS="--vulnerability-service osv".
AUDIT_FLAGS ?=
TORCH := 2.13.0
TRITON := 3.7.1
FEAST_VENV := .venv-feast
FEAST := 0.67.0
PEERS := litserve==0.2.19 bentoml==1.4.40 mlserver==1.7.1
PEERS_VENV := .venv-peers
PEERS_PYTHONS = $(foreach peer,$(PEERS),--peer $(firstword $(subst ==, ,$(peer)))=$(PEERS_VENV)-$(firstword $(subst ==, ,$(peer)))/bin/python)
# For its command, e.g. PEERS_FLAGS="--quick --json FILE".
PEERS_FLAGS ?=
# For `make fuzz`, e.g. FUZZ_FLAGS="--seed 5".
FUZZ_FLAGS ?=
# For `make bench`, e.g. BENCH_FLAGS="--out docs/bench".
BENCH_FLAGS ?=
# For `make chaos`, e.g. CHAOS_FLAGS="--only overload".
CHAOS_FLAGS ?=
# For `make soak`, e.g. SOAK_FLAGS="--seconds 120".
SOAK_FLAGS ?=
# What `model` needs, as the lock has it; everything else in a peer's environment is what the peer asks for.
PEERS_SHARED := hiredis|httptools|numpy|orjson|polars|pyarrow|redis|safetensors|torch|typer|uvloop|xxhash

# What lint and types look at; a folder that does not exist yet is left out.
CODE := $(wildcard model service cache_builder loadtest tests scripts)

LOADTEST_HOST ?= http://127.0.0.1:8000
LOADTEST_STORE ?= redis://127.0.0.1:6390/0
LOADTEST_BUNDLES ?= .demo/bundles
LOADTEST_USERS ?= 8
LOADTEST_SECONDS ?= 30

.PHONY: help setup demo serve test coverage check bench bench-gpu bench-builder bench-feast bench-peers bench-skewed chaos soak fuzz format loadtest lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# torch by itself, in two steps: with hashes, pip prefers a file whose hash an index says to one in a folder, so that a
# CPU build which lies there would lose to several GB from the index.
setup: $(READY) ## make .venv and install the locked dependencies

$(READY): $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "found $$($(PYTHON) --version), wanted 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	rm -rf $(TORCH_FILE)
	$(BIN)/python -m pip download --quiet $(PIP_FLAGS) --no-deps --only-binary :all: --dest $(TORCH_FILE) \
	    $$(grep -oE '^torch==[^ ]+' requirements.lock)
	sed -n '/^torch==/,/[^\\]$$/p' requirements.lock > $(TORCH_FILE)/torch.lock
	$(VERIFIED) --no-index --find-links $(TORCH_FILE) -r $(TORCH_FILE)/torch.lock || $(REFUSED)
	rm -r $(TORCH_FILE)
	$(VERIFIED) -r requirements.lock -r requirements-extras.lock || $(REFUSED)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@if grep '^torch .* requires \(cuda\|nvidia\)-' <($(BIN)/python -m pip check); then \
	    echo 'torch is a CUDA build: installing its libraries'; \
	    $(VERIFIED) -r requirements-cuda.lock || $(REFUSED); \
	fi
	@$(BIN)/python -m pip check || { \
	    echo 'the locks are of Python 3.11 on Linux and miss this: installing it without hashes' >&2; \
	    $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-build-isolation -e '.[$(EXTRAS)]'; }
	@touch $@

demo: $(READY) ## train, build and score real data from nothing, then exit
	$(BIN)/python scripts/demo.py

serve: $(READY) ## serve what `make demo` built on 127.0.0.1:8000 until Ctrl-C
	@exec $(BIN)/python scripts/serve.py

# Two at a time: many of them wait more than they compute, and one after another takes 20 minutes.
test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

# By itself: to count every line costs half as much again, and the processes under test are slower to start and to stop.
coverage: $(READY) ## run the tests and report which lines they miss
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term

# The audit ends with 75 where nobody answers for known vulnerabilities, and says so.
check: $(READY) ## formatting, lint, types, import contracts, known vulnerabilities
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports
	$(BIN)/python scripts/audit.py $(LOCKS) -- $(AUDIT_FLAGS) || test $$? = 75

format: $(READY) ## rewrite the code as `make check` wants it
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: $(READY) ## measure the scorer beside DIN, every method and its own matrix products, about five minutes
	$(BIN)/python -m loadtest.bench $(BENCH_FLAGS)

bench-gpu: $(READY) ## measure the fused head beside a GPU's own ceilings; without a GPU, check it in Triton's interpreter
	$(BIN)/python -m loadtest.bench_gpu

bench-builder: $(READY) ## measure a cache build beside its parts, about ten minutes and 12 GB of memory
	$(BIN)/python scripts/bench_builder.py --order grouped
	$(BIN)/python scripts/bench_builder.py --order shuffled --loop 0
	$(BIN)/python scripts/bench_builder.py --users 2000 --rows 10000 --loop 100
	$(BIN)/python scripts/bench_builder.py --users 2000 --rows 10000 --order shuffled --loop 0
	$(BIN)/python scripts/bench_builder.py --memory

bench-feast: $(READY) ## measure a cache build beside Feast's materialize, which gets an environment of its own
	test -x $(FEAST_VENV)/bin/pip || $(PYTHON) -m venv $(FEAST_VENV)
	$(FEAST_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) 'feast[redis]==$(FEAST)'
	$(BIN)/python -m scripts.bench_feast --feast-python $(FEAST_VENV)/bin/python

# With its own environment each, for their dependencies are neither ours nor each other's.
bench-peers: $(READY) ## measure the service beside LitServe, BentoML, MLServer and plain FastAPI, about 12 minutes
	for peer in $(PEERS); do \
	    venv=$(PEERS_VENV)-$${peer%%==*}; \
	    test -x $$venv/bin/pip || $(PYTHON) -m venv $$venv; \
	    $$venv/bin/python -m pip install --quiet $(PIP_FLAGS) $$peer \
	        $$(grep -oE '^($(PEERS_SHARED))==[^ ]+' requirements.lock); \
	done
	$(BIN)/python -m loadtest.peers.run $(PEERS_PYTHONS) $(PEERS_FLAGS)

bench-skewed: $(READY) ## measure what resident users save under skewed traffic, about 3 minutes
	$(BIN)/python -m loadtest.skewed

chaos: $(READY) ## overload the service, break its store, hang up on it; every answer checked, under ten minutes
	$(BIN)/python -m loadtest.chaos --out docs/reliability $(CHAOS_FLAGS)

soak: $(READY) ## load the service at 70 % of its capacity for ten minutes and see whether it grows
	$(BIN)/python -m loadtest.chaos.soak --out docs/reliability $(SOAK_FLAGS)

fuzz: $(READY) ## ask what no client asks, over a store with damaged records, about 7 minutes
	$(BIN)/python -m tests.fuzz $(FUZZ_FLAGS)

loadtest: $(READY) ## load what `make serve` serves for 30 s, print percentiles, fail on any wrong answer
	LREA_STORE_URL=$(LOADTEST_STORE) LREA_BUNDLES_DIR=$(LOADTEST_BUNDLES) $(BIN)/locust -f loadtest/locustfile.py \
	    --headless --only-summary --exit-code-on-error 1 --host $(LOADTEST_HOST) \
	    --users $(LOADTEST_USERS) --spawn-rate $(LOADTEST_USERS) --run-time $(LOADTEST_SECONDS)s

# A fresh environment, so that its pip is that of $(PYTHON). torch is named, for its newest release is not always the one
# that was measured. Triton is named too: tests need it beside a CPU build, and it has to be the one that torch's CUDA
# builds pin.
lock: ## write the locks anew from what pyproject.toml asks for, keeping every version but UPGRADE's
	rm -rf $(LOCK_VENV)
	$(PYTHON) -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python scripts/lock.py --extras '$(EXTRAS)' --upgrade '$(UPGRADE)' --pip-flags='$(PIP_FLAGS)' \
	    torch==$(TORCH) triton==$(TRITON)
	rm -rf $(LOCK_VENV)

clean: ## remove .venv, caches and what the demo made
	rm -rf $(VENV) $(LOCK_VENV) $(FEAST_VENV) $(PEERS_VENV)-* .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two commands do everything: `make up` starts the platform, `make test` runs every test that a laptop can run.
# Both install what they need; nothing else has to be there but Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data
HOST ?= 127.0.0.1
PORT ?= 7400
PYTEST_ARGS ?=
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup up lock generate check format test test-servers cluster cluster-down test-kubernetes bench clean

##@ Use
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: setup ## Start the platform on embedded defaults (DATA=data HOST=127.0.0.1 PORT=7400)
	@$(BIN)/ekiben up --data "$(DATA)" --host "$(HOST)" --port "$(PORT)"

##@ Develop
setup: $(VENV)/.ready ## Make the virtual environment with everything at its locked version

$(VENV)/.ready: requirements.lock pyproject.toml hatch_build.py services/gateway/capture.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.12, say.")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

lock: ## Resolve requirements.lock anew
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --group pyproject.toml:dev pyproject.toml --generate-hashes --no-emit-index-url --no-header --output-file requirements.lock

generate: setup ## Generate the Python code of the protos, docs/settings.md, docs/errors.md and the Kustomize base
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/generate.py
	@$(BIN)/python tools/document.py
	@$(BIN)/python tools/kustomize.py

format: setup ## Format and mend what a tool can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

check: setup ## Format, lint, types, import contracts, protos, generated code and pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/generate.py --check
	$(BIN)/python tools/document.py --check
	$(BIN)/python tools/histories.py
	$(BIN)/python tools/kustomize.py --check

test-servers: ## Install the real servers that tests start (PostgreSQL, promtool by apt, an S3 server, an OCI registry and its conformance suite by Go), where these are
	@PYTHON="$(PYTHON)" sh tools/install-test-servers.sh

test: setup test-servers ## Run every test that this machine can run (WORKERS=2 at a time)
	$(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

cluster: setup ## Start a real Kubernetes of two nodes on this machine (root; builds it the first time)
	@$(BIN)/python -m tests.cluster up

cluster-down: setup ## Take that away
	@$(BIN)/python -m tests.cluster down

test-kubernetes: setup ## Run the tests that need a real Kubernetes, which they start (root; some fifteen minutes the first time)
	EKIBEN_TEST_KUBERNETES=1 $(BIN)/pytest tests/kubernetes $(PYTEST_ARGS)

bench: setup ## Run the benchmarks, each beside its peer (see benchmarks/README.md)
	$(BIN)/python -m benchmarks

clean: ## Remove the virtual environment and caches, never data
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

# Each target sets up .venv by itself when it is missing or older than pyproject.toml or constraints.txt.
PYTHON ?= python3
PRESET ?= smoke
OVERRIDES ?= {}
export OVERRIDES

VENV := .venv
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench

.PHONY: setup release test serve bench lint format help
.DEFAULT_GOAL := help

help:  ## List what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## Set up .venv and nothing else

release: $(READY)  ## Make and publish a release: make release PRESET=smoke OVERRIDES='{"train": {"steps": 8000}}'
	@$(VENV)/bin/python -m flows.release_model --preset "$(PRESET)" --overrides "$$OVERRIDES" $(if $(KEEP_RESULTS),--keep-results)

test: $(READY)  ## Run the whole test suite
	@$(VENV)/bin/python -m pytest

serve: $(READY)  ## Start Prefect's server, a work pool, a worker and every deployment, until Ctrl-C
	@$(VENV)/bin/python -m deployments.serve

bench: $(BENCH_READY)  ## Run every benchmark, shortly: whether they work, no figures to quote
	@set -e; for script in $$(grep -l '^if __name__ == ' benchmarks/*.py benchmarks/*/__main__.py | sed -E 's,benchmarks/([a-z0-9_]+)[./].*,\1,'); do \
	  echo "benchmarks.$$script"; $(VENV)/bin/python -m benchmarks.$$script --quick; \
	done

lint: $(READY)  ## Check style, the directions of imports, and types
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports && $(VENV)/bin/pyright

format: $(READY)  ## Format the code
	@$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} is too old; 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@echo "Setting up $(VENV): PyTorch alone is several gigabytes, so the first time takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BENCH_READY): $(READY)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

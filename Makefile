# `make demo` and `make test` are all that a newcomer needs; each installs into .venv first, where that has not been done.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CUT    := $(VENV)/.installing
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv and install everything into it (once, and again when the requirements change)

demo: $(STAMP)  ## pretrain two towers, put each into a LLaVA, compare them (SMOKE=1: the same path in under 3 minutes)
	$(BIN)/clips-llava demo $(if $(filter-out 0,$(SMOKE)),--smoke)

test: $(STAMP)  ## format, lint and type checks, then the tests but the slow ones
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-slow: $(STAMP)  ## the slow tests: the built wheel elsewhere, other versions, the original LLaVA, whole runs
	@$(PIP) -r requirements/slow.txt -r requirements/bench.txt
	$(BIN)/pytest -m slow

bench: $(STAMP)  ## measure the hot paths on this machine
	@$(PIP) -r requirements/bench.txt
	@set -e; for script in scripts/bench/*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The marker .installing stands while pip works. Found here, it means that an earlier install was cut off, perhaps in the
# middle of a package, which pip would not notice: so that one starts from nothing. Changed requirements do not.
$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d, and 3.11 or newer is needed; if you have one, name it: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" % v[:2])'
	@if [ -e $(CUT) ]; then echo "An earlier install was cut off: starting again."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(CUT)
	@echo "[1/4] virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/4] clips-llava, torch and transformers: up to 6 GB, a minute or two on a fast line"
	@$(PIP) -e .
	@echo "[3/4] what training at scale, the evaluation, the chat page and the tests import"
	@DS_BUILD_OPS=0 $(PIP) -r requirements/train.txt -r requirements/eval.txt -r requirements/chat.txt -r requirements/test.txt
	@echo "[4/4] lmms-eval and SmolLM2-135M"
	@$(PIP) --no-deps -r requirements/nodeps.txt
	@mv $(CUT) $(STAMP) && touch $(STAMP)

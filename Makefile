# Two commands work on a bare machine with Python 3.11 or newer: `make demo` and `make test`.
# The environment is made in .venv: a venv, then uv inside it, then the versions of constraints.txt.

PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
# The core, without what starts processes or makes networks at random.
CORE := $(filter-out %random_models.py %processes.py %distributed.py,$(wildcard tests/fisher/test_*.py tests/test_*.py))
READY := .venv/.ready
DEMO_READY := .venv/.ready-demo

.PHONY: help demo test test-fast test-slow test-oldest lint format docs bench clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(DEMO_READY): EXTRAS := experiments
$(READY): EXTRAS := experiments,integrations,dev
$(READY) $(DEMO_READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "gradmask needs Python 3.11 or newer; none was found. Install it, or name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "Preparing .venv (first run only; PyTorch is a download of a few GB) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(DEMO_READY) ## train on real digits with and without the mask, print the table (2 minutes)
	$(BIN)/gradmask run demo

test: $(READY) ## run the tests, two at a time
	$(BIN)/pytest -n 2 --dist worksteal

test-fast: $(READY) ## run the tests of the core: Fisher information, masks, scores (a minute)
	$(BIN)/pytest -n 2 --dist worksteal $(CORE)

test-slow: $(READY) ## run every test, the long ones too
	$(BIN)/pytest -m ""

test-oldest: $(READY) ## run the tests with the oldest versions that pyproject.toml allows
	$(BIN)/uv venv --quiet --allow-existing --python 3.11 .venv-oldest
	$(BIN)/uv pip install --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[experiments,integrations,dev]'
	.venv-oldest/bin/pytest -n 2 --dist worksteal

lint: $(READY) ## ruff, mypy, and the forms of what GitHub and reference managers read
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the documentation, build/docs/index.html; a warning or a broken link is an error
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build -W --keep-going -n -E -q -c docs -d build/docs-cache . build/docs

bench: $(READY) ## measure speed and memory, with other libraries beside
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[peers]'
	$(BIN)/gradmask bench fisher --model resnet18
	$(BIN)/gradmask bench fisher --model small_cnn
	$(BIN)/gradmask bench fisher --model mlp
	$(BIN)/gradmask bench fisher --model encoder
	$(BIN)/gradmask bench fisher --model lenet
	$(BIN)/gradmask bench fisher --model mobilenet_v2
	$(BIN)/gradmask bench online --model gpt2
	$(BIN)/gradmask bench layers
	$(BIN)/gradmask bench influence --rounds 1
	$(BIN)/gradmask bench step
	$(BIN)/gradmask bench threshold
	$(BIN)/gradmask bench loop --steps 3
	$(BIN)/gradmask bench loading
	$(BIN)/gradmask bench processes

clean: ## remove the environment and caches
	rm -rf .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache build dist

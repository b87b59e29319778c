# Two commands do everything on a fresh clone: `make quickstart` and `make test`. Both create .venv by themselves.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
DEMO := quickstart
TRANSLATE := translate

.PHONY: help quickstart translate-demo test style check bench clean flare-demo docs docs-test

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.created:
	@echo "== Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=/path/to/python3.11 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.created pyproject.toml constraints.txt
	@echo "== Installing solarchip_hf for use (about two minutes, 2 GB, versions of constraints.txt)"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[sunpy,train,translation]'
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "== Installing what the tests need besides"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.style: $(VENV)/.created pyproject.toml constraints.txt
	@echo "== Installing the linters"
	@$(PIP) install --quiet --constraint constraints.txt ruff mypy
	@touch $@

quickstart: $(VENV)/.run  ## Draw a small synthetic Sun, pretrain on it, load it back, print retrieval (10 minutes, 2 cores)
	@echo "== 1/3 Drawing a synthetic archive as FITS files: $(DEMO)/archive"
	@$(BIN)/python examples/draw_synthetic_archive.py --output $(DEMO)/archive --modalities hmi 171 193 304 --workers 2 \
	    --start 2012-06-01 --end 2015-09-14 --cadence 2D
	@echo "   ... and the held-out season"
	@$(BIN)/python examples/draw_synthetic_archive.py --output $(DEMO)/archive --modalities hmi 171 193 304 --workers 2 \
	    --start 2015-11-01 --end 2015-11-25 --cadence 6h
	@echo "== 2/3 Pretraining: examples/configs/quickstart.yaml"
	@$(BIN)/accelerate launch --config_file examples/accelerate/cpu.yaml examples/pretrain.py examples/configs/quickstart.yaml
	@echo "== 3/3 Loading the saved model with AutoModel"
	@$(BIN)/python examples/extract_features.py $(DEMO)/solarchip/vit-tiny $$(find $(DEMO)/archive -name 'AIA*_0171.fits' | sort | tail -n 1) $$(find $(DEMO)/archive -name 'hmi*.fits' | sort | tail -n 1)
	@echo "== Done. The model, the retrieval table and the figures are in $(DEMO)/solarchip/vit-tiny"

translate-demo: $(VENV)/.run  ## Translate synthetic magnetograms to 171 and back by ControlNet (20 minutes, 2 cores)
	@echo "== 1/6 Drawing a synthetic archive as FITS files: $(TRANSLATE)/archive"
	@$(BIN)/python examples/draw_synthetic_archive.py --output $(TRANSLATE)/archive --modalities hmi 171 --size 64 --workers 2 \
	    --start 2012-06-01 --end 2015-09-14 --cadence 12h --seed 3
	@echo "   ... and the held-out days"
	@$(BIN)/python examples/draw_synthetic_archive.py --output $(TRANSLATE)/archive --modalities hmi 171 --size 64 --workers 2 \
	    --start 2016-03-15 --end 2016-06-19 --cadence 2D --seed 3
	@echo "== 2/6 Preparing: $(TRANSLATE)/prepared"
	@$(BIN)/python examples/prepare_data.py prepare $(TRANSLATE)/archive $(TRANSLATE)/prepared --size 64 \
	    --train-end 2015-10-20 --modalities hmi 171 --workers 2
	@echo "== 3/6 The autoencoder: examples/configs/translate_autoencoder.yaml"
	@$(BIN)/accelerate launch --config_file examples/accelerate/cpu.yaml examples/pretrain.py examples/configs/translate_autoencoder.yaml
	@echo "== 4/6 The prior of both channels: examples/configs/translate_prior.yaml"
	@$(BIN)/accelerate launch --config_file examples/accelerate/cpu.yaml examples/train_prior.py examples/configs/translate_prior.yaml
	@echo "== 5/6 The ControlNets: examples/configs/translate_controlnet.yaml"
	@$(BIN)/accelerate launch --config_file examples/accelerate/cpu.yaml examples/train_controlnet.py \
	    examples/configs/translate_controlnet.yaml --sources hmi --target 171 --output_dir $(TRANSLATE)/hmi-to-aia171
	@$(BIN)/accelerate launch --config_file examples/accelerate/cpu.yaml examples/train_controlnet.py \
	    examples/configs/translate_controlnet.yaml --sources 171 --target hmi --max_steps 1100 --output_dir $(TRANSLATE)/aia171-to-hmi
	@echo "== 6/6 Held-out synthetic days, beside the baselines"
	@$(BIN)/python examples/evaluate_translation.py $(TRANSLATE)/hmi-to-aia171 $(TRANSLATE)/prepared --note synthetic \
	    --output $(TRANSLATE)/hmi-to-aia171/evaluation
	@$(BIN)/python examples/evaluate_translation.py $(TRANSLATE)/aia171-to-hmi $(TRANSLATE)/prepared --note synthetic \
	    --output $(TRANSLATE)/aia171-to-hmi/evaluation
	@echo "== Done. Pipelines, tables and figures are in $(TRANSLATE)/hmi-to-aia171 and $(TRANSLATE)/aia171-to-hmi (synthetic)"

test: $(VENV)/.test  ## Run all tests (at most 15 minutes, 2 cores)
	$(BIN)/python -m pytest

style: $(VENV)/.style  ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: style test  ## Everything that has to pass before a change lands

flare-demo: $(VENV)/.test  ## Flare forecast on the synthetic Sun: pretrained against from scratch (13 minutes, 2 cores)
	$(BIN)/python examples/flare_experiment.py --output runs/flare-demo

$(VENV)/.docs: $(VENV)/.test
	@echo "== Installing what the pages and their code need besides"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[docs,export,search]'
	@touch $@

docs: $(VENV)/.docs  ## Build the pages into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-test: $(VENV)/.docs  ## Run every block of code in the README and the pages (4 minutes, 2 cores)
	$(BIN)/python tests/docs/run_blocks.py

bench: $(VENV)/.test  ## Speed and memory against named references, in one run each
	$(BIN)/python benchmarks/preprocessing.py
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/translation.py

clean:  ## Remove the environment, the built pages and what the demonstrations wrote
	rm -rf $(VENV) $(DEMO) $(TRANSLATE) build runs/flare-demo

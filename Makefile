# Each target is all that a fresh machine needs: it makes .venv and installs what is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# Stamps: what the demo needs is installed, what the tests need is.
DEMO    = $(VENV)/.demo
STAMP   = $(VENV)/.test

.PHONY: demo serve test check docs docs-serve format data clean

# PRESET=full trains for longer. Run it again after a stop, and it goes on.
PRESET ?= quick
demo: $(DEMO)
	$(BIN)/python -m puma_jax.data.openmoji --out runs/openmoji
	$(BIN)/python -m puma_jax.train --config configs/openmoji.py --preset $(PRESET) \
		--workdir runs/demo-$(PRESET)
	$(EMBED_DEMO)
	@echo 'Another loss: $(BIN)/puma-jax train --config configs/openmoji.py --preset $(PRESET) \
		--reuse runs/demo-$(PRESET) --workdir runs/another-loss --stages.pruned.loss.kind info_nce'
	@echo 'Search:       $(BIN)/puma-jax search --vectors $(VECTORS) --text "red apple"'
	@echo 'Open a page:  make serve$(if $(filter-out quick,$(PRESET)), PRESET=$(PRESET))'

# The page on what the demo has trained, at http://127.0.0.1:8000
serve: $(DEMO)
	$(EMBED_DEMO)
	$(BIN)/python -m puma_jax.serve --uri $(VECTORS) \
		--service.instruction "Find the drawing with this name."

VECTORS    = runs/vectors-$(PRESET)
EMBED_DEMO = $(BIN)/python -m puma_jax.embed --model runs/demo-$(PRESET)/pruned --out $(VECTORS) \
	--items runs/openmoji/cand_pool/global/mbeir_union_test_cand_pool.jsonl

# Most of a test is one thread that compiles: two at a time take little more than half as long.
WORKERS ?= 2
test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The tests build the site, too: what warns here fails there. The variable silences an advertisement.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

docs-serve: $(STAMP)
	$(BIN)/mkdocs serve

data: $(DEMO)
	$(BIN)/python -m puma_jax.data.openmoji --out runs/openmoji

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): $(DEMO)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(DEMO): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "puma_jax needs Python 3.11 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[demo,serve]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache build *.egg-info

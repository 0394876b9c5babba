# How Physics Learned to Draw: `make help` lists the targets. Needs make and Python 3.11, 3.12 or 3.13, nothing else.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# python3 when it is new enough, else the first one found by name; or say it: make test PYTHON=/path/to/python3.12
suits = $(1) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	if $(call suits,$$p); then echo $$p; break; fi; done)

VENV := .venv
BOOK_VENV := .venv-book
# the book needs no PyTorch: its own small environment, unless the complete one is there
BOOK = $(if $(wildcard $(VENV)/.complete),$(VENV),$(BOOK_VENV))
PY := $(VENV)/bin/python
JUPYTER_BOOK = $(BOOK)/bin/python -c 'from jupyter_book.cli.main import main; main()'
HTML := _build/html

export PYTHONUTF8 := 1

.PHONY: help book strict test chapters text lint check-pages serve train-smoke env clean python

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: | book-env  ## build the HTML book from the stored outputs, and print where it lies
	@$(JUPYTER_BOOK) build . $(BOOK_FLAGS) || { echo "make book: the build failed, see above" >&2; exit 1; }
	@echo; echo "The book lies in $(CURDIR)/$(HTML)/index.html"

strict: BOOK_FLAGS = --warningiserror -n --keep-going --all
strict: book  ## the same from scratch, with warnings as errors

test: $(VENV)/.complete  ## run all tests: pytest, then the chapters against their stored outputs
	$(PY) -m pytest
	$(PY) -m pytest --nbval chapters/

chapters: $(VENV)/.complete  ## execute the chapters and rewrite their notebooks (ONLY=05 for one of them)
	$(PY) tools/chapters.py $(ONLY)
	$(PY) tools/equations.py

text: $(VENV)/.complete  ## rewrite the notebooks after an edit of the text, without executing them
	$(PY) tools/chapters.py --no-run
	$(PY) tools/equations.py

lint: $(VENV)/.complete  ## ruff
	$(PY) -m ruff check .

check-pages: $(VENV)/.complete  ## look at the built pages in headless Chromium (SHOTS=folder keeps pictures)
	$(PY) tools/check_pages.py $(if $(SHOTS),--shots $(SHOTS))

serve: book  ## build the book and serve it on http://localhost:8000
	@cd $(HTML) && ../../$(BOOK)/bin/python -m http.server 8000 --bind 127.0.0.1

train-smoke: $(VENV)/.complete  ## train a tiny model for twenty steps and draw from it
	@run=$$(mktemp -d)/run && \
	$(PY) -m minigen train ddpm --data digits --steps 20 --batch 16 --width 16 --device cpu --out $$run && \
	$(PY) -m minigen sample $$run --n 4 --steps 5 --sampler ddim --out $$run/grid.png && \
	test -s $$run/grid.png && echo "train-smoke: trained, saved, loaded and sampled in $$run"

env: $(VENV)/.complete  ## make the complete environment in .venv

clean:  ## remove what was built (the environments stay)
	rm -rf _build .pytest_cache .ruff_cache *.egg-info
	find book chapters minigen tests tools -name __pycache__ -prune -exec rm -rf {} +

python:
	@if [ -z "$(PYTHON)" ] || ! $(call suits,$(PYTHON)); then \
		echo "This book needs Python 3.11, 3.12 or 3.13; python3 here is: $$(python3 --version 2>&1)." >&2; \
		echo "Install one of them, or name it: make $(or $(MAKECMDGOALS),book) PYTHON=/path/to/python3.12" >&2; exit 1; fi

define make-venv
@$(MAKE) --no-print-directory python
@echo "Making $(1) from $(2). This happens once."
@$(PYTHON) -m venv $(1) || { echo "Python cannot make a virtual environment (on Debian or Ubuntu: apt install python3-venv)." >&2; exit 1; }
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(2)
@touch $(1)/.complete
endef

$(VENV)/.complete: requirements.txt requirements-book.txt pyproject.toml
	$(call make-venv,$(VENV),requirements.txt)

$(BOOK_VENV)/.complete: requirements-book.txt
	$(call make-venv,$(BOOK_VENV),requirements-book.txt)

.PHONY: book-env
book-env:
	@$(MAKE) --no-print-directory $(BOOK)/.complete

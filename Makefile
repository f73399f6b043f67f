# `make demo` and `make test` need Python 3.11 or newer, make, and about 6 GB of disk: nothing else.
#
#   make demo     scores the sample studies and shows what comes out
#   make test     lint, types, layering and tests
#   make bench    speed against a plain torch and Grad-CAM script, memory, query (some minutes)
#   make install  the environment in .venv, without running anything
#   make lock     requirements/*.txt anew from pyproject.toml, with uv (UPGRADE=1: newer versions)
#   make clean    removes the environment and what was built
#
# PYTHON=/path/to/python chooses the interpreter. A torch of at least 2.8 that it has already, with
# its torchvision, is used as it is.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test bench install lock clean

VENV := .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
HAS_TORCH := import re, torch, torchvision; \
  assert tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 8)
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)

demo: $(VENV)/run.stamp
	@$(BIN)/mura-batch demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: $(VENV)/test.stamp
	$(BIN)/mura-batch bench
	$(BIN)/python tests/bench/compare.py
	$(BIN)/python tests/bench/query.py
	$(BIN)/python tests/bench/memory.py

install: $(VENV)/run.stamp

# An environment that is there and works is kept. The first try sees the interpreter's own
# packages; where they hold no usable torch, a closed environment replaces it.
$(VENV)/made.stamp:
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' || { \
	  echo "mura-batch needs Python 3.11 or newer; name one with make PYTHON=/path/to/python" >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  make_venv() { $(PYTHON) -m venv --clear "$$@" $(VENV) || { \
	    echo "$(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; }; }; \
	  make_venv --system-site-packages; \
	  $(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || make_venv; \
	fi
	@touch $@

# Installs what $(1) lists, hashes checked. Where the interpreter brought its own torch, torch and
# what only the registry's builds of it need are left out.
TORCH_LINES := ^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==
define install_locked
awk -v outer="$$(grep -c 'include-system-site-packages = true' $(VENV)/pyvenv.cfg)" \
  '/^[a-z]/ { skip = outer && /$(TORCH_LINES)/ } !skip' $(1) > $(VENV)/install.txt
$(BIN)/python -m pip install --disable-pip-version-check --require-hashes --no-deps -r $(VENV)/install.txt
endef

$(VENV)/run.stamp: $(VENV)/made.stamp requirements/run.txt pyproject.toml
	@echo "Installing into $(VENV): the first time this takes some minutes."
	$(call install_locked,requirements/run.txt)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp requirements/test.txt
	$(call install_locked,requirements/test.txt)
	@touch $@

# test.txt holds run.txt's packages too, at the same versions.
LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
  --no-header --no-emit-index-url --no-emit-find-links $(if $(UPGRADE),--upgrade) \
  pyproject.toml requirements/build.in
lock:
	$(LOCK) --extra test --output-file requirements/test.txt
	$(LOCK) --constraints requirements/test.txt --output-file requirements/run.txt

clean:
	rm -rf $(VENV) build dist

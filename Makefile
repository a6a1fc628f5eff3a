VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test parity clean

help:
	@echo "make install   create $(VENV) with the tested packages (Python 3.11 or 3.12)"
	@echo "make demo      generate a sheet of images with a shipped model into demo.png"
	@echo "make test      lint, format check, types and every test"
	@echo "make parity    run others' networks with PyTorch (1.7 GB more) and compare imported weights"
	@echo "make clean     remove $(VENV), caches and demo.png; runs/ stays"

install: $(INSTALLED)

# The stamp is newer than what it was made from as long as nothing has to be installed.
$(INSTALLED): requirements.txt pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
	  for python in python3.11 python3.12 python3; do \
	    $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	      2>/dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python 3.11 or 3.12 found (tried python3.11, python3.12 and python3);" \
	      "install one of them and run make again." >&2; \
	    exit 1; \
	  fi; \
	  echo "Creating $(VENV) with $$($$python --version)"; \
	  $$python -m venv $(VENV); \
	fi
	@echo "Installing the packages of requirements.txt; the first time takes some minutes"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

demo: install
	@$(BIN)/dalle-jax generate -n 4 --out demo.png

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile  # tests of a file share what is slow to make

# With GOLDEN=1 it also writes the files in tests/golden/weights anew, whose floats differ by machine.
parity: install
	bash tests/parity/install.sh $(CURDIR)/.parity
	cd tests/parity && $(CURDIR)/.parity/venv/bin/python oracles.py $(CURDIR)/.parity $(CURDIR)/.parity/files $(if $(GOLDEN),../golden/weights)
	PYTHONPATH=tests/parity JAX_PLATFORMS=cpu $(BIN)/python tests/parity/flax_oracles.py .parity .parity/files $(if $(GOLDEN),tests/golden/weights)
	PYTHONPATH=.:tests/parity JAX_PLATFORMS=cpu $(BIN)/python tests/parity/compare.py .parity/files

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

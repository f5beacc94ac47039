# Every target sets up what it needs, inside .venv. PYTHON names the interpreter that .venv is made with.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
DEMO := runs/demo

# DeepSpeed calls ninja by name, to compile its one operator.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help venv compiler demo test test-slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make venv       create $(VENV) and install the tested versions of everything"
	@echo "make demo       train a small video VAE on built-in clips and reconstruct one that it has not seen"
	@echo "make test       the fast tests"
	@echo "make test-slow  the multi-rank, soak and end-to-end tests"
	@echo "make lint       ruff and pyright"
	@echo "make clean      remove $(VENV), builds and caches; $(DEMO) and other runs stay"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@# CPU builds of torch lack Triton, whose interpreter runs the kernels' tests. Not every system has a build of it.
	-$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(VENV)/bin/python -m pip install --no-deps triton==3.6.0
	@touch $@

compiler:
	@command -v "$${CXX:-c++}" >/dev/null || { \
		echo "No C++ compiler ($${CXX:-c++}): DeepSpeed compiles one operator when it first runs." >&2; \
		echo "Install one (Debian and Ubuntu: the package g++), or name yours in CXX." >&2; exit 1; }

demo: venv compiler
	rm -rf $(DEMO)
	$(VENV)/bin/deepspeed --num_gpus 1 --master_port $$((20000 + $$$$ % 20000)) scripts/train_video.py --config configs/demo_cpu.yaml --output $(DEMO)
	$(VENV)/bin/python scripts/reconstruct.py --checkpoint $(DEMO)/checkpoints/latest \
		--input "$$(head -n 1 $(DEMO)/held_out.txt)" --output $(DEMO)/reconstruction
	@cat $(DEMO)/summary.txt
	@ls $(DEMO)/reconstruction/*

test: venv compiler
	$(VENV)/bin/python -m pytest

test-slow: venv compiler
	$(VENV)/bin/python -m pytest -m slow

lint: venv
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find leanvae litevae scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

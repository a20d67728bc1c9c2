# make demo    a quantized model answers inside a LangChain chain
# make test    the tests, as continuous integration runs them
# Both make .venv and install what they need. Other settings:
#   make demo PYTHON=python3.12 TORCH=torch     # another Python, the newest torch
#   make test JOBS=4                            # test processes, each with its own models
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(BIN)/langchain-quantllm demo

test: .venv/.test lint
	$(BIN)/python -m langchain_quantllm.demo_model
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	touch $@

.venv/.demo: .venv/.python pyproject.toml
	$(PIP) "$(TORCH)" --editable '.[demo]'
	touch $@

.venv/.test: .venv/.demo
	$(PIP) "$(TORCH)" --editable '.[adapters,bench,demo,gptq,huggingface,structured,vision]' --group test
	touch $@

clean:
	rm -rf .venv

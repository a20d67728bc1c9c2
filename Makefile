# Commands of this project; `make help` lists them. Each makes the environment that it needs.
# Settings:
#   make test PYTHON=python3.12     another Python, when an environment is made
#   make test JOBS=4                test processes, each with its own models
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 5

.PHONY: help demo test test-all test-slow test-vllm test-newest test-oldest lint format docs lock notebooks clean
.DELETE_ON_ERROR:

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | sort | \
		while IFS="$$(printf '\t')" read -r name text; do printf 'make %-12s %s\n' "$$name" "$$text"; done

demo: .venv/.demo ## answer inside a LangChain chain with a small model in nf4
	$(BIN)/langchain-quantllm demo

test: .venv/.test lint ## check style and types, run all tests except slow ones
	$(BIN)/python -m langchain_quantllm.cli.demo_model
	$(PYTEST) -m "not slow"

test-all: .venv/.test lint ## run all tests; those on a larger model need QUANTLLM_MODELS (CONTRIBUTING.md)
	$(BIN)/python -m langchain_quantllm.cli.demo_model
	$(PYTEST) --junitxml .venv/test-all.xml

test-slow: .venv/.test ## run the slow tests alone
	$(BIN)/python -m langchain_quantllm.cli.demo_model
	$(PYTEST) -m slow -v -rfE

test-vllm: .venv-vllm/.test ## run the tests of vLLM as the engine, on its build for CPUs (Linux, Python 3.11 or newer)
	.venv-vllm/bin/python -m langchain_quantllm.cli.demo_model
	QUANTLLM_VLLM=1 .venv-vllm/bin/python -m pytest -v -k vllm tests/unit_tests/compat/test_vllm.py \
		tests/unit_tests/engine/test_vllm_options.py tests/unit_tests/engine/test_vllm.py \
		tests/unit_tests/engine/test_behaviours.py

test-newest: ## run the compat tests with the newest version of every package (RECORD=1 writes docs/compatibility.md)
	$(PYTHON) tools/try_versions.py newest --jobs $(JOBS) $(if $(RECORD),--record)

test-oldest: ## run them with the oldest versions that pyproject.toml allows (RECORD=1 likewise)
	$(PYTHON) tools/try_versions.py oldest --jobs $(JOBS) $(if $(RECORD),--record)

lint: .venv/.test ## check style, types and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.test ## fix style and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.test ## build the documentation site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: ## renew requirements/*.txt: the newest versions that pyproject.toml allows, and the oldest
	$(PYTHON) tools/lock.py

notebooks: .venv/.test ## run the notebooks and write what they show into them
	$(BIN)/python cookbook/execute.py

clean: ## remove the environments and the site
	rm -rf .venv .venv-lock .venv-newest .venv-oldest .venv-vllm site

.venv/.demo: requirements/torch.txt requirements/demo.txt pyproject.toml tools/environment.py
	$(PYTHON) tools/environment.py .venv requirements/demo.txt
	touch $@

.venv/.test: requirements/torch.txt requirements/test.txt pyproject.toml tools/environment.py
	$(PYTHON) tools/environment.py .venv requirements/test.txt
	touch $@

.venv-vllm/.test: requirements/torch.txt requirements/vllm.txt pyproject.toml tools/environment.py
	$(PYTHON) tools/environment.py .venv-vllm requirements/vllm.txt
	touch $@

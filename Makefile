# Needs nothing but Python (3.11 or later) and make. `make` alone lists the targets.

PYTHON ?= python3
# A Python that is named has an environment of its own: make test PYTHON=python3.13 uses .venv-python3.13.
VENV := .venv$(patsubst %,-%,$(filter-out python3 python,$(notdir $(PYTHON))))
OLDEST := .venv-oldest
WHEEL := .venv-wheel
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One test process a core, one thread each: torch would otherwise start a thread a core in every one of them.
# A file's tests stay in one process, because they share runs that are expensive to make; files with few tests come last.
TEST_FLAGS ?= -n auto --maxprocesses 8 --dist loadfile
TESTS ?=
# What a run and a server promise when something goes wrong: docs/reliability.md.
RELIABILITY := $(patsubst %,tests/soak/test_%.py,disk fuzz kills launchers numbers processes serving)
# Seconds, of each of these files: kills take an hour and a half.
LIMIT ?= 7200
BENCH ?=
# CPU=1 takes PyTorch's CPU build: the other brings 6 GB of CUDA libraries. uv knows the index that has it; where that
# cannot be reached, one that pip is configured for may have it, or TORCH_INDEX names one.
CPU ?=
TORCH_INDEX ?=
TORCH = $(shell grep -E '^torch(vision)?==' constraints.txt)
# What meets the libraries: help and refusals, a training run, its evaluation and predictions, figures, pictures.
QUICK := $(addprefix tests/test_cli.py::test_,help_shows_an_example a_wrong_word_is_told_with_an_example \
	wrong_use_is_a_message_and_exit_code_2 a_signal_is_a_line_and_its_exit_code the_whole_path \
	two_runs_are_analyzed_side_by_side) tests/data/test_decode.py

# The environments here are our own: their bytecode is kept, or each process would compile torch anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test soak long quick oldest dist wheel docs bench check lint types arrows style clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## Make the environment .venv and install into it

demo: $(STAMP)  ## Make a data set, train on it, and draw what the detector finds
	$(BIN)/detrellis demo

test: $(STAMP)  ## Run the tests (a part of them: make test TESTS=tests/golden)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS) $(TESTS)

soak: $(STAMP)  ## Run the reliability campaign, for hours (a part: make soak TESTS=tests/soak/test_kills.py)
	$(call in_turn,$(RELIABILITY))

long: $(STAMP)  ## Run the other long tests: of benchmarks, commands, exports, pages (a part: make long TESTS=...)
	$(call in_turn,$(filter-out $(RELIABILITY),$(wildcard tests/soak/test_*.py)))

quick:  ## Run the tests that meet the libraries: try another Python with make quick PYTHON=python3.13
	$(MAKE) test TEST_FLAGS= TESTS="$(QUICK)"

oldest: $(OLDEST)/.installed  ## The same tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest $(QUICK)

dist: $(STAMP)  ## Build the wheel and the source archive into dist/
	rm -rf dist
	$(BIN)/python -m uv build --quiet --out-dir dist

wheel: dist  ## Install the wheel alone into a fresh environment, and let its demo run for a minute at most
	rm -rf $(WHEEL)
	$(call environment,$(WHEEL))
	$(WHEEL)/bin/python -m uv --no-progress pip install -q --python $(WHEEL)/bin/python -c constraints.txt dist/*.whl
	cd $(WHEEL) && { OMP_NUM_THREADS=1 timeout --preserve-status --signal=INT 60 bin/detrellis demo --epochs 1; \
		code=$$?; [ $$code -eq 0 ] || [ $$code -eq 130 ]; }

docs: $(STAMP)  ## Build the docs site into build/docs/site, strictly: broken links end it
	$(BIN)/python -m website

bench: $(STAMP)  ## Measure what has a speed budget, and print a table (a part: make bench BENCH=step)
	$(BIN)/python benchmarks/all.py $(BENCH)

check: lint types arrows style  ## Run ruff, mypy, and the import and style tests

lint: $(STAMP)  ## Run ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Run mypy, strict, on the package
	$(BIN)/mypy

arrows: $(STAMP)  ## Test that imports point one way only
	$(BIN)/python -m pytest tests/test_arrows.py

style: $(STAMP)  ## Test the limits of length, nesting and arguments
	$(BIN)/python -m pytest tests/test_style.py

clean:  ## Remove the environment, caches and the demo (runs/ stays)
	rm -rf .venv .venv-* build demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Done once, and again when what is installed changes. uv needs half of pip's time; where it cannot install, pip does.
$(STAMP): pyproject.toml constraints.txt
	$(call environment,$(VENV))
	@echo "Installing into $(VENV). PyTorch is large: this takes a few minutes the first time."
	@$(if $(CPU)$(TORCH_INDEX),$(CPU_BUILD))
	@$(BIN)/python -m uv --no-progress pip install -q --python $(BIN)/python -c constraints.txt \
		-e '$(EVERYTHING)' \
		|| $(BIN)/python -m pip install -q -c constraints.txt -e '$(EVERYTHING)'
	@touch $@

# Bounds in pyproject.toml, each at its lowest, found by uv; without transformers, which brings another typer.
$(OLDEST)/.installed: pyproject.toml
	$(call environment,$(OLDEST))
	@echo "Installing the oldest versions allowed into $(OLDEST)."
	@$(OLDEST)/bin/python -m uv --no-progress pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct \
		-e '.[test,tensorboard]'
	@touch $@

EVERYTHING := .[dev,tensorboard]

LONG_TEST = OMP_NUM_THREADS=1 timeout --signal=INT $(LIMIT) $(BIN)/python -m pytest --durations=0

# What TESTS names, or one file after the other, so that one that fails or takes too long keeps no other from its turn.
define in_turn
	@$(if $(TESTS),$(LONG_TEST) $(TESTS),failed=; \
		for file in $(1); do echo $$file; $(LONG_TEST) $$file || failed="$$failed $$file"; done; \
		[ -z "$$failed" ] || { echo "failed, or did not end in time:$$failed"; exit 1; })
endef

define CPU_BUILD
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q --index-url $(TORCH_INDEX) $(TORCH),\
		$(BIN)/python -m uv --no-progress pip install -q --python $(BIN)/python -c constraints.txt \
			--torch-backend cpu $(TORCH) \
		|| $(BIN)/python -m pip install -q -c constraints.txt $(addsuffix +cpu,$(TORCH)) 2> /dev/null) \
		|| { echo "The CPU build of PyTorch cannot be reached. Name an index that has it: make $(or $(MAKECMDGOALS),demo) \
TORCH_INDEX=URL, with the URL that PyTorch's installation page shows for Pip and CPU."; exit 1; }
endef

define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " \
		+ sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@$(1)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -q -c constraints.txt uv || true
endef

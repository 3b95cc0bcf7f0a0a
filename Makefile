PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PERFECT := bulkwf/service/*,bulkwf/limits/*,bulkwf/submission/retries.py,bulkwf/checkpoint/*,bulkwf/verification/*
PARALLEL = $(BIN)/python -m pytest -q -n auto --dist loadgroup

.PHONY: demo quick test torture mutants coverage bench lint clean

# The stamps make each set-up step run once, and again when pyproject.toml changes.
$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/pyvenv.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

demo: $(VENV)/.installed
	@folder=$$(mktemp -d) && \
	echo "checkpoint: $$folder/airports.bulkwf" && \
	$(BIN)/bulkwf run examples/airports.jsonl -w airports --emulate --rate 300/s -c $$folder/airports.bulkwf

# For each change: unit tests, virtual time, and a smoke test of the rest.
quick: $(VENV)/.installed-dev
	$(PARALLEL) --hypothesis-profile quick -m 'not slow or smoke'

test: $(VENV)/.installed-dev
	$(PARALLEL)

# Hours, on two cores.
torture: $(VENV)/.installed-dev
	BULKWF_TORTURE=1 $(PARALLEL) tests/crash tests/test_ends.py tests/test_network.py tests/test_fuzz.py \
	  tests/test_benchmarks.py tests/simulation/test_every_await.py tests/simulation/test_long_night.py
	cd tests && ../$(BIN)/python -m simulation 0 100000

mutants: $(VENV)/.installed-dev
	cd tests && ../$(BIN)/python -m mutants

# Without the harnesses that run the same lines many times.
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q --ignore=tests/simulation --ignore=tests/crash --ignore=tests/mutants
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95
	$(BIN)/coverage report --fail-under=100 --include='$(PERFECT)'

# Takes a quarter of an hour and six gigabytes in TMPDIR, on a machine that does nothing else.
bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks --keep

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/api.py
	@if command -v node >/dev/null; then echo $(BIN)/pyright && $(BIN)/pyright --pythonpath $(BIN)/python; \
	else echo "NOT CHECKED: pyright needs Node"; fi
	$(BIN)/lint-imports
	$(BIN)/codespell

clean:
	rm -rf $(VENV) .coverage* build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

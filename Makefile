# Both main targets set everything up on a bare machine with python3 (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz lint proto clean

demo: .venv/local  ## engines, scheduler, a real Envoy and batchgw; a minute of traffic and a batch beside it; a report
	$(BIN)/llmd-sched up --batch-lines 200

test: .venv/dev lint  ## all checks and all tests, on all cores
	$(BIN)/pytest -q -n auto --dist loadfile

fuzz: .venv/dev  ## the property tests, on examples that no run has seen
	$(BIN)/pytest --hypothesis-profile=default tests/unit tests/contract

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: .venv/dev  ## regenerate llmd_sched/wire from proto/
	$(BIN)/python proto/generate.py

.venv/local: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[local,batch]'
	touch $@

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# xds-protos carries an old copy of these files, and whichever of the two pip unpacks last wins.
	$(BIN)/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps opentelemetry-proto
	touch $@ .venv/local

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

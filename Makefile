# Every target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := out/demo

.PHONY: help demo demo-prometheus demo-control serve test test-slow test-all check format bench bench-models bench-serve bench-control bench-scale clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "fleetcast needs Python 3.11 to 3.13")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.runtime  ## a synthetic cluster, from raw trace to tomorrow's forecast and its report
	$(BIN)/python jobs/synthesize.py --config examples/demo-trace.yaml --out $(DEMO)/raw
	$(BIN)/python jobs/nightly.py --config examples/demo-nightly.yaml --source $(DEMO)/raw --store $(DEMO)/store

demo-prometheus: $(VENV)/.runtime  ## the same from a running Prometheus, which is started for it (needs prometheus, promtool)
	$(BIN)/python examples/demo_prometheus.py $(DEMO)-prometheus

demo-control: $(VENV)/.runtime  ## a simulated cluster scaled over a Redis stream, and a kill in between (needs redis-server)
	$(BIN)/python examples/demo_control.py $(DEMO)-control

serve: $(VENV)/.runtime  ## the demo's forecast over HTTP, and a page: http://127.0.0.1:8000
	test -d $(DEMO)/store/forecasts || $(MAKE) demo
	PATH="$(CURDIR)/$(BIN):$$PATH" RAY_ADDRESS=local RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 RAY_SERVE_ENABLE_HA_PROXY=1 \
		$(BIN)/serve run serve_config.yaml

test: $(VENV)/.dev  ## the tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev  ## the tests that take minutes: jobs killed and resumed, scale
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev  ## linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## ingest and loader against their alternatives, steps of our models, peak memory
	$(BIN)/python benchmarks/run.py

bench-models: $(VENV)/.dev  ## time and memory of a training step of every model
	$(BIN)/python -m benchmarks.models

bench-serve: $(VENV)/.dev  ## the running server under load: stored and live forecasts, reload (needs wrk)
	$(BIN)/python -m benchmarks.serving

bench-control: $(VENV)/.dev  ## the simulator of clusters: against closed forms, both engines, speed
	$(BIN)/python -m benchmarks.control
	$(BIN)/python -m benchmarks.deployment

bench-scale: $(VENV)/.dev  ## large traces: Ray's share, archives, streaming, DDP, 4,000 machines, 3·10⁸ rows
	$(BIN)/python benchmarks/run.py --scale

clean:  ## removes what the targets made
	rm -rf $(VENV) out

"""Models side by side on your telemetry: which one to trust, and by how much.

    python jobs/backtest.py --store ./store --tabular.table load.parquet --tabular.entity host
        --tabular.time time --tabular.metrics cpu

Trains every model with several seeds beside the naive forecasts, tests them on the same windows, and writes
backtests/<name>/report.html, report.md and ladder.parquet into the store. Takes a table of any origin, raw
files, or windows that the store has; --paper fusion and --paper stgnn rerun the papers' experiments.
Repeating the command goes on where it stopped.
"""

from __future__ import annotations

from typing import Any

from fleetcast.backtesting.options import BacktestOptions
from fleetcast.backtesting.run import backtest
from fleetcast.config import JobConfig
from fleetcast.runtime import run_job
from fleetcast.store import Store


class Config(BacktestOptions, JobConfig):
    __doc__ = __doc__


def main(config: Config) -> dict[str, Any]:
    """Runs the backtest."""
    return backtest(Store(config.store), config.only(BacktestOptions))


if __name__ == "__main__":
    run_job(main, Config)

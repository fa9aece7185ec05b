"""A small table and a quick backtest of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from fleetcast.backtesting.options import BacktestOptions

#: Hours of the table: 12 and a half days.
STEPS = 300
#: Fits that take a tenth of a second.
QUICK: dict[str, Any] = {
    "models": ("ridge", "mlp", "dlinear"),
    "options": {"mlp": {"hidden": 8}},
    "seeds": 2,
    "fit": {"epochs": 2, "steps_per_epoch": 3, "batch_size": 8},
    "search_epochs": 1,
}


def table(folder: Path, name: str = "load.csv", seed: int = 0, steps: int = STEPS) -> str:
    """The path of a table of three hosts, hour by hour, with a day's cycle."""
    random = np.random.default_rng(seed)
    hours = np.arange(steps)
    rows = pl.DataFrame(
        {
            "when": np.repeat(np.datetime64("2024-01-01", "ms") + hours * np.timedelta64(3600, "s"), 3),
            "host": ["a", "b", "c"] * steps,
            "cpu": (
                0.4 + 0.2 * np.sin(2 * np.pi * hours / 24)[:, None] + 0.05 * random.normal(size=(steps, 3))
            ).ravel(),
        }
    )
    path = folder / name
    rows.write_csv(path) if name.endswith(".csv") else rows.write_parquet(path)
    return str(path)


def quick(table: str | None = None, **changes: Any) -> BacktestOptions:
    """A backtest of a table, of which nothing but the columns is given, that takes a second or two."""
    source = {"table": table, "entity": "host", "time": "when", "metrics": ("cpu",)}
    return BacktestOptions(**({"tabular": source} if table else {}), **{**QUICK, **changes})

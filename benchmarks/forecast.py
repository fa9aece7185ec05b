"""A night's forecast of a whole cluster: every metric, step and quantile of each machine.

The store is made first, by the jobs themselves: a sample every 5 min, windows of a day's look-back and
horizon at 15-min steps, a model of one short epoch. Then the forecast job runs, with Ray running, over and
over; the first run pays for processes that import torch. Rows are counted before any time counts.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import forecast
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import PeakMemory, ray_session, scratch
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import train_model
from fleetcast.windows.manifest import ShardOptions
from pydantic import Field

from benchmarks.report import BenchConfig, machine, megabytes, run, table

#: What a night may take [s].
_GOAL_SECONDS = 60


class ForecastBenchOptions(Options):
    """The cluster."""

    machines: int = Field(4_000, ge=1)
    """Machines."""
    days: int = Field(8, ge=6)
    """Telemetry before the forecast [days]."""
    folder: str | None = None
    """Where the store is kept for the next run; a folder that goes away if not given."""


class Config(ForecastBenchOptions, BenchConfig):
    __doc__ = __doc__


def main(config: Config) -> None:
    """Prints the first and the later runs."""
    with scratch() as aside, ray_session(config.num_cpus):
        root = Path(config.folder or aside)
        store = _store(config, root)
        runs = [_timed(store) for _ in range(config.repetitions + 1)]
    expected = config.machines * len(ShardOptions().metrics) * (86_400 // 900)
    for _, figures, _ in runs:
        if figures["rows"] != expected:
            raise InputError(f"forecast: {figures['rows']:,} rows, expected {expected:,}")
    later = sorted(seconds for seconds, _, _ in runs[1:])
    table(
        f"A forecast of {config.machines:,} machines",
        ["", "seconds", "rows/s", "largest task", "driver", "goal"],
        [
            _row("first run of a session", runs[0][0], runs[0], ""),
            _row(f"median of {len(later)} more", later[len(later) // 2], runs[-1], f"< {_GOAL_SECONDS} s"),
        ],
        f"24 h at 15-min steps, {len(ShardOptions().metrics)} metrics, mean and 8 quantiles, "
        f"{expected:,} rows; stgnn; {config.num_cpus} CPUs, Ray running. {machine()}.",
    )


def _row(name: str, seconds: float, of: tuple[float, dict[str, Any], int], goal: str) -> list[str]:
    _, figures, driver = of
    rate = f"{figures['rows'] / seconds:,.0f}"
    return [name, f"{seconds:.1f}", rate, megabytes(figures["peak_bytes"]), megabytes(driver), goal]


def _store(config: Config, root: Path) -> Store:
    """A store with windows and a selected model; complete stages are not run again."""
    raw, store = Store(str(root / "raw")), Store(str(root / "store"))
    if not store.exists("models/selected.json"):
        trace = SynthesizeOptions(
            machines=config.machines, containers=config.machines, days=config.days, sample_interval=300
        )
        synthesize(trace, raw)
        ingest(store, raw.root, IngestOptions())
        shard(store, ShardOptions(split=(0.7, 0.15, 0.15)))
        train_model(store, TrainOptions(epochs=1, steps_per_epoch=20))
        selected = store.read_json("models/selected.json")
        # One epoch may lose to a naive forecast, which would then be the one that is timed.
        store.write_json("models/selected.json", {**selected, "rung": "stgnn"})
    return store


def _timed(store: Store) -> tuple[float, dict[str, Any], int]:
    """Seconds, figures, and the driver's peak, of one run of the job."""
    store.remove("forecasts")
    peak = PeakMemory()
    started = time.perf_counter()
    figures = forecast(store, ForecastOptions())
    seconds = time.perf_counter() - started
    logging.getLogger("fleetcast").info("forecast: %.1f s", seconds)
    return seconds, figures, peak.bytes()


if __name__ == "__main__":
    run(main, Config)

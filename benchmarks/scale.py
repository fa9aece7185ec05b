"""The jobs on traces of a cluster that grow a hundredfold: time and memory of each stage against rows.

    python -m benchmarks.scale                               1, 3 and 10 days of 4,000 machines
    python -m benchmarks.scale --days 1 --days 3 --days 10 --days 43 --picture scale.png

A trace is written, ingested and cut into windows in a process and a Ray of its own, then deleted, so the disk
must hold the largest trace once (1.2 GB a day of 4,000 machines) and a tenth of it beside. Memory is
resident memory: of the driver, and of the largest task of each stage.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fleetcast import plots
from fleetcast.config import Options
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import PeakMemory, ray_session, scratch, set_up_logging, spread
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.windows.manifest import ShardOptions
from matplotlib.ticker import FuncFormatter
from pydantic import Field

from benchmarks.report import BenchConfig, log, machine, megabytes, run, table

STAGES = ("synthesize", "ingest", "shard")
#: Their names in the picture.
PROCESSES = {
    "driver": "driver",
    "chunks": "a chunk's task",
    "telemetry": "a day's task",
    "dependencies": "a graph's task",
    "shard": "a shard's task",
}
_COLUMNS = (
    *("days", "rows", "csv", *STAGES, "ns a row: ingest", "its map", "peak of the driver"),
    *("of a chunk's task", "of a day's", "of a graph's", "of a shard's"),
    *("telemetry and parts", "files", "windows"),
)


class ScaleOptions(Options):
    """The traces that are compared."""

    machines: int = Field(4_000, ge=1)
    """Machines of every trace, with a sample every 10 s."""
    days: tuple[int, ...] = (1, 3, 10)
    """Lengths of the traces [days]."""
    folder: str | None = None
    """Where traces and stores are made; a folder for temporary files if not given."""
    picture: str | None = None
    """A PNG of the curves is written here."""
    figures: str | None = None
    """All figures are written here as JSON."""


class Config(ScaleOptions, BenchConfig):
    __doc__ = __doc__


def main(config: Config) -> None:
    """Prints a row for each trace, and draws the curves."""
    found = []
    for days in config.days:
        found.append(_apart(config, days))
        log.info("%d days: %s", days, json.dumps(found[-1]))
    table(
        f"Time and memory of a growing trace of {config.machines:,} machines",
        _COLUMNS,
        [_row(figures) for figures in found],
        f"Wall seconds; ns a row: wall time ÷ rows, of ingest and of its first stage alone. Telemetry and "
        f"windows in the store. {config.num_cpus} CPUs. {machine()}.",
    )
    if config.figures is not None:
        Path(config.figures).write_text(json.dumps(found, indent=1))
    if config.picture is not None:
        Path(config.picture).write_bytes(picture(found))


def _row(f: dict[str, Any]) -> list[str]:
    return [
        str(f["days"]),
        f"{f['rows']:,}",
        f"{f['csv_bytes'] / 1e9:.1f} GB",
        *(f"{f['seconds'][stage]:,.0f} s" for stage in STAGES),
        f"{1e9 * f['seconds']['ingest'] / f['rows']:.0f}",
        f"{1e9 * f['seconds']['map'] / f['rows']:.0f}",
        *(megabytes(f["peak_bytes"][process]) for process in PROCESSES),
        f"{f['telemetry_bytes'] / 1e9:.2f} GB",
        f"{f['files']:,}",
        megabytes(f["windows_bytes"]),
    ]


def _apart(config: Config, days: int) -> dict[str, Any]:
    """The figures of one trace, measured in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(_measure, config.model_dump(), days).result()


def _measure(options: dict[str, Any], days: int) -> dict[str, Any]:
    config = Config(**options)
    set_up_logging(config.log_level)
    with scratch(config.folder) as folder:
        raw, store = (str(Path(folder) / name) for name in ("raw", "store"))
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        with ray_session(config.num_cpus):
            trace = synthesize(_trace(config, days), Store(raw))
        seconds["synthesize"] = time.perf_counter() - started
        with ray_session(config.num_cpus):  # new workers, which hold nothing of the synthesis
            spread(list(range(4 * config.num_cpus)), lambda _: {}, "workers start")
            driver = PeakMemory()
            started = time.perf_counter()
            read = ingest(Store(store), raw, IngestOptions())
            seconds["ingest"] = time.perf_counter() - started
            started = time.perf_counter()
            cut = shard(Store(store), _windows())
            seconds["shard"] = time.perf_counter() - started
        seconds["map"] = read["stage_seconds"]["chunks"]
        place = Path(store)
        return {
            "days": days,
            "rows": sum(read["rows_read"].values()),
            "csv_bytes": trace["bytes"],
            "seconds": seconds,
            "stages": read["stage_seconds"],
            "peak_bytes": {
                "driver": driver.bytes(),
                **read["stage_peak_bytes"],
                "shard": cut["peak_bytes"],
            },
            "telemetry_bytes": _size(place / "telemetry") + _size(place / "ingested"),
            "windows_bytes": _size(place / "windows"),
            "files": sum(1 for path in place.rglob("*") if path.is_file()),
            "entities": cut["entities"],
        }


def _trace(config: Config, days: int) -> SynthesizeOptions:
    """Nearly all of it is machine_usage, the table of which there is most for each machine."""
    return SynthesizeOptions(
        machines=config.machines, containers=config.machines, services=8, days=days, rows_per_part=4_000_000
    )


def _windows() -> ShardOptions:
    """Short windows, so that even a day has all three parts."""
    return ShardOptions(history=7200, horizon=7200, lags=(7200,))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def picture(found: list[dict[str, Any]]) -> bytes:
    """Time for each row and memory of each process against the number of rows."""
    figure, (time_axes, memory_axes) = plots.subplots(
        "Wall time for each raw row [ns]", "Peak memory of a process [GB]", width=8.4, height=3.0
    )
    rows = [f["rows"] for f in found]
    for stage in STAGES:
        per_row = [1e9 * f["seconds"][stage] / f["rows"] for f in found]
        time_axes.plot(rows, per_row, marker="o", label=stage)
    for process, label in PROCESSES.items():
        memory_axes.plot(rows, [f["peak_bytes"][process] / 1e9 for f in found], marker="o", label=label)
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("raw rows")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{len(str(int(value))) - 1}}}$"))
        axes.legend()
    return plots.png(figure)


if __name__ == "__main__":
    run(main, Config)

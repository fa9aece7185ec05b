"""The ingest job against DuckDB and Polars: the same binning of the same files.

Samples of machine_usage become mean, maximum and count per metric, and the number of samples, per machine and
5 min; impossible values are null; the result is Parquet by date. The rivals have a process of their own and
as many threads as the job has CPUs of Ray. The job does more: it counts and keeps bad rows, remembers what
is complete, and derives entities and dependencies. Their figures are compared before any time counts.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import polars as pl
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.ingest import run as job
from fleetcast.ingest.chunks import PARTS
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import PeakMemory, ray_session, scratch
from fleetcast.store import Store
from fleetcast.traces.alibaba_2018 import TABLES
from fleetcast.traces.synthesis import SynthesizeOptions
from pydantic import Field

from benchmarks.report import BenchConfig, interleave, log, machine, megabytes, run, spread_of, table

_USAGE = TABLES["machine_usage"]
_STEP = 300
_DAYS = 8
#: Metric → raw column, what to divide it by, and its largest valid value.
_METRICS = {
    "cpu": ("cpu_util_percent", 100, 100),
    "memory": ("mem_util_percent", 100, 100),
    "disk_io": ("disk_io_percent", 100, 100),
    "net_in": ("net_in", 100, 100),
    "net_out": ("net_out", 100, 100),
    "memory_bandwidth": ("mem_gps", 100, 100),
    "mpki": ("mkpi", 1, 1e30),
}


class SizeOptions(Options):
    """What is read."""

    gb: float = Field(1.0, gt=0)
    """Raw csv of machine_usage, synthesised [GB]."""


class Config(SizeOptions, BenchConfig):
    __doc__ = __doc__


@dataclass(frozen=True)
class Result:
    """One run of one contender."""

    seconds: float
    peak_bytes: int
    """Of the rival's process, or of the job's largest task."""
    sums: dict[str, float]
    """What the output must add up to."""


def main(config: Config) -> None:
    """Prints rows and bytes per second and core of the job and both rivals."""
    with scratch() as folder, ray_session(config.num_cpus):
        root = Path(folder)
        _synthesise(root / "small", machines=1)
        machines = config.gb * 1e9 / _size(root / "small")
        _synthesise(root / "raw", machines=max(1, round(machines)))
        warm = _ingest(root / "raw", root, 0)  # so that every worker process is there
        contenders: dict[str, Callable[[int], Result]] = {
            "fleetcast": partial(_ingest, root / "raw", root),
            "DuckDB": partial(_apart, _duckdb, root / "raw", root / "out", config.num_cpus),
            "Polars": partial(_apart, _polars, root / "raw", root / "out", config.num_cpus),
        }
        log.info("warm-up: %.1f s", warm.seconds)
        results = interleave(contenders, config.repetitions)
        _check_same(results)
        size = _size(root / "raw")
    rows = results["fleetcast"][0].sums["samples"]
    fastest = min(median(r.seconds for r in results[name]) for name in ("DuckDB", "Polars"))
    table(
        "Ingest against DuckDB and Polars",
        ["", "seconds, median (min–max)", "rows/s/core", "MB/s/core", "of the faster one", "peak"],
        [_row(name, found, rows, size, fastest, config.num_cpus) for name, found in results.items()],
        f"{megabytes(size)} of csv, {rows:,.0f} rows, page cache warm; {config.num_cpus} CPUs or threads "
        f"each, {config.repetitions} repetitions in turn; without dependencies and Ray's start; "
        f"same sums. Peak: the rival's process, or the job's largest task. {machine()}.",
    )


def _row(name: str, results: list[Result], rows: float, size: int, fastest: float, cores: int) -> list[str]:
    seconds = [result.seconds for result in results]
    per_core = median(seconds) * cores
    return [
        name,
        spread_of(seconds),
        f"{rows / per_core:,.0f}",
        f"{size / 1e6 / per_core:,.1f}",
        f"{fastest / median(seconds):.2f}",
        megabytes(max(result.peak_bytes for result in results)),
    ]


def _synthesise(folder: Path, machines: int) -> None:
    """Only machine_usage stays: the rivals read nothing else."""
    options = SynthesizeOptions(machines=machines, containers=1, services=1, days=_DAYS, job_interval=86_400)
    synthesize(options, Store(str(folder)))
    for file in folder.iterdir():
        if not file.name.startswith(_USAGE.name):
            file.unlink()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _ingest(raw: Path, root: Path, repetition: int) -> Result:
    """The whole job but for its dependencies, into an empty store."""
    store = Store(str(root / "store"))
    started = time.perf_counter()
    figures = job.ingest(store, str(raw), IngestOptions(step=_STEP))
    # Dependencies are not binning, and no rival makes them.
    seconds = time.perf_counter() - started - figures["stage_seconds"]["dependencies"]
    parts = pl.scan_ipc(f"{store.root}/{PARTS}/machine/*.arrow")  # telemetry keeps no counts
    sums = _sums(pl.scan_parquet(f"{store.root}/telemetry/**/*.parquet"), parts)
    result = Result(seconds, figures["peak_bytes"], sums)
    shutil.rmtree(store.root)
    return result


Rival = Callable[[Path, Path, int], None]


def _apart(rival: Rival, raw: Path, out: Path, threads: int, repetition: int) -> Result:
    """A rival in a process of its own, whose start does not count."""
    os.environ["POLARS_MAX_THREADS"] = str(threads)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as process:
        seconds, peak = process.submit(_timed, rival, raw, out, threads).result()
    bins = pl.scan_parquet(f"{out}/**/*.parquet")
    result = Result(seconds, peak, _sums(bins, bins))
    shutil.rmtree(out)
    return result


def _timed(rival: Rival, raw: Path, out: Path, threads: int) -> tuple[float, int]:
    import duckdb  # noqa: F401  imports do not count, as Ray's start does not

    peak = PeakMemory()
    started = time.perf_counter()
    rival(raw, out, threads)
    return time.perf_counter() - started, peak.bytes()


def _polars(raw: Path, out: Path, threads: int) -> None:
    """Polars took its number of threads from the environment when its process began."""
    values = {}
    for metric, (column, divisor, limit) in _METRICS.items():
        values[metric] = pl.when(pl.col(column).is_between(0, limit)).then(pl.col(column) / divisor)
    bins = (
        pl.scan_csv(f"{raw}/*.csv", has_header=False, schema=dict(_USAGE.columns), quote_char=None)
        .filter(pl.col("machine_id").is_not_null() & pl.col("time_stamp").is_not_null())
        .select(entity="machine_id", bin=pl.col("time_stamp") // _STEP, **values)
        .group_by("entity", "bin")
        .agg(
            pl.col(list(values)).cast(pl.Float64).mean().cast(pl.Float32),
            pl.col(list(values)).max().name.suffix("_max"),
            pl.col(list(values)).count().name.suffix("_count"),
            pl.len().alias("samples"),
        )
        .with_columns(date=pl.from_epoch(pl.col("bin") * _STEP).dt.date())
    )
    bins.sink_parquet(pl.PartitionBy(out, key="date"), mkdir=True, compression="zstd")


def _duckdb(raw: Path, out: Path, threads: int) -> None:
    import duckdb

    types: dict[Any, str] = {pl.String: "VARCHAR", pl.Int64: "BIGINT", pl.Float32: "FLOAT"}
    columns = {name: types[dtype] for name, dtype in _USAGE.columns.items()}
    values, aggregates = [], []
    for m, (column, divisor, limit) in _METRICS.items():
        values.append(f"CASE WHEN {column} BETWEEN 0 AND {limit} THEN {column} / {divisor} END AS {m}")
        aggregates.append(f"avg({m})::FLOAT AS {m}, max({m}) AS {m}_max, count({m}) AS {m}_count")
    table = f"read_csv('{raw}/*.csv', header = false, auto_detect = false, quote = '', columns = {columns})"
    out.mkdir()
    with duckdb.connect() as connection:
        connection.execute(f"SET threads = {threads}; SET preserve_insertion_order = false")
        connection.execute(
            f"""
            COPY (
                SELECT machine_id AS entity, bin, {", ".join(aggregates)}, count(*) AS samples,
                       make_timestamp(bin * {_STEP} * 1000000)::DATE AS date
                FROM (SELECT machine_id, time_stamp // {_STEP} AS bin, {", ".join(values)}
                      FROM {table}
                      WHERE machine_id IS NOT NULL AND time_stamp IS NOT NULL)
                GROUP BY machine_id, bin
            ) TO '{out}' (FORMAT parquet, PARTITION_BY (date), COMPRESSION zstd)
            """
        )


def _sums(bins: pl.LazyFrame, counts: pl.LazyFrame) -> dict[str, float]:
    """Bins, samples, and the sum of every column."""
    means = [name for metric in _METRICS for name in (metric, f"{metric}_max")]
    read = bins.select(
        pl.len().alias("bins"), pl.col("samples").cast(pl.Int64).sum(), pl.col(means).cast(pl.Float64).sum()
    )
    valid = counts.select(pl.col(f"{metric}_count").cast(pl.Int64).sum() for metric in _METRICS)
    return read.collect().row(0, named=True) | valid.collect().row(0, named=True)


def _check_same(results: dict[str, list[Result]]) -> None:
    """Raises InputError naming the first sum in which two contenders differ by more than float32 may."""
    expected = results["Polars"][0].sums
    for name, found in results.items():
        for column, value in expected.items():
            for result in found:
                if abs(result.sums[column] - value) > 1e-6 * abs(value):
                    raise InputError(
                        f"ingest: {name}: sum of {column} is {result.sums[column]}, Polars: {value}"
                    )


if __name__ == "__main__":
    run(main, Config)

"""What Ray Data adds to the tasks of ingest, and how fast one core reads each table.

The same chunks of the same files are read by the same function: as Ray Data tasks, and in as many plain
processes, which are there already. Each way writes its parts into a store of its own; the receipts must be
equal. Then each table's share of the tasks' time gives its rate on one core.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.ingest.chunks import ingest_chunk
from fleetcast.ingest.files import Chunk, chunks, discover
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import WORKER_ENVIRONMENT, ray_session, scratch, spread
from fleetcast.store import Store
from fleetcast.traces import TRACES
from fleetcast.traces.synthesis import SynthesizeOptions
from pydantic import Field

from benchmarks.report import BenchConfig, interleave, machine, megabytes, run, spread_of, table

#: Seconds, and the receipts of all chunks.
Result = tuple[float, list[dict[str, Any]]]


class TaskOptions(Options):
    """What is read."""

    machines: int = Field(120, ge=1)
    """Machines of the trace, whose containers have a sample every 60 s."""


class Config(TaskOptions, BenchConfig):
    __doc__ = __doc__


def main(config: Config) -> None:
    """Prints both ways' times, then a row for each table."""
    with scratch() as folder, ray_session(config.num_cpus):
        root = Path(folder)
        options = SynthesizeOptions(machines=config.machines, container_interval=60, job_interval=600)
        synthesize(options, Store(str(root / "raw")))
        pieces = chunks(discover(str(root / "raw"), TRACES["alibaba-2018"].tables), 64 << 20, {})
        with ProcessPoolExecutor(config.num_cpus, get_context("spawn"), _environment) as pool:
            contenders = {
                "plain processes": partial(_plain, root, pool, pieces),
                "Ray Data": partial(_ray, root, pieces),
            }
            for contender in contenders.values():  # so that every process is there
                contender(-1)
            results = interleave(contenders, config.repetitions)
    _check_same(results)
    size = sum(piece.stop - piece.start for piece in pieces)
    plain = median(seconds for seconds, _ in results["plain processes"])
    table(
        "What Ray Data adds to the tasks of ingest",
        ["", "seconds, median (min–max)", "MB/s/core", "of plain processes"],
        [
            [
                name,
                spread_of([seconds for seconds, _ in found]),
                f"{size / 1e6 / config.num_cpus / median(seconds for seconds, _ in found):.1f}",
                f"{median(seconds for seconds, _ in found) / plain:.2f}",
            ]
            for name, found in results.items()
        ],
        f"{len(pieces)} chunks of all six tables, {megabytes(size)} of csv, page cache warm; "
        f"{config.num_cpus} CPUs, {config.repetitions} repetitions in turn; map stage alone. {machine()}.",
    )
    _print_rates(results["plain processes"][-1][1])


def _environment() -> None:
    import os

    os.environ |= WORKER_ENVIRONMENT


def _work(root: Path, way: str, item: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    receipt = ingest_chunk(Store(str(root / way)), Chunk(**item), IngestOptions(buckets=1))
    return {**receipt, "took": time.perf_counter() - started}


def _plain(root: Path, pool: ProcessPoolExecutor, pieces: list[Chunk], repetition: int) -> Result:
    shutil.rmtree(root / "plain", ignore_errors=True)
    started = time.perf_counter()
    receipts = list(pool.map(partial(_work, root, "plain"), [piece.model_dump() for piece in pieces]))
    return time.perf_counter() - started, receipts


def _ray(root: Path, pieces: list[Chunk], repetition: int) -> Result:
    shutil.rmtree(root / "ray", ignore_errors=True)
    started = time.perf_counter()
    receipts = spread([piece.model_dump() for piece in pieces], partial(_work, root, "ray"), "chunks")
    return time.perf_counter() - started, receipts


def _check_same(results: dict[str, list[Result]]) -> None:
    """Raises InputError if a chunk's receipt differs between the ways."""
    told = ("table", "rows", "bytes", "rejected", "nulled")
    kept = {
        name: [{key: receipt[key] for key in told} for receipt in found[0][1]]
        for name, found in results.items()
    }
    if kept["plain processes"] != kept["Ray Data"]:
        raise InputError("tasks: plain processes and Ray Data read different rows")


def _print_rates(receipts: list[dict[str, Any]]) -> None:
    rows: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for receipt in receipts:
        rows[receipt["table"]] += receipt["rows"]
        size[receipt["table"]] += receipt["bytes"]
        seconds[receipt["table"]] += receipt["took"]
    table(
        "Reading each table on one core",
        ["table", "csv", "rows", "rows/s", "MB/s", "bytes a row"],
        [
            [
                name,
                megabytes(size[name]),
                f"{rows[name]:,}",
                f"{rows[name] / seconds[name]:,.0f}",
                f"{size[name] / 1e6 / seconds[name]:.1f}",
                f"{size[name] / rows[name]:.0f}",
            ]
            for name in sorted(rows)
        ],
        f"Parsing, binning and writing the parts, in the plain processes' last repetition. {machine()}.",
    )


if __name__ == "__main__":
    run(main, Config)

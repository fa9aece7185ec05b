"""Peak memory of every kind of process, on a trace and on one that is ten times as long.

Same machines, same size of chunks and of shards. Each trace has a process and a Ray of its own, so that
no high-water mark is another's. Memory is resident memory, so it holds the interpreter and the libraries:
the first row, a task that does nothing, says how much that is.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fleetcast.config import Options
from fleetcast.ingest.chunks import ingest_chunk
from fleetcast.ingest.files import Chunk, chunks, discover
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import PeakMemory, ray_session, scratch, set_up_logging, spread
from fleetcast.store import Store
from fleetcast.traces import TRACES
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.windows.manifest import ShardOptions
from pydantic import Field

from benchmarks.report import BenchConfig, machine, megabytes, run, table


class MemoryOptions(Options):
    """The traces that are compared."""

    machines: int = Field(100, ge=1)
    """Machines of both traces."""
    days: int = Field(2, ge=2)
    """Length of the short trace [days]."""
    longer: int = Field(10, ge=2)
    """How many times as long the other one is."""
    chunk_mb: int = Field(8, ge=1)
    """Raw bytes that one task reads [MB]; less than any large table of the short trace has."""
    shard_mb: int = Field(1, ge=1)
    """Size of a shard [MB]."""


class Config(MemoryOptions, BenchConfig):
    __doc__ = __doc__


def main(config: Config) -> None:
    """Prints the peaks of both traces side by side."""
    days = (config.days, config.days * config.longer)
    short, long = (_apart(config, length) for length in days)
    rows = [
        [name, megabytes(short[name]), megabytes(long[name]), f"{long[name] / short[name]:.2f}"]
        for name in short
    ]
    table(
        f"Peak memory when the trace grows {config.longer} ×",
        ["process", f"{days[0]} days", f"{days[1]} days", "ratio"],
        rows,
        f"{config.machines} machines and {4 * config.machines} containers, all six tables, chunks of "
        f"{config.chunk_mb} MB, shards of {config.shard_mb} MB; resident memory. {machine()}.",
    )


def _apart(config: Config, days: int) -> dict[str, float]:
    """The peaks for one trace, measured in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(_peaks, config.model_dump(), days).result()


def _peaks(options: dict[str, Any], days: int) -> dict[str, float]:
    config = Config(**options)
    set_up_logging(config.log_level)
    with scratch() as folder:
        raw, store, aside = (str(Path(folder) / name) for name in ("raw", "store", "aside"))
        with ray_session(config.num_cpus):
            trace = synthesize(SynthesizeOptions(machines=config.machines, days=days), Store(raw))
        with ray_session(config.num_cpus):  # new workers, which hold nothing of the synthesis
            return {**_jobs(config, raw, Store(store), Store(aside)), "raw csv": trace["bytes"]}


def _jobs(config: Config, raw: str, store: Store, aside: Store) -> dict[str, float]:
    """The peaks of the driver and of each kind of task."""
    nothing = spread([0], lambda _: {}, "nothing")
    how = IngestOptions(chunk_mb=config.chunk_mb, buckets=1)
    mapped = _map(aside, raw, how)

    driver = PeakMemory()
    ingest(store, raw, how)
    # What is gone is built again, from the chunks' parts, which are complete.
    for product in ("telemetry", "dependencies", "entities"):
        store.remove(product)
    combined = ingest(store, raw, how)
    sharded = shard(store, _windows(config))
    return {
        "task that does nothing": nothing[0]["peak_bytes"],
        "driver": driver.bytes(),
        "largest map task": max(receipt["peak_bytes"] for receipt in mapped),
        "largest combine task": combined["peak_bytes"],
        "largest shard task": sharded["peak_bytes"],
    }


def _windows(config: Config) -> ShardOptions:
    """Many columns, one group and short windows, so that even the short trace has more shards than one."""
    metrics = ("cpu", "memory", "disk_io", "net_in", "net_out")
    return ShardOptions(
        metrics=tuple(column for metric in metrics for column in (metric, f"{metric}_max")),
        step=300,
        history=6 * 3600,
        horizon=3600,
        lags=(6 * 3600,),
        group_size=config.machines,
        shard_mb=config.shard_mb,
    )


def _map(store: Store, source: str, options: IngestOptions) -> list[dict[str, Any]]:
    """The map side alone, as the job's receipts do not tell whose the largest task was."""
    trace = TRACES[options.trace]
    pieces = chunks(discover(source, trace.tables), options.chunk_mb << 20, {})

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return ingest_chunk(store, Chunk(**item), options)

    return spread([piece.model_dump() for piece in pieces], work, "chunks")


if __name__ == "__main__":
    run(main, Config)

"""One long .tar.gz: decompressed from end to end, indexed, read by its index, and ingested whole and split.

Each contender of the first table has processes of its own, whose start and imports do not count. Wall time
suffers from whatever else the machine does; seconds of a CPU do so less, and say what the work costs.
"""

from __future__ import annotations

import gzip
import multiprocessing
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

import rapidgzip
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.ingest import archives
from fleetcast.ingest.files import Chunk, Csv, RawFile, chunks, discover
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import PeakMemory, ray_session, scratch
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions
from pydantic import Field

from benchmarks.report import BenchConfig, interleave, machine, megabytes, run, spread_of, table

_BLOCK = 8 << 20
#: At most so many bytes of the tar are not its csv: headers, and zeros up to a whole record.
_AROUND = 2 * tarfile.RECORDSIZE
_TABLE = "machine_usage"
_DAYS = 8


class ArchiveOptions(Options):
    """What is read."""

    gb: float = Field(1.0, gt=0)
    """Decompressed size of the archive [GB]."""
    chunk_mb: int = Field(128, ge=1)
    """What one task reads of it once it is indexed [MB]."""


class Config(ArchiveOptions, BenchConfig):
    __doc__ = __doc__


@dataclass(frozen=True)
class Result:
    """One run of one contender."""

    seconds: float
    cpu: float
    """Of all its processes and threads [s]."""
    peak_bytes: int
    """Of its largest process or task."""
    size: int
    """Decompressed bytes."""


def main(config: Config) -> None:
    """Prints both tables."""
    with scratch() as folder:
        root = Path(folder)
        with ray_session(config.num_cpus):
            archive = _synthesise(root, config.gb)
        _decompress(config, root, archive)
        _ingest(config, root, archive)


def _synthesise(root: Path, gb: float) -> Path:
    """machine_usage of as many machines as are needed, in one archive."""

    def usage(folder: Path, machines: int) -> list[Path]:
        options = SynthesizeOptions(
            machines=machines, containers=1, services=1, days=_DAYS, job_interval=86_400
        )
        synthesize(options, Store(str(folder)))
        return sorted(folder.glob(f"{_TABLE}-*.csv"))

    one = sum(path.stat().st_size for path in usage(root / "small", 1))
    parts = usage(root / "parts", max(1, round(gb * 1e9 / one)))
    text = root / f"{_TABLE}.csv"
    with text.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, _BLOCK)
    shutil.rmtree(root / "parts")
    archive = root / "raw" / f"{_TABLE}.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz", compresslevel=6) as packed:
        packed.add(text, text.name)
    text.unlink()
    return archive


# -- decompressing ----------------------------------------------------------------------------------------

Work = Callable[[], int]


def _decompress(config: Config, root: Path, archive: Path) -> None:
    n = config.num_cpus
    store = Store(str(root / "indexed"))
    (file,) = discover(str(archive), [_TABLE])
    archives.build_index(store, file, 1)
    csv = archives.contents(store, file)
    pieces = chunks([file], config.chunk_mb << 20, {file.key: csv})
    shares = [partial(_by_index, store, pieces[i::n]) for i in range(n)]
    contenders: dict[str, Callable[[int], Result]] = {
        "gzip of Python, 1 thread": partial(_apart, [partial(_gzip, archive)]),
        "rapidgzip, 1 thread": partial(_apart, [partial(_rapidgzip, archive, 1)]),
        f"rapidgzip, {n} threads": partial(_apart, [partial(_rapidgzip, archive, n)]),
        "index built, 1 thread": partial(_apart, [partial(_index, root / "again", file, 1)]),
        f"index built, {n} threads": partial(_apart, [partial(_index, root / "again", file, n)]),
        "**by the index**, 1 process": partial(_apart, [partial(_by_index, store, pieces)]),
        f"**by the index**, {n} processes": partial(_apart, shares),
    }
    results = interleave(contenders, config.repetitions)
    for name, found in results.items():
        if any(abs(result.size - csv.size) > _AROUND for result in found):
            raise InputError(f"archives: {name}: {found[0].size:,} bytes, expected some {csv.size:,}")
    index = sum(store.fs.size(store.path(path)) for path in store.list(archives.INDEXES))
    table(
        "A long archive, decompressed",
        ["", "seconds, median (min–max)", "MB/s", "× gzip", "× rapidgzip", "MB/s of a CPU", "peak"],
        [_row(name, found, results) for name, found in results.items()],
        f"{megabytes(csv.size)} of csv in {megabytes(file.size)} of .tar.gz, page cache warm; index "
        f"{megabytes(index)}; chunks of {config.chunk_mb} MB; {config.repetitions} repetitions in turn; × is "
        f"of the median seconds with one thread. Peak: the largest process, all its libraries. {machine()}.",
    )


def _row(name: str, found: list[Result], results: dict[str, list[Result]]) -> list[str]:
    seconds = median(result.seconds for result in found)
    gz, rapid, *_ = (median(r.seconds for r in contender) for contender in results.values())
    return [
        name,
        spread_of([result.seconds for result in found]),
        f"{found[0].size / 1e6 / seconds:,.0f}",
        f"{gz / seconds:.2f}",
        f"{rapid / seconds:.2f}",
        f"{found[0].size / 1e6 / median(result.cpu for result in found):,.0f}",
        megabytes(max(result.peak_bytes for result in found)),
    ]


def _apart(works: Sequence[Work], repetition: int) -> Result:
    """Each work in a process of its own, all at once; from the start of the first to the end of the last."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(len(works), spawn) as processes:
        line = manager.Barrier(len(works))
        runs = [run.result() for run in [processes.submit(_timed, work, line) for work in works]]
    starts, ends, cpus, peaks, sizes = zip(*runs, strict=True)
    return Result(max(ends) - min(starts), sum(cpus), max(peaks), sum(sizes))


def _timed(work: Work, line: Any) -> tuple[float, float, float, int, int]:
    peak = PeakMemory()
    line.wait()
    started, cpu = time.monotonic(), time.process_time()
    size = work()
    return started, time.monotonic(), time.process_time() - cpu, peak.bytes(), size


def _length(stream: IO[bytes]) -> int:
    size, buffer = 0, memoryview(bytearray(_BLOCK))
    while read := cast(Any, stream).readinto(buffer):
        size += read
    return size


def _gzip(archive: Path) -> int:
    with gzip.open(archive) as stream:
        return _length(cast(IO[bytes], stream))


def _rapidgzip(archive: Path, threads: int) -> int:
    with rapidgzip.open(str(archive), parallelization=threads) as stream:
        return _length(stream)


def _index(folder: Path, file: RawFile, threads: int) -> int:
    store = Store(str(folder))
    archives.build_index(store, file, threads)
    csv: Csv = archives.contents(store, file)
    shutil.rmtree(folder)
    return csv.size


def _by_index(store: Store, pieces: list[Chunk]) -> int:
    return sum(len(block) for piece in pieces for _, block in archives.blocks(store, piece))


# -- ingesting --------------------------------------------------------------------------------------------


def _ingest(config: Config, root: Path, archive: Path) -> None:
    whole_mb = archive.stat().st_size // (1 << 20) + 1
    with ray_session(config.num_cpus):
        warm = _job(root, archive, config.chunk_mb, 0)  # so that every worker process is there
        results = interleave(
            {
                "whole, one task": partial(_job, root, archive, whole_mb),
                "**split**, its index built first": partial(_job, root, archive, config.chunk_mb),
            },
            config.repetitions,
        )
    if {figures["rows_read"][_TABLE] for found in results.values() for _, figures in found} != {
        warm[1]["rows_read"][_TABLE]
    }:
        raise InputError("archives: whole and split, the job has not read the same rows")
    slowest = median(seconds for seconds, _ in next(iter(results.values())))
    table(
        "A long archive, ingested",
        ["", "seconds, median (min–max)", "of them until all chunks are read", "×", "largest task"],
        [
            [
                name,
                spread_of([seconds for seconds, _ in found]),
                spread_of([figures["stage_seconds"]["chunks"] for _, figures in found]),
                f"{slowest / median(seconds for seconds, _ in found):.2f}",
                megabytes(max(figures["peak_bytes"] for _, figures in found)),
            ]
            for name, found in results.items()
        ],
        f"The same archive; {config.num_cpus} CPUs, {config.repetitions} repetitions in turn; without Ray's "
        f"start. {machine()}.",
    )


def _job(root: Path, archive: Path, chunk_mb: int, repetition: int) -> tuple[float, dict[str, Any]]:
    store = Store(str(root / "store"))
    started = time.perf_counter()
    figures = ingest(store, str(archive), IngestOptions(chunk_mb=chunk_mb))
    seconds = time.perf_counter() - started
    shutil.rmtree(store.root)
    return seconds, figures


if __name__ == "__main__":
    run(main, Config)

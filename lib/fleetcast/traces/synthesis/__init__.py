"""A synthetic cluster, written as a raw trace in the exact format of cluster-trace-v2018 or of
cluster-trace-microservices-v2021 or -v2022, quirks included; or as a table of services with the calls between
them.

    cluster        which services depend on which, which machines host them
    load           what every machine and container does at any time: cycles, and shocks that travel
    tables         the rows of 2018's six tables, sampled from the load
    services       the table of services and their calls: requests per second, latency, cpu
    replicas       the containers of a service, which come and go
    calls          which service calls which how often, and traces that are sampled of it
    microservices  the rows of the microservice traces' tables
    here           the files of the trace

    prometheus  beside it: what a Prometheus has scraped of a small cluster

Everything is a pure function of the options and of a counter (entity, day; table, part), so any part of any
table can be made anywhere, at any time, without the others.
"""

from __future__ import annotations

import gzip
import io
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

import numpy as np
import polars as pl

from fleetcast.traces.alibaba_2018 import TABLES
from fleetcast.traces.synthesis import microservices
from fleetcast.traces.synthesis.cluster import Stream, SynthesizeOptions, generator
from fleetcast.traces.synthesis.services import write_calls, write_services
from fleetcast.traces.synthesis.tables import plan

#: The files of a trace of services.
SERVICES = {"services": write_services, "calls": write_calls}

__all__ = ["SERVICES", "Part", "SynthesizeOptions", "frames", "parts", "write_part"]


@dataclass(frozen=True)
class Part:
    """One file of the trace."""

    table: str
    index: int

    @property
    def name(self) -> str:
        """`machine_usage-00000` or `MSCallGraph_0`, without the format's ending."""
        return f"{self.table}-{self.index:05d}" if self.table in TABLES else f"{self.table}_{self.index}"

    def file(self, options: SynthesizeOptions) -> str:
        """`machine_usage-00000.csv`, or `services.parquet`."""
        return f"{self.table}.parquet" if self.table in SERVICES else f"{self.name}.{options.format}"


def parts(options: SynthesizeOptions) -> list[Part]:
    """All files of the trace."""
    if options.trace == "services":
        return [Part(table, 0) for table in SERVICES]
    if options.trace in microservices.TABLES:
        return [
            Part(table, index)
            for table in microservices.TABLES[options.trace]
            for index in range(microservices.file_count(options, table))
        ]
    found = []
    for table in TABLES:
        cut = plan(options, table)
        count = -(-cut.shards // (options.rows_per_part // cut.rows))
        found += [Part(table, index) for index in range(count)]
    return found


def frames(options: SynthesizeOptions, part: Part, block_rows: int = 1 << 17) -> Iterator[pl.DataFrame]:
    """The rows of a part, in blocks small enough for the processor's caches; no order is kept anywhere."""
    if options.trace in microservices.TABLES:
        yield from microservices.frames(options, part.table, part.index, block_rows)
        return
    cut = plan(options, part.table)
    size = options.rows_per_part // cut.rows
    # Walking around the shards by a stride near the golden ratio scatters them without a list of them all.
    stride = max(1, round(0.618 * cut.shards))
    while math.gcd(stride, cut.shards) > 1:
        stride += 1
    order = np.arange(part.index * size, min((part.index + 1) * size, cut.shards))
    shards = order * stride % cut.shards
    random = generator(options, Stream.ROWS, list(TABLES).index(part.table), part.index)
    step = max(1, block_rows // cut.rows)
    columns = list(TABLES[part.table].columns)
    for first in range(0, len(shards), step):
        yield cut.make(options, shards[first : first + step], random).select(columns)


def write_part(options: SynthesizeOptions, part: Part, file: IO[bytes]) -> int:
    """Writes one part in the options' format; returns its rows. The same bytes every time."""
    if part.table in SERVICES:
        return SERVICES[part.table](options, file)
    if options.format == "csv":
        return _write_csv(options, part, file)
    # Without a name and a time in its header a gzip stream depends on its content alone.
    with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        if options.format == "csv.gz":
            return _write_csv(options, part, cast(IO[bytes], packed))
        text = io.BytesIO()  # an archive states the size before the content
        rows = _write_csv(options, part, text)
        member = tarfile.TarInfo(f"{part.name}.csv")
        member.size = text.tell()
        text.seek(0)
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.addfile(member, text)
        return rows


def _write_csv(options: SynthesizeOptions, part: Part, file: IO[bytes]) -> int:
    rows = 0
    if options.trace in microservices.TABLES:
        file.write(microservices.header(options, part.table).encode())
    for frame in frames(options, part):
        text = io.BytesIO()
        frame.write_csv(text, include_header=False, quote_style="never")
        file.write(text.getbuffer())
        rows += len(frame)
    return rows

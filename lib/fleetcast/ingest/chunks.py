"""The map side of ingest: raw rows of one chunk → partial products and rejected rows, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import closing
from typing import Any

import polars as pl

from fleetcast.errors import InputError
from fleetcast.ingest import archives, files
from fleetcast.ingest.files import Chunk
from fleetcast.ingest.options import IngestOptions
from fleetcast.store import Store
from fleetcast.traces import TRACES
from fleetcast.traces.parts import PartWriter
from fleetcast.traces.raw import Binning, Table, parse

PARTS = "ingested/parts"
RECEIPTS = "ingested/chunks"


def binning(options: IngestOptions) -> Binning:
    """The clock of the options."""
    return Binning(start=int(options.start.timestamp()), step=options.step, slice=options.slice)


def reading_of(path: str) -> str:
    """The reading (`Chunk.reading`) that a part, or a file of rejected rows, came of."""
    return "-".join(path.rsplit("/", 1)[-1].split("-")[:2])


def ingest_chunk(store: Store, chunk: Chunk, options: IngestOptions) -> dict[str, Any]:
    """Reads a chunk, writes its parts, and returns (and stores, last) its receipt.

    A chunk whose receipt exists is complete and is not read again; one that was interrupted is read anew and
    overwrites its parts, whose names and contents depend on nothing but the chunk.
    """
    receipt_file = f"{RECEIPTS}/{chunk.id}.json"
    receipt: dict[str, Any] | None = store.read_json(receipt_file)
    if receipt is not None:
        return receipt | {"skipped": True}
    table = TRACES[options.trace].tables[chunk.file.table]
    clock = binning(options)
    source = (table.name, chunk.file.name, chunk.id)
    assert options.buckets is not None, "chosen when the store was made"
    writer = PartWriter(store, (PARTS, "rejected"), source, options.buckets)
    rows = size = 0
    reasons: Counter[str] = Counter()
    nulled: Counter[str] = Counter()
    table, begin = _as_written(store, chunk, table)
    for offset, block in _blocks(store, chunk):
        size += len(block)
        if offset < begin:
            offset, block = begin, block[begin - offset :]
        if not block:
            continue
        parsed = parse(block, table)
        rows += parsed.rows
        nulled.update(parsed.invalid)
        if len(parsed.rejected):
            reasons.update(parsed.rejected["reason"].to_list())
            writer.reject(parsed.rejected.with_columns(pl.col("offset") + offset))
        if len(parsed.frame):
            for product, frame in table.products(parsed.frame, clock).items():
                writer.add(product, frame)
    writer.flush()
    # Of a table with a header, a file may hold the header alone: nothing happened in its stretch of time.
    if not rows and not table.header and chunk.stop - chunk.start == chunk.file.size:
        raise InputError(f"{chunk.file.uri}: the file is empty, expected rows of {table.name}")
    receipt = {
        "table": table.name,
        "rows": rows,
        "bytes": size,
        "rejected": dict(reasons),
        "nulled": dict(nulled),
        "places": writer.places,
        "partial": dict(writer.rows),
    }
    store.write_json(receipt_file, receipt)
    return receipt


def _blocks(store: Store, chunk: Chunk) -> Generator[tuple[int, bytes], None, None]:
    yield from archives.blocks(store, chunk) if chunk.csv else files.blocks(chunk)


def _as_written(store: Store, chunk: Chunk, table: Table) -> tuple[Table, int]:
    """The table with the columns of the chunk's file, and where in the csv its rows begin."""
    if not table.header:
        return table, 0
    with closing(_blocks(store, chunk.model_copy(update={"start": 0, "stop": 1}))) as first:
        line = next(first)[1].split(b"\n", 1)[0]
    return table.of_header(line.decode(errors="replace"), chunk.file.uri), len(line) + 1

"""The map side of ingest: raw rows of one chunk → partial products and rejected rows, in bounded memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl

from fleetcast.errors import InputError
from fleetcast.ingest.files import Chunk, blocks
from fleetcast.ingest.options import IngestOptions
from fleetcast.store import Store
from fleetcast.traces import TRACES
from fleetcast.traces.parts import PartWriter
from fleetcast.traces.raw import Binning, parse

PARTS = "ingested/parts"
RECEIPTS = "ingested/chunks"


def binning(options: IngestOptions) -> Binning:
    """The clock of the options."""
    return Binning(start=int(options.start.timestamp()), step=options.step, slice=options.slice)


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
    writer = PartWriter(store, (PARTS, "rejected"), source, options.buckets)
    rows = 0
    reasons: Counter[str] = Counter()
    nulled: Counter[str] = Counter()
    for offset, block in blocks(chunk):
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
    if not rows and chunk.stop - chunk.start == chunk.file.size:
        raise InputError(f"{chunk.file.uri}: the file is empty, expected rows of {table.name}")
    receipt = {
        "table": table.name,
        "rows": rows,
        "bytes": chunk.stop - chunk.start,
        "rejected": dict(reasons),
        "nulled": dict(nulled),
        "files": dict(writer.written),
    }
    store.write_json(receipt_file, receipt)
    return receipt

"""The map side of ingest: raw rows of one chunk → partial products and rejected rows, in bounded memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl

from fleetcast import schemas
from fleetcast.errors import InputError
from fleetcast.ingest.files import Chunk, blocks
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.products import PRODUCTS, partitions
from fleetcast.store import Store
from fleetcast.traces import TRACES
from fleetcast.traces.raw import Binning, parse

PARTS = "ingested/parts"
RECEIPTS = "ingested/chunks"

#: Partial rows that a task holds before it merges and writes them.
_FLUSH_ROWS = 400_000


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
    writer = _PartWriter(store, chunk, options.buckets)
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
    }
    store.write_json(receipt_file, receipt)
    return receipt


class _PartWriter:
    """Collects partial rows, and writes them merged whenever there are too many to hold."""

    def __init__(self, store: Store, chunk: Chunk, buckets: int) -> None:
        self.store = store
        self.chunk = chunk
        self.buckets = buckets
        self.pending: dict[str, list[pl.DataFrame]] = {}
        self.held = 0
        self.written: Counter[str] = Counter()

    def add(self, product: str, frame: pl.DataFrame) -> None:
        """Takes partial rows of a product."""
        self.pending.setdefault(product, []).append(frame)
        self.held += len(frame)
        if self.held >= _FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes everything held."""
        for product, frames in self.pending.items():
            merged = PRODUCTS[product].merge(pl.concat(frames))
            for folder, rows in partitions(product, merged, self.buckets).items():
                self._write(f"{PARTS}/{product}/{folder}", rows)
        self.pending.clear()
        self.held = 0

    def reject(self, rejected: pl.DataFrame) -> None:
        """Writes rows that could not be used."""
        rows = rejected.select(
            table=pl.lit(self.chunk.file.table),
            file=pl.lit(self.chunk.file.name),
            offset="offset",
            reason="reason",
            line="line",
        )
        folder = f"rejected/{self.chunk.file.table}"
        name = f"{folder}/{self.chunk.id}-{self.written[folder]:03d}.parquet"
        self.written[folder] += 1
        self.store.write_table(name, rows.to_arrow().cast(schemas.REJECTED))

    def _write(self, folder: str, rows: pl.DataFrame) -> None:
        name = f"{folder}/{self.chunk.id}-{self.written[folder]:03d}.parquet"
        self.written[folder] += 1
        with self.store.write(name) as file:
            rows.write_parquet(file, compression="lz4")

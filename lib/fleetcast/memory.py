"""What a task of each kind may hold [bytes]: what Ray sets aside for it, so that a node runs no more at once
than its memory allows.

Each is a formula of a block, a day's bucket, a shard or a group; none grows with the length of the trace.
They are generous: `make bench-scale` prints what tasks held beside what was set aside.
"""

from __future__ import annotations

from fleetcast.windows.manifest import Manifest, Shard

#: A worker process that has imported the project, without torch and with it.
PROCESS = 250 << 20
PROCESS_TORCH = 600 << 20
#: A partial row of telemetry, with its sums, counts and maxima.
PARTIAL_ROW = 200
#: Columns of a block of text, in its bytes; partial rows while they merge, and those that gather while blocks
#: are parsed, with what the allocator keeps.
_COLUMNS, _MERGING, _GATHERING = 8, 6, 9
#: A shard while it is built, in its own bytes: sums, counts, statistics in float64.
_BUILDING = 10
#: A shard that is open, in its own bytes: values, filled values, mask, steps since the last observation.
OPEN = 3.25
#: Windows that are evaluated or forecast at once, with what a model makes of them.
_WINDOWS = 300 << 20


def reading(block_bytes: int, flush_rows: int) -> int:
    """A chunk of raw rows: a block as text and as columns, and the partial rows that wait to be written."""
    return PROCESS + _COLUMNS * block_bytes + _GATHERING * flush_rows * PARTIAL_ROW


def merging(rows: int, flush_rows: int) -> int:
    """All partial rows of a day and bucket."""
    return PROCESS + _MERGING * max(rows, flush_rows) * PARTIAL_ROW


def splitting(rows: int, columns: int) -> int:
    """A file of telemetry, regrouped."""
    return PROCESS_TORCH + _MERGING * rows * (16 + 12 * columns)


def shard_bytes(manifest: Manifest, shards: tuple[Shard, ...] | None = None) -> int:
    """The values of the largest shard, dense and in float32."""
    return max(
        (part.last - part.first) * len(manifest.members(part.group)) * len(manifest.metrics) * 4
        for part in (manifest.shards if shards is None else shards)
    )


def building(manifest: Manifest) -> int:
    """A shard that is built."""
    return PROCESS_TORCH + _BUILDING * shard_bytes(manifest)


def windows(manifest: Manifest, shards: int, of: tuple[Shard, ...] | None = None) -> int:
    """So many open shards, and a model that looks at their windows."""
    return PROCESS_TORCH + _WINDOWS + round(shards * OPEN * shard_bytes(manifest, of))

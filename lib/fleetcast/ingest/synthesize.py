"""Writing a synthetic raw trace in parallel: one Ray Data task per file, only receipts come back."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from typing import Any

from fleetcast.errors import InputError
from fleetcast.runtime import spread
from fleetcast.store import Store
from fleetcast.traces.synthesis import Part, SynthesizeOptions, parts, write_part

log = logging.getLogger("fleetcast")

_PART_FILE = re.compile(
    r"(machine|container)_(meta|usage)-\d{5,}\.\S+|batch_(task|instance)-\d{5,}\.\S+"
    r"|(services|calls)\.parquet"
    r"|(MSCallGraph|MSResource|MSRTQps|Node|CallGraph|MSRTMCR|MSMetrics|NodeMetrics)_\d+\.(csv(\.gz)?|tar\.gz)"
)


def synthesize(options: SynthesizeOptions, out: Store) -> dict[str, Any]:
    """Writes all tables into `out`, over what an earlier run left there; returns the run's figures.

    Every file is written whole or not at all and depends on the options alone, so a run that died is simply
    run again. Raises InputError if `out` is a file.
    """
    if out.fs.isfile(out.root):
        raise InputError(f"--out {out.uri}: is a file, expected a folder")
    todo = parts(options)
    names = {part.file(options) for part in todo}
    for old in out.list(""):
        # Files of a longer earlier trace would otherwise become part of this one.
        if _PART_FILE.fullmatch(old) and old not in names:
            log.info("removing %s of an earlier run", old)
            out.remove(old)

    def write(item: dict[str, Any]) -> dict[str, Any]:
        return _write(options, out, Part(item["table"], item["index"]))

    started = time.monotonic()
    items = [{"table": part.table, "index": part.index} for part in todo]
    receipts = spread(items, write, "synthesize: files")
    rows: Counter[str] = Counter()
    for receipt in receipts:
        rows[receipt["table"]] += receipt["rows"]
    return {
        "out": out.uri,
        "files": len(items),
        "bytes": sum(receipt["bytes"] for receipt in receipts),
        "rows": dict(rows),
        "rows_per_second": round(rows.total() / (time.monotonic() - started)),
        "rows_per_second_and_core": round(rows.total() / sum(receipt["seconds"] for receipt in receipts)),
        "peak_bytes": max(receipt["peak_bytes"] for receipt in receipts),
    }


def _write(options: SynthesizeOptions, out: Store, part: Part) -> dict[str, Any]:
    """One file → its receipt."""
    with out.write(part.file(options)) as file:
        rows = write_part(options, part, file)
        size = file.tell()
    return {"table": part.table, "rows": rows, "bytes": size}

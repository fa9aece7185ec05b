"""Writing a synthetic raw trace in parallel: one Ray Data task per file, only receipts come back."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from typing import Any

from fleetcast.errors import InputError
from fleetcast.runtime import PeakMemory
from fleetcast.store import Store
from fleetcast.traces.synthesis import Part, SynthesizeOptions, parts, write_part

log = logging.getLogger("fleetcast")

_PART_FILE = re.compile(r"(machine|container)_(meta|usage)-\d{5,}\.\S+|batch_(task|instance)-\d{5,}\.\S+")


def synthesize(options: SynthesizeOptions, out: Store) -> dict[str, Any]:
    """Writes all six tables into `out`, over what an earlier run left there; returns the run's figures.

    Every file is written whole or not at all and depends on the options alone, so a run that died is simply
    run again. Raises InputError if `out` is a file.
    """
    import ray  # late: `ray_session` sets the environment that Ray reads when it is imported

    if out.fs.isfile(out.root):
        raise InputError(f"--out {out.uri}: is a file, expected a folder")
    todo = parts(options)
    names = {_file(options, part) for part in todo}
    for old in out.list(""):
        # Files of a longer earlier trace would otherwise become part of this one.
        if _PART_FILE.fullmatch(old) and old not in names:
            log.info("removing %s of an earlier run", old)
            out.remove(old)

    def write(item: dict[str, Any]) -> dict[str, Any]:
        return _write(options, out, Part(item["table"], item["index"]))

    items = [{"table": part.table, "index": part.index} for part in todo]
    receipts = ray.data.from_items(items, override_num_blocks=len(items)).map(write)
    started, rows, size, busy, peak = time.monotonic(), Counter[str](), 0, 0.0, 0
    for done, receipt in enumerate(receipts.iter_rows(), start=1):
        rows[receipt["table"]] += receipt["rows"]
        size += receipt["bytes"]
        busy += receipt["seconds"]
        peak = max(peak, receipt["peak_bytes"])
        log.info("%s: %d rows (%d of %d files)", receipt["file"], receipt["rows"], done, len(items))
    seconds = time.monotonic() - started
    return {
        "out": out.uri,
        "files": len(items),
        "bytes": size,
        "rows": dict(rows),
        "rows_per_second": round(rows.total() / seconds),
        "rows_per_second_and_core": round(rows.total() / busy),
        "peak_memory_bytes": peak,
    }


def _file(options: SynthesizeOptions, part: Part) -> str:
    return f"{part.name}.{options.format}"


def _write(options: SynthesizeOptions, out: Store, part: Part) -> dict[str, Any]:
    """One file → its receipt."""
    started, memory = time.monotonic(), PeakMemory()
    with out.write(_file(options, part)) as file:
        rows = write_part(options, part, file)
        size = file.tell()
    return {
        "table": part.table,
        "file": _file(options, part),
        "rows": rows,
        "bytes": size,
        "seconds": time.monotonic() - started,
        "peak_bytes": memory.bytes(),
    }

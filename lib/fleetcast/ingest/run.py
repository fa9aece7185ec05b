"""The ingest job: finds what is new, maps it to parts, and rebuilds the days whose parts have changed.

Like make: every output file remembers the parts that it was built from, and is rebuilt only when they differ.
So new files add only what is new, a replaced file takes its old rows with it, and a job that was killed goes
on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from datetime import date, timedelta
from typing import Any

from fleetcast.errors import InputError
from fleetcast.ingest.chunks import PARTS, RECEIPTS, ingest_chunk
from fleetcast.ingest.dependencies import combine_dependencies
from fleetcast.ingest.files import Chunk, RawFile, chunks, discover
from fleetcast.ingest.make import make
from fleetcast.ingest.options import IngestOptions
from fleetcast.runtime import spread
from fleetcast.store import ACCEPTED, MANIFEST, Store, fingerprint
from fleetcast.traces import TRACES
from fleetcast.traces.parts import combine_entities, combine_telemetry
from fleetcast.traces.products import TELEMETRY

log = logging.getLogger("fleetcast")

_OUTPUTS = "ingested/outputs"
#: Options that the whole store shares; the others may change from run to run.
_SETTINGS = ("trace", "start", "step", "slice", "neighbours", "buckets")


def ingest(store: Store, source: str, options: IngestOptions) -> dict[str, Any]:
    """Adds the raw files of a source to the store's telemetry, entities and dependencies.

    Returns the figures of everything accepted so far. Raises InputError, with nothing published, if a file
    cannot be read or too many rows of a table cannot be used.
    """
    store.open_or_create()
    settings = options.model_dump(mode="json", include=set(_SETTINGS))
    found = discover(source, TRACES[options.trace].tables)
    accepted = _accepted(store, settings)
    files = _with_new([RawFile(**file) for file in accepted["files"]], found)
    state = {"settings": settings, "files": [file.model_dump() for file in files]}
    published = store.read_json(f"telemetry/{MANIFEST}")
    if state == accepted and published is not None and store.has(published["files"]):
        log.info("ingest: nothing new in %s", source)
        return {**published["figures"], "skipped": True}

    started = time.monotonic()
    pieces = chunks(files, options.chunk_mb << 20)
    receipts = _map(store, pieces, options)
    mapped = time.monotonic()
    figures = _count(receipts)
    _check_rejected(figures, options.max_rejected_share)
    store.write_json(ACCEPTED, state)
    # From here until its manifest is back, the telemetry is between two states and nobody reads it.
    store.remove(f"telemetry/{MANIFEST}")
    parts = _current_parts(store, {piece.id for piece in pieces})
    outputs = _build_telemetry(store, options, parts)
    combined = time.monotonic()
    outputs |= _build_dependencies(store, options, parts, outputs)
    finished = time.monotonic()
    _drop_unplanned(store, set(outputs))
    kinds = {kind: [r for path, r in outputs.items() if f"/{kind}-" in path] for kind in TELEMETRY}
    figures["bins"] = {kind: sum(r["rows"] for r in found) for kind, found in kinds.items() if found}
    figures["dependencies"] = _sum_counters(r["edges"] for r in outputs.values() if "edges" in r)
    figures["peak_bytes"] = max(r.get("peak_bytes", 0) for r in [*receipts, *outputs.values()])
    telemetry = [r for found in kinds.values() for r in found]
    if not telemetry:
        raise InputError(
            "the source has no usable row of machine_usage or container_usage; nothing to forecast"
        )
    store.write_json(
        f"telemetry/{MANIFEST}",
        {
            "settings": settings,
            "metrics": list(TRACES[options.trace].metrics),
            "spans": {
                kind: {"first": min(r["first"] for r in found), "last": max(r["last"] for r in found)}
                for kind, found in kinds.items()
                if found
            },
            "fingerprint": fingerprint([settings, sorted(file.key for file in files)]),
            "files": sorted(path for path in outputs),
            "figures": figures,
        },
    )
    seconds = {
        "chunks": round(mapped - started, 2),
        "telemetry": round(combined - mapped, 2),
        "dependencies": round(finished - combined, 2),
    }
    return {**figures, "stage_seconds": seconds, "skipped": False}


def _accepted(store: Store, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the store and the files accepted so far. Raises InputError if the settings differ."""
    state: dict[str, Any] = store.read_json(ACCEPTED) or {"settings": None, "files": []}
    had = state["settings"]
    if had != settings and not state["files"]:
        store.remove("ingested")  # what a run with other settings has left, which never came to its end
        state = {"settings": settings, "files": []}
        store.write_json(ACCEPTED, state)
    elif had != settings:
        name, value = next((name, value) for name, value in settings.items() if had.get(name) != value)
        raise InputError(
            f"--{name} {value}: the store {store.uri} was ingested with {had.get(name)}; "
            "use that, or another store"
        )
    return state


def _with_new(accepted: list[RawFile], found: list[RawFile]) -> list[RawFile]:
    """Accepted files and found ones, each content once; a path with other content replaces what it had."""
    files = {file.uri: file for file in [*accepted, *found]}
    old_first = sorted(files.values(), key=lambda file: (file not in accepted, file.uri))
    by_key: dict[str, RawFile] = {}
    for file in old_first:
        if (same := by_key.setdefault(file.key, file)) is not file:
            log.warning("%s: same content as %s, left out", file.uri, same.uri)
    return sorted(by_key.values(), key=lambda file: file.uri)


def _map(store: Store, pieces: list[Chunk], options: IngestOptions) -> list[dict[str, Any]]:
    there = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in store.list(RECEIPTS, ".json")}
    receipts = {p.id: store.read_json(f"{RECEIPTS}/{p.id}.json") for p in pieces if p.id in there}
    for lost in _without_files(store, receipts):
        log.warning("ingest: files of %s/%s.json are missing, the chunk is read again", RECEIPTS, lost)
        store.remove(f"{RECEIPTS}/{lost}.json")
        del receipts[lost]
    new = [piece for piece in pieces if piece.id not in receipts]
    log.info("ingest: %d chunks to read, %d complete", len(new), len(receipts))

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return ingest_chunk(store, Chunk(**item), options)

    return spread([piece.model_dump() for piece in new], work, "ingest: chunks") + list(receipts.values())


def _without_files(store: Store, receipts: dict[str, dict[str, Any]]) -> list[str]:
    """Chunks whose parts or rejected rows are not all in the store any more."""
    if not receipts:
        return []
    there = Counter(path.rsplit("-", 1)[0] for path in [*store.list(PARTS), *store.list("rejected")])
    return [
        chunk
        for chunk, receipt in receipts.items()
        if any(there[f"{folder}/{chunk}"] < count for folder, count in receipt.get("files", {}).items())
    ]


def _count(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    rows: Counter[str] = Counter()
    rejected: dict[str, Counter[str]] = defaultdict(Counter)
    nulled: dict[str, Counter[str]] = defaultdict(Counter)
    for receipt in receipts:
        rows[receipt["table"]] += receipt["rows"]
        rejected[receipt["table"]].update(receipt["rejected"])
        nulled[receipt["table"]].update(receipt["nulled"])
    return {
        "rows_read": dict(sorted(rows.items())),
        "rows_rejected": {table: dict(sorted(found.items())) for table, found in rejected.items() if found},
        "values_nulled": {table: dict(sorted(found.items())) for table, found in nulled.items() if found},
        "raw_bytes": sum(receipt["bytes"] for receipt in receipts),
    }


def _check_rejected(figures: dict[str, Any], limit: float) -> None:
    for table, reasons in figures["rows_rejected"].items():
        share = sum(reasons.values()) / figures["rows_read"][table]
        if share > limit:
            why = ", ".join(f"{reason}: {rows:,}" for reason, rows in reasons.items())
            raise InputError(
                f"{table}: {sum(reasons.values()):,} of {figures['rows_read'][table]:,} rows cannot be used "
                f"({share:.1%}; {why}), more than --max-rejected-share {limit}; "
                f"the rows are in rejected/{table}, nothing was published"
            )


def _current_parts(store: Store, ids: set[str]) -> dict[str, dict[str, list[str]]]:
    """Product → folder → parts of accepted chunks. What replaced files have left behind is deleted."""
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in [*store.list(PARTS), *store.list("rejected"), *store.list(RECEIPTS)]:
        folder, name = path.rsplit("/", 1)
        if "-".join(name.removesuffix(".json").split("-")[:2]) not in ids:
            store.remove(path)
        elif path.startswith(PARTS):
            product, place = folder.removeprefix(f"{PARTS}/").split("/", 1)
            parts[product][place].append(path)
    return parts


def _build_telemetry(
    store: Store, options: IngestOptions, parts: dict[str, dict[str, list[str]]]
) -> dict[str, dict[str, Any]]:
    """Builds the days and the entities that are stale; returns the receipts of all days, by path."""
    metrics = TRACES[options.trace].metrics
    plan = {
        f"telemetry/{place.split('/')[0]}/{kind}-{place[-2:]}.parquet": {"kind": kind, "parts": sorted(found)}
        for kind in TELEMETRY
        for place, found in parts[kind].items()
    }

    def telemetry(item: dict[str, Any]) -> dict[str, Any]:
        return combine_telemetry(store, item["kind"], item["parts"], item["target"], metrics)

    outputs = make(store, plan, telemetry, _OUTPUTS, "ingest: days")

    def entities(item: dict[str, Any]) -> dict[str, Any]:
        return combine_entities(store, item["parts"], item["target"])

    described = {"parts": sorted(parts["entities"]["all"])}
    make(store, {"entities/entities.parquet": described}, entities, _OUTPUTS, "ingest: entities")
    return outputs


def _build_dependencies(
    store: Store,
    options: IngestOptions,
    parts: dict[str, dict[str, list[str]]],
    telemetry: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Builds the days of dependencies that are stale; returns the receipts of all, by path."""

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return combine_dependencies(store, options, item)

    return make(store, _dependency_plan(parts, telemetry), work, _OUTPUTS, "ingest: dependencies")


def _dependency_plan(
    parts: dict[str, dict[str, list[str]]], telemetry: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Target → what one day's dependencies are made of.

    A job may run past midnight, so a day's batch edges need the instances of the day before. Where the source
    has neither jobs nor placements of containers, correlation of the telemetry of the day before stands in.
    """
    hosted = sorted(parts["hosted"].get("all", []))
    days = sorted({path.split("/")[1].removeprefix("date=") for path in telemetry if "/machine-" in path})
    plan = {}
    for day in days:
        near = (day, str(date.fromisoformat(day) - timedelta(days=1)))
        recent = {
            product: sorted(
                part
                for place, found in parts[product].items()
                if place.split("/")[0].removeprefix("date=") in near
                for part in found
            )
            for product in ("tasks", "instances")
        }
        item: dict[str, Any] = {"day": day, **recent, "hosted": hosted, "telemetry": []}
        if not hosted and not parts["instances"]:
            item["telemetry"] = sorted(
                p for p in telemetry if p.startswith(f"telemetry/date={near[1]}/machine-")
            )
            item["inputs"] = [telemetry[path]["inputs"] for path in item["telemetry"]]
        plan[f"dependencies/date={day}/machine.parquet"] = item
    return plan


def _drop_unplanned(store: Store, targets: set[str]) -> None:
    """Days that a replaced file has taken with it."""
    for path in [*store.list("telemetry", ".parquet"), *store.list("dependencies", ".parquet")]:
        if path not in targets:
            store.remove(path)
            store.remove(f"{_OUTPUTS}/{path}.json")


def _sum_counters(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))

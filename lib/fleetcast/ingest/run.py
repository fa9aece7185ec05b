"""The ingest job: finds what is new, maps it to parts, and rebuilds the days whose parts have changed.

Like make: every output file remembers what it was built from, and is rebuilt only when that differs. So new
files add only what is new, a replaced file takes its old rows with it, and a job that was killed goes on. All
that is remembered is a line for each raw file and each output, in a few files that are read and written
whole: what a night asks the store for depends on what is new, not on what is there.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from datetime import date, timedelta
from typing import Any

from pydantic import Field

from fleetcast import memory
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.ingest.archives import drop_other_indexes, index_archives
from fleetcast.ingest.chunks import PARTS, RECEIPTS, ingest_chunk, reading_of
from fleetcast.ingest.dependencies import combine_calls, combine_dependencies, place_containers
from fleetcast.ingest.files import BLOCK_BYTES, Chunk, RawFile, chunks, discover
from fleetcast.ingest.make import make
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.pull import is_server, pull
from fleetcast.runtime import spread
from fleetcast.store import ACCEPTED, MANIFEST, Store, fingerprint
from fleetcast.traces import TRACES
from fleetcast.traces.parts import FLUSH_ROWS, by_place, combine_entities, combine_telemetry, merge_parts
from fleetcast.traces.products import TELEMETRY

log = logging.getLogger("fleetcast")

#: Receipts of what is built (`make`), and the placements of containers, below this folder.
_OUTPUTS = "ingested/outputs"
_PLACEMENTS = "ingested/placements"
_ENTITIES = "ingested/entities"
#: The place of all that describes entities.
_DESCRIBED = "entities/all"
#: Of what is remembered.
_FORMAT = 4
#: Options that the whole store shares; the others may change from run to run.
_SETTINGS = ("trace", "start", "step", "slice", "neighbours", "buckets")
#: Raw rows for which a new store gets one more bucket [bytes], and how much larger than a compressed file
#: they are. All may be of one day, and a bucket of a day is merged by one task.
_BUCKET_BYTES = 5 * 10**9
_PACKED = 5

#: Product → day → bucket → the parts there: file → number of the row group.
Days = dict[str, dict[str, dict[str, dict[str, int]]]]


class Read(Options):
    """What came of a raw file: the sum of its chunks' receipts."""

    table: str
    reading: str
    rows: int
    bytes: int
    rejected: dict[str, int]
    nulled: dict[str, int]
    places: tuple[str, ...]
    """`product/day/bucket` where it has partial rows, and `entities/all`."""
    largest: dict[str, int]
    """Product → the most partial rows in one of those places."""
    parts: dict[str, tuple[int, ...]]
    """File of parts → of each row group, which of the places it is of."""

    def by_place(self) -> dict[str, dict[str, int]]:
        """The parts of each place."""
        return by_place({file: [self.places[i] for i in those] for file, those in self.parts.items()})


class Accepted(Options):
    """`ingested/manifest.json`: of which raw files, in which settings, the telemetry is made."""

    format: int = _FORMAT
    settings: dict[str, Any]
    files: tuple[RawFile, ...] = ()
    read: dict[str, Read] = Field(default_factory=dict)
    """By the files' keys."""
    entities: str | None = None
    """The file that holds all parts that describe entities, merged."""
    stray: tuple[str, ...] = ()
    """Readings of which parts may lie about that belong to no accepted file."""


def ingest(store: Store, source: str, options: IngestOptions) -> dict[str, Any]:
    """Adds the raw files of a source to the store's telemetry, entities and dependencies; a server is asked
    for them first.

    Returns the figures of everything accepted so far. Raises InputError, with nothing published, if a file
    cannot be read or too many rows of a table cannot be used.
    """
    store.open_or_create()
    accepted, options = _accepted(store, options)
    if is_server(source):
        source = pull(store, source, options)
    found = discover(source, TRACES[options.trace].tables, accepted.files)
    if options.buckets is None:
        options = options.model_copy(update={"buckets": _buckets(found)})
    files = _with_new(list(accepted.files), found)
    new = [file for file in files if file.key not in accepted.read]
    state = accepted.model_copy(update={"settings": _settings(options), "files": tuple(files)})
    published = store.read_json(f"telemetry/{MANIFEST}")
    complete = published is not None and store.has(published["files"])
    if not new and len(files) == len(accepted.read) and complete:
        log.info("ingest: nothing new in %s", source)
        if state != accepted:  # other names or stamps
            _write(store, state)
        return {**published["figures"], "skipped": True}

    started = time.monotonic()
    chunk_bytes = options.chunk_mb << 20
    pieces = chunks(new, chunk_bytes, index_archives(store, new, chunk_bytes))
    stray = {*accepted.stray, *(piece.reading for piece in pieces)}
    begun = accepted.model_copy(update={"settings": state.settings, "stray": tuple(sorted(stray))})
    if begun != accepted:
        _write(store, begun)
    receipts = _map(store, pieces, options)
    mapped = time.monotonic()
    kept = {file.key: accepted.read[file.key] for file in files if file.key in accepted.read}
    read = kept | _by_file(pieces, receipts)
    state = state.model_copy(update={"read": dict(sorted(read.items()))})
    figures = _count(list(state.read.values()))
    _check_rejected(figures, options.max_rejected_share)
    described = _merge_entities(store, accepted, state)
    dropped = {read.reading for key, read in accepted.read.items() if key not in state.read}
    stray = (stray | dropped) - {read.reading for read in state.read.values()}
    state = state.model_copy(update={"entities": described, "stray": tuple(sorted(stray))})
    _write(store, state)
    # From here until its manifest is back, the telemetry is between two states and nobody reads it.
    store.remove(f"telemetry/{MANIFEST}")
    days = _days(state)
    try:
        telemetry = _build_telemetry(store, options, state, days)
        _build_entities(store, options, described)
        combined = time.monotonic()
        dependencies = _build_dependencies(store, options, state, days, telemetry)
    except InputError as error:
        if not _forget_lost(store, state):
            raise
        log.warning("ingest: %s; their raw files are read again", error)
        return ingest(store, source, options)
    finished = time.monotonic()
    outputs = telemetry | dependencies
    _drop_unplanned(store, set(outputs))
    kinds = {kind: [r for path, r in outputs.items() if f"/{kind}-" in path] for kind in TELEMETRY}
    figures["bins"] = {kind: sum(r["rows"] for r in made) for kind, made in kinds.items() if made}
    figures["dependencies"] = _sum_counters(r["edges"] for r in outputs.values() if "edges" in r)
    peaks = {
        stage: max((r.get("peak_bytes", 0) for r in made), default=0)
        for stage, made in (
            ("chunks", receipts),
            ("telemetry", telemetry.values()),
            ("dependencies", dependencies.values()),
        )
    }
    figures["peak_bytes"] = max(peaks.values())
    if not any(kinds.values()):
        tables = " or ".join(TRACES[options.trace].telemetry)
        raise InputError(f"the source has no usable row of {tables}; nothing to forecast")
    store.write_json(
        f"telemetry/{MANIFEST}",
        {
            "settings": state.settings,
            "metrics": list(TRACES[options.trace].metrics),
            "normalised": sorted(TRACES[options.trace].normalised),
            "spans": {
                kind: {"first": min(r["first"] for r in made), "last": max(r["last"] for r in made)}
                for kind, made in kinds.items()
                if made
            },
            "fingerprint": fingerprint([state.settings, sorted(state.read)]),
            "files": sorted(outputs),
            "rows": max(r["rows"] for made in kinds.values() for r in made),
            "figures": figures,
        },
    )
    _clean_up(store, state)
    seconds = {
        "chunks": round(mapped - started, 2),
        "telemetry": round(combined - mapped, 2),
        "dependencies": round(finished - combined, 2),
    }
    return {**figures, "stage_seconds": seconds, "stage_peak_bytes": peaks, "skipped": False}


# -- what is accepted ------------------------------------------------------------------------------------


def _settings(options: IngestOptions) -> dict[str, Any]:
    return options.model_dump(mode="json", include=set(_SETTINGS))


def _write(store: Store, state: Accepted) -> None:
    store.write_json(ACCEPTED, state.model_dump(mode="json"))


def _accepted(store: Store, options: IngestOptions) -> tuple[Accepted, IngestOptions]:
    """What is accepted so far, and the options with the store's number of buckets if there is one.

    Raises InputError if the store has other settings.
    """
    saved = store.read_json(ACCEPTED) or {}
    had = saved.get("settings") or {}
    if options.buckets is None:
        options = options.model_copy(update={"buckets": had.get("buckets")})
    settings = _settings(options)
    if had == settings and saved.get("format") == _FORMAT:
        return Accepted(**saved), options
    if had == settings and saved["files"]:
        raise InputError(f"{store.uri}: was ingested by an earlier version; ingest into another store")
    if saved.get("files"):
        name, value = next((name, value) for name, value in settings.items() if had.get(name) != value)
        raise InputError(
            f"--{name} {value}: the store {store.uri} was ingested with {had.get(name)}; "
            "use that, or another store"
        )
    if saved:  # what a run with other settings, or of another version, has left that never came to its end
        store.remove("ingested")
    return Accepted(settings={}, stray=saved.get("stray", ())), options


def _buckets(files: list[RawFile]) -> int:
    """One for each 5 GB of raw rows."""
    rows = sum(file.size * (1 if file.uri.endswith(".csv") else _PACKED) for file in files)
    return max(1, min(100, round(rows / _BUCKET_BYTES)))


def _with_new(accepted: list[RawFile], found: list[RawFile]) -> list[RawFile]:
    """Accepted files and found ones, each content once; a path with other content replaces what it had."""
    files = {file.uri: file for file in [*accepted, *found]}
    known = set(accepted)
    old_first = sorted(files.values(), key=lambda file: (file not in known, file.uri))
    by_key: dict[str, RawFile] = {}
    for file in old_first:
        if (same := by_key.setdefault(file.key, file)) is not file:
            log.warning("%s: same content as %s, left out", file.uri, same.uri)
    return sorted(by_key.values(), key=lambda file: file.uri)


def _by_file(pieces: list[Chunk], receipts: list[dict[str, Any]]) -> dict[str, Read]:
    """The receipts of each file's chunks, summed."""
    found: dict[str, dict[str, Any]] = {}
    for piece, receipt in zip(pieces, receipts, strict=True):
        total = found.setdefault(
            piece.file.key,
            {
                "table": piece.file.table,
                "reading": piece.reading,
                "rows": 0,
                "bytes": 0,
                "rejected": Counter(),
                "nulled": Counter(),
                "parts": {},
                "partial": Counter(),
            },
        )
        for name in ("rows", "bytes"):
            total[name] += receipt[name]
        for name in ("rejected", "nulled", "partial"):
            total[name].update(receipt[name])
        total["parts"] |= receipt["places"]
    for total in found.values():
        largest: dict[str, int] = {}
        total["largest"] = largest
        partial = total.pop("partial")
        for place, rows in partial.items():
            product = place.split("/")[0]
            largest[product] = max(rows, largest.get(product, 0))
        total["places"] = sorted(partial)
        index = {place: i for i, place in enumerate(total["places"])}
        total["parts"] = {file: [index[place] for place in those] for file, those in total["parts"].items()}
    return {key: Read(**total) for key, total in found.items()}


def _days(state: Accepted) -> Days:
    """Where the accepted files have rows."""
    days: Days = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for read in sorted(state.read.values(), key=lambda read: read.reading):
        for place, parts in read.by_place().items():
            if place != _DESCRIBED:
                product, day, bucket = place.split("/")
                days[product][day][bucket].update(parts)
    return days


def _forget_lost(store: Store, state: Accepted) -> bool:
    """Takes back the acceptance of files whose parts are not all there; whether there were any."""
    there = set(store.list(PARTS))
    whole = {key: read for key, read in state.read.items() if there.issuperset(read.parts)}
    lost = len(whole) < len(state.read)
    if lost:
        _write(store, state.model_copy(update={"read": whole}))
        store.remove(RECEIPTS)
    return lost


# -- the map side ----------------------------------------------------------------------------------------


def _map(store: Store, pieces: list[Chunk], options: IngestOptions) -> list[dict[str, Any]]:
    """The receipts of the chunks, in their order."""
    complete = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in store.list(RECEIPTS, ".json")}
    new = [piece for piece in pieces if piece.id not in complete]
    log.info("ingest: %d chunks to read, %d complete", len(new), len(pieces) - len(new))

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return ingest_chunk(store, Chunk(**item), options)

    room = memory.reading(BLOCK_BYTES, FLUSH_ROWS)
    fresh = spread([piece.model_dump() for piece in new], work, "ingest: chunks", memory=room)
    receipts = {piece.id: receipt for piece, receipt in zip(new, fresh, strict=True)}
    return [receipts.get(piece.id) or store.read_json(f"{RECEIPTS}/{piece.id}.json") for piece in pieces]


def _count(files: list[Read]) -> dict[str, Any]:
    rows: Counter[str] = Counter()
    rejected: dict[str, Counter[str]] = defaultdict(Counter)
    nulled: dict[str, Counter[str]] = defaultdict(Counter)
    for read in files:
        rows[read.table] += read.rows
        rejected[read.table].update(read.rejected)
        nulled[read.table].update(read.nulled)
    return {
        "rows_read": dict(sorted(rows.items())),
        "rows_rejected": {table: dict(sorted(found.items())) for table, found in rejected.items() if found},
        "values_nulled": {table: dict(sorted(found.items())) for table, found in nulled.items() if found},
        "raw_bytes": sum(read.bytes for read in files),
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


def _merge_entities(store: Store, accepted: Accepted, state: Accepted) -> str | None:
    """The file of all parts that describe entities: what there was and the new ones, or, where a file was
    replaced, all of them anew. Its name says what is in it."""
    if state.read.keys() == accepted.read.keys():
        return accepted.entities
    added = [key for key in state.read if key not in accepted.read]
    grown = accepted.entities is not None and accepted.read.keys() <= state.read.keys()
    parts: dict[str, int] = {}
    for key in added if grown else state.read:
        parts |= state.read[key].by_place().get(_DESCRIBED, {})
    if grown:
        parts[str(accepted.entities)] = 0
    if not parts:
        return None
    target = f"{_ENTITIES}/{fingerprint(sorted(state.read))}.arrow"

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return merge_parts(store, "entities", item["parts"], item["target"])

    spread([{"parts": parts, "target": target}], work, "ingest: entities of the new files")
    return target


# -- the reduce side -------------------------------------------------------------------------------------


def _rows(state: Accepted, days: Days, *products: str) -> int:
    """Most partial rows that a day and bucket can have of some products together."""
    largest = {read.reading: read.largest for read in state.read.values()}
    return sum(
        max(
            (
                sum(largest[reading].get(product, 0) for reading in set(map(reading_of, parts)))
                for buckets in days[product].values()
                for parts in buckets.values()
            ),
            default=0,
        )
        for product in products
    )


def _build_telemetry(
    store: Store, options: IngestOptions, state: Accepted, days: Days
) -> dict[str, dict[str, Any]]:
    """Builds the days that are stale; returns the receipts of all, by path."""
    metrics = TRACES[options.trace].metrics
    plan = {
        f"telemetry/date={day}/{kind}-{bucket}.parquet": {"kind": kind, "parts": parts}
        for kind in TELEMETRY
        for day, buckets in sorted(days[kind].items())
        for bucket, parts in sorted(buckets.items())
    }

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return combine_telemetry(store, item["kind"], item["parts"], item["target"], metrics)

    room = memory.merging(max(_rows(state, days, kind) for kind in TELEMETRY), FLUSH_ROWS)
    return make(store, plan, work, f"{_OUTPUTS}/telemetry", "ingest: days", room)


def _build_entities(store: Store, options: IngestOptions, described: str | None) -> None:
    """Builds the table of entities from the file of their descriptions."""

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return combine_entities(store, item["parts"], item["target"], int(options.start.timestamp()))

    plan = {} if described is None else {"entities/entities.parquet": {"parts": {described: 0}}}
    make(store, plan, work, f"{_OUTPUTS}/entities", "ingest: entities")


def _build_dependencies(
    store: Store, options: IngestOptions, state: Accepted, days: Days, telemetry: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Builds the days of dependencies that are stale; returns the receipts of all, by path."""

    def work(item: dict[str, Any]) -> dict[str, Any]:
        if "calls" in item:
            return combine_calls(store, options, item)
        return combine_dependencies(store, options, _PLACEMENTS, item)

    plan = _dependency_plan(days, telemetry, _place_containers(store, days))
    # Of one day and the day before, or of all buckets of a day; placements are few.
    calls = (options.buckets or 1) * _rows(state, days, "calls")
    most = max(calls, _rows(state, days, "spans"), 2 * _rows(state, days, "tasks", "instances"))
    room = memory.merging(most, FLUSH_ROWS)
    return make(store, plan, work, f"{_OUTPUTS}/dependencies", "ingest: dependencies", room)


def _place_containers(store: Store, days: Days) -> dict[str, str]:
    """Brings the placements of containers up to date; returns a digest of each day's.

    A day goes on from the day before, so all days from the first stale one are written again, by one task:
    the rows are few.
    """
    if not days["hosted"] or not days["machine"]:
        return {}
    first, last = min(days["hosted"]), max(days["machine"])
    plan: dict[str, str] = {}
    digest = ""
    for day in sorted({*days["hosted"], *days["machine"]}):
        if first <= day <= last:
            plan[day] = digest = fingerprint([digest, days["hosted"].get(day)])
    saved: dict[str, list[str]] = store.read_json(f"{_PLACEMENTS}.json") or {}
    current = [day for day in plan if day in saved and saved[day][0] == plan[day]]
    if len(current) == len(plan) == len(saved):
        return {day: saved[day][1] for day in plan}

    known = {day: saved[day] for day in current}
    store.write_json(f"{_PLACEMENTS}.json", known)  # what follows is not whole until it is written again
    stale = [day for day in plan if day not in known]
    item = {
        "days": [{"day": day, "parts": days["hosted"].get(day, {})} for day in stale],
        "before": max(known, default=None),
    }

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return {"digests": place_containers(store, _PLACEMENTS, item["days"], item["before"])}

    for receipt in spread([item] if stale else [], work, "ingest: placements"):
        known |= {day: [plan[day], digest] for day, digest in zip(stale, receipt["digests"], strict=True)}
    store.write_json(f"{_PLACEMENTS}.json", known)
    for day in saved.keys() - known.keys():
        store.remove(f"{_PLACEMENTS}/date={day}.parquet")
    return {day: digest for day, (_, digest) in known.items()}


def _dependency_plan(
    days: Days, telemetry: dict[str, Any], placed: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Target → what one day's dependencies are made of.

    A job may run past midnight, so a day's batch edges need the instances of the day before. Where the source
    has neither jobs nor placements of containers, correlation of the telemetry of the day before stands in.
    """
    recorded = days["hosted"] or days["instances"]
    machines: dict[str, list[str]] = defaultdict(list)
    for path in sorted(telemetry):
        if "/machine-" in path:
            machines[path.split("/")[1].removeprefix("date=")].append(path)
    plan = {}
    for day in sorted(machines):
        yesterday = str(date.fromisoformat(day) - timedelta(days=1))
        recent = {
            product: {near: days[product][near] for near in (yesterday, day) if near in days[product]}
            for product in ("tasks", "instances")
        }
        item: dict[str, Any] = {"day": day, **recent, "placed": placed.get(day), "telemetry": []}
        if not recorded:
            item["telemetry"] = machines.get(yesterday, [])
            item["inputs"] = [telemetry[path]["inputs"] for path in item["telemetry"]]
        plan[f"dependencies/date={day}/machine.parquet"] = item
    for day in sorted({*days["calls"], *days["spans"]}):
        called = {product: days[product].get(day, {}) for product in ("calls", "spans")}
        plan[f"dependencies/date={day}/service.parquet"] = {"day": day, **called}
    return plan


def _drop_unplanned(store: Store, targets: set[str]) -> None:
    """Days that a replaced file has taken with it."""
    for path in [*store.list("telemetry", ".parquet"), *store.list("dependencies", ".parquet")]:
        if path not in targets:
            store.remove(path)


def _clean_up(store: Store, state: Accepted) -> None:
    """What only a job that is under way needs; and what files that were replaced, or runs that died and never
    went on, have left behind. The latter are searched for among all parts, but only where there are some."""
    store.remove(RECEIPTS)
    drop_other_indexes(store, state.files)
    for path in store.list(_ENTITIES):
        if path != state.entities:
            store.remove(path)
    if state.stray:
        known = {read.reading for read in state.read.values()}
        for path in [*store.list(PARTS), *store.list("rejected")]:
            if reading_of(path) not in known:
                store.remove(path)
        _write(store, state.model_copy(update={"stray": ()}))


def _sum_counters(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))

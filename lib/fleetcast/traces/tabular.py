"""Any table as a source: Parquet or CSV files, of which nothing is known but the names of their columns.

A long table has a row for each entity and time:      time, entity, metric, metric, …
A wide one has a row for each time, and a column      time, entity, entity, …          of one metric,
for each entity, or each entity and metric:           time, <entity>_<metric>, …       where columns end so.
It may be in many files, whose names may say of which entity or metric they are (`TabularOptions.file_name`).

Rows are read batch by batch, binned, and put together day by day, as ingest does, but in one process: memory
is that of a batch, of the bins that are held before they are written, and of one day's bins. A matrix and the
pairs of entities that edges join have to fit into memory. That is about 1 GB and 200,000 rows a second, so
tables of much more than 10 GB belong to a source that ingest spreads over a cluster.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from fleetcast.errors import InputError
from fleetcast.store import ACCEPTED, MANIFEST, Store, fingerprint
from fleetcast.traces.clock import Clock, Times, read_times
from fleetcast.traces.columns import ColumnFile, candidates, finite, reject, texts
from fleetcast.traces.edges import Graph
from fleetcast.traces.layout import ROLES, Layout, check_all_metrics
from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.parts import PartWriter, by_place, combine_entities, combine_telemetry

log = logging.getLogger("fleetcast")

TRACE = "tabular"
#: Of what is written: a store that holds another's is loaded anew.
_FORMAT = 3
_DAY = 86_400
#: Steps that are only numbered are taken to be this wide [s].
_ASSUMED_STEP = 300
#: Partial bins that are held before they are written [bytes].
_HELD_BYTES = 128 << 20
#: Texts that say that there is no value.
_NO_VALUE = frozenset({"", "-", "na", "n/a", "nan", "null", "none"})
#: Files from which the step is told.
_TIMED_FILES = 16


def load(store: Store, options: TabularOptions) -> dict[str, Any]:
    """Makes the table the store's telemetry, entities and dependencies, unless it is that already.

    Returns the figures that ingest has too, `rows_read`, `rows_rejected` (by reason) and `values_nulled`
    (what was no finite number, by metric), of `table` and of `edges`; and `files`, `entities`, `metrics`,
    `step` [s], `bins`, `edges` (pairs that are joined), `clocks` (columns of times that are off: `file`,
    `column`, `offset` [s] from the one `used`) and `skipped`. Readers see the table that was there before or
    this one whole; a run that died is simply run again. Raises InputError, with nothing published but the
    rejected rows, if a column or a file cannot be used, or no row can.
    """
    store.open_or_create()
    table = _opened("table", options.table, options)
    edges = [] if options.edges is None else _opened("edges", options.edges, options)
    state = _state(options, table, edges)
    accepted = store.read_json(ACCEPTED) or {"settings": {}, "files": []}
    if accepted["files"] and accepted["settings"].get("trace") != TRACE:
        raise InputError(
            f"--store {store.uri}: holds the trace {accepted['settings'].get('trace')}; use another store"
        )
    keys = [[file.key, file.name if options.file_name else ""] for file in [*table, *edges]]
    digest = fingerprint([state["settings"], keys])
    saved = store.read_json(f"telemetry/{MANIFEST}")
    if saved is not None and saved["fingerprint"] == digest:
        log.info("tabular: nothing new in %s", options.table)
        return {**saved["figures"], "skipped": True}

    work = f"_work/{TRACE}"
    store.remove(work)
    files, times = _read_layouts(table, options)
    clock = _clock(files, times, options)
    telemetry = _load_telemetry(store, work, files, times, clock, options)
    figures = telemetry["figures"]
    slice_width = _DAY
    if edges:
        units = _units(store, work, options)
        order = list(files[0][1].cells)
        graph = Graph.of(edges, options, clock, [of.middle for of in times.values()], order, units)
        found = graph.load(store, work, options.level, units, telemetry["spans"][options.kind])
        slice_width = graph.slice
        figures["edges"] = found.pairs
        figures["rows_read"]["edges"] = found.rows
        figures["rows_rejected"] |= {"edges": found.rejected} if found.rejected else {}
        figures["clocks"] += graph.clocks
    store.write_json(
        f"{work}/telemetry/{MANIFEST}",
        {
            "settings": {"trace": TRACE, "step": clock.step, "slice": slice_width},
            "metrics": list(options.names),
            "spans": telemetry["spans"],
            "fingerprint": digest,
            "files": [path.removeprefix(f"{work}/") for path in _finished(store, work)],
            "figures": figures,
        },
    )
    _publish(store, work, state)
    return {**figures, "skipped": False}


def _opened(option: str, uri: str, options: TabularOptions) -> list[ColumnFile]:
    """The files of an option, each content once unless their names say what they hold."""
    files = ColumnFile.open_all(option, uri)
    if options.file_name is not None:
        return files
    first: dict[str, ColumnFile] = {}
    for file in files:
        if (same := first.setdefault(file.key, file)) is not file:
            log.warning("%s: same content as %s, left out", file.uri, same.uri)
    return list(first.values())


def _state(options: TabularOptions, table: list[ColumnFile], edges: list[ColumnFile]) -> dict[str, Any]:
    """What the store's telemetry is made of, as ingest keeps it."""
    given = options.model_dump(mode="json", exclude={"table", "edges"})
    settings = {"trace": TRACE, "format": _FORMAT, **given}
    return {
        "settings": settings,
        "files": [{"table": f.option, "uri": f.uri, "size": f.size, "key": f.key} for f in [*table, *edges]],
    }


def _finished(store: Store, work: str) -> list[str]:
    nouns = ("telemetry", "dependencies")
    return [path for noun in nouns for path in store.list(f"{work}/{noun}", ".parquet")]


def _publish(store: Store, work: str, state: dict[str, Any]) -> None:
    store.write_json(ACCEPTED, state)
    # From here until its manifest is back, the telemetry is between two states and nobody reads it.
    store.remove(f"telemetry/{MANIFEST}")
    for noun in ("entities", "dependencies", "rejected", "telemetry"):
        if store.exists(f"{work}/{noun}"):
            store.publish(f"{work}/{noun}", noun)
        else:
            store.remove(noun)
    store.remove(work)


# -- the table ---------------------------------------------------------------------------------------------

#: The files of a table, each with what its columns hold.
_Files = Sequence[tuple[ColumnFile, Layout]]


def _read_layouts(table: Sequence[ColumnFile], options: TabularOptions) -> tuple[_Files, dict[str, Times]]:
    """The files that have rows, with their layouts and, by name, their times."""
    if not options.time:
        if len(table) > 1:
            raise InputError(
                f"--table {options.table}: {len(table)} files, whose rows have no order without --time"
            )
        files = [(table[0], Layout.of(table[0], options, None))]
        check_all_metrics(files, options)
        return files, {}
    of_time = candidates("time", table, options.time)
    # Before any row is read, so that a wrong column is told at once.
    layouts = {file.name: Layout.of(file, options, of_time[file.name][0]) for file in table}
    samples: dict[str, pl.DataFrame] = {}
    empty: InputError | None = None
    for file in table:
        try:
            samples[file.name] = file.sample("time", of_time[file.name])
        except InputError as error:
            log.warning("%s", error)
            empty = error
    if not samples:
        assert empty is not None, "there is a file"
        raise empty
    start, assumed = int(options.start.timestamp()), options.step or _ASSUMED_STEP
    times = read_times("time", samples, options.time_unit, start, assumed)
    read = [file for file in table if file.name in times]
    files = [(file, replace(layouts[file.name], time=times[file.name].column)) for file in read]
    check_all_metrics(files, options)
    return files, times


def _clock(files: _Files, times: dict[str, Times], options: TabularOptions) -> Clock:
    """The first file's clock, with the step of the telemetry."""
    start, assumed = int(options.start.timestamp()), options.step or _ASSUMED_STEP
    clock = next((of.clock for of in times.values()), Clock("step", start, assumed))
    if clock.unit == "step":
        if options.step is None:
            log.warning("tabular: a step is taken to be %d s wide; --step says otherwise", assumed)
        return clock
    return clock if options.step is not None else Clock(clock.unit, start, _step(files, times, options))


def _step(files: _Files, times: dict[str, Times], options: TabularOptions) -> int:
    """The step from the gaps between the times of one entity, the most frequent of the first batch; or of the
    entities of some files, where their names say them."""
    often: Any = None
    found: dict[Any, list[np.ndarray]] = defaultdict(list)
    for table, layout in files[:_TIMED_FILES] if "entity" in options.labels else files:
        of = times[table.name]
        column = layout.roles.get("entity")
        for batch in table.batches([*([] if column is None else [column]), of.column]):
            frame = batch.frame
            if column is not None:
                names = frame[column].cast(pl.String)
                if often is None:
                    often = names.drop_nulls().mode().sort().first()
                frame = frame.filter(names == often)
            seen = of.clock.milliseconds(frame[of.column]).drop_nulls().unique().to_numpy()
            found[layout.labels.get("entity", often)].append(seen)
    gaps = np.concatenate([np.diff(np.unique(np.concatenate(one))) for one in found.values()]) / 1000
    gap = float(np.median(gaps)) if len(gaps) else None
    if gap is None or gap > 1.5 * _DAY:
        what = "a single time" if gap is None else f"a time every {gap:,.0f} s"
        raise InputError(
            f"--step: cannot be told from {options.table}, where {often or 'the table'} has {what}; expected "
            "a duration that divides a day"
        )
    divisors = [width for width in range(1, _DAY + 1) if _DAY % width == 0]
    step = min(divisors, key=lambda width: abs(np.log(width / gap)))
    log.info("tabular: step %d s, from a median gap of %g s", step, gap)
    return step


def _load_telemetry(
    store: Store,
    work: str,
    files: _Files,
    times: dict[str, Times],
    clock: Clock,
    options: TabularOptions,
) -> dict[str, Any]:
    """Writes days of telemetry, and the entities; returns the `spans` and `figures` of the manifest."""
    rows = 0
    places: dict[str, list[str]] = {}
    reasons: Counter[str] = Counter()
    nulled: Counter[str] = Counter()
    for table, layout in files:
        writer = PartWriter(
            store,
            (f"{work}/parts", f"{work}/rejected"),
            ("table", table.name.rsplit("/", 1)[-1], fingerprint([table.key, table.name])),
            flush_rows=_HELD_BYTES // (40 + 16 * len(layout.metrics)),
        )
        of = times.get(table.name)
        for usable, count, rejected, bad in _usable(
            table, layout, clock if of is None else of.clock, options
        ):
            rows += count
            nulled.update(bad)
            if len(rejected):
                reasons.update(rejected["reason"].to_list())
                writer.reject(rejected)
            if len(usable):
                writer.add(options.kind, _bins(usable, layout.metrics, clock.step))
                writer.add("entities", _entities(usable, options))
        writer.flush()
        places |= writer.places
    _check_rejected(store, work, rows, reasons, options)
    metrics = {metric: column.divisor for metric, column in options.columns.items()}
    receipts = []
    for place, parts in by_place(places).items():
        product, _, day = place.removesuffix("/00").partition("/")
        if product == options.kind:
            target = f"{work}/telemetry/date={day}/{options.kind}-00.parquet"
            receipts.append(combine_telemetry(store, options.kind, parts, target, metrics))
        else:
            combine_entities(store, parts, f"{work}/entities/entities.parquet")
    span = {"first": min(r["first"] for r in receipts), "last": max(r["last"] for r in receipts)}
    bad_values = {metric: nulled[metric] for metric in options.names if nulled[metric]}
    figures = {
        "rows_read": {"table": rows},
        "rows_rejected": {"table": dict(sorted(reasons.items()))} if reasons else {},
        "values_nulled": {"table": bad_values} if bad_values else {},
        "files": len(files),
        "entities": len(_named(store, work, options)),
        "metrics": list(options.names),
        "step": clock.step,
        "edges": 0,
        "bins": sum(r["rows"] for r in receipts),
        "clocks": [off for of in times.values() for off in of.off],
    }
    return {"spans": {options.kind: span}, "figures": figures}


def _usable(
    table: ColumnFile, layout: Layout, clock: Clock, options: TabularOptions
) -> Iterator[tuple[pl.DataFrame, int, pl.DataFrame, dict[str, int]]]:
    """Batch by batch: long rows, how many rows were read, the rejected ones, values that became null."""
    unchecked = set(layout.values)
    needed = ("entity", "service") if options.level == "service" else ("entity",)
    for batch in table.batches(layout.columns):
        frame = batch.frame
        numbers = {name: finite(frame[name]) for name in layout.values}
        unchecked -= {name for name in unchecked if _is_numeric(table, layout, frame[name], numbers[name])}
        values = pl.DataFrame(numbers)
        named = {role: texts(frame[column]) for role, column in layout.roles.items()}
        time = clock.milliseconds(batch.offset if layout.time is None else frame[layout.time])
        checks = {f"{layout.roles[role]} is empty": named[role].is_null() for role in needed if role in named}
        if layout.time is not None:
            checks[f"{layout.time} is empty"] = frame[layout.time].is_null()
        checks["the time cannot be read"] = time.is_null()
        checks["no metric has a value"] = values.select(pl.all_horizontal(pl.all().is_null())).to_series()
        keep, rejected = reject(frame, batch.offset, checks)
        rejected = pl.concat([batch.broken, rejected]).sort("offset")
        bad: Counter[str] = Counter()
        for name in layout.values:
            bad[layout.values[name]] += values[name].null_count() - frame[name].null_count()
        kept = {role: names.filter(keep) for role, names in named.items()}
        usable = layout.long(values.filter(keep), kept, time.filter(keep))
        yield usable, len(frame) + len(batch.broken), rejected, bad


def _is_numeric(table: ColumnFile, layout: Layout, raw: pl.Series, numbers: pl.Series) -> bool:
    """Whether a column holds numbers; False while that is open. Raises InputError if it does not."""
    if numbers.null_count() < len(numbers):
        return True
    some = raw.drop_nulls()
    if raw.dtype == pl.String:
        some = some.filter(~some.str.strip_chars().str.to_lowercase().is_in(list(_NO_VALUE)))
    if raw.dtype.is_numeric() or some.is_empty():
        return False
    wide = "; a wide table has entities only, a long one needs --entity" if layout.cells else ""
    raise InputError(
        f"--metrics {layout.values[raw.name]}: column {raw.name} of {table.uri} is not numeric, expected "
        f"numbers, got {some[0]!r}{wide}"
    )


def _bins(rows: pl.DataFrame, metrics: tuple[str, ...], step: int) -> pl.DataFrame:
    """Partial bins, as `PRODUCTS` merges them: per metric sum, count and maximum; and `samples`."""
    width = 1000 * step
    start = (pl.col("time") // width * width).cast(pl.Datetime("ms", "UTC"))
    return rows.group_by("entity", start).agg(
        pl.col(metrics).sum().name.suffix("_sum"),
        pl.col(metrics).count().name.suffix("_count"),
        pl.col(metrics).max().cast(pl.Float32).name.suffix("_max"),
        pl.len().alias("samples"),
    )


def _entities(rows: pl.DataFrame, options: TabularOptions) -> pl.DataFrame:
    """Descriptions, as `PRODUCTS` merges them. A service without containers is its own only one."""
    has_services = options.service is not None or "service" in options.labels
    service = pl.col("service") if has_services or options.level != "service" else pl.col("entity")
    seen = rows.group_by(ROLES).agg(pl.col("time").max())
    return seen.select(
        "entity",
        kind=pl.lit(options.kind),
        parent=pl.col("machine"),
        service=service,
        cpu_capacity=pl.lit(None, pl.Float32),
        memory_capacity=pl.lit(None, pl.Float32),
        measured=pl.lit(True),
        seen=pl.col("time") // 1000,
    )  # fmt: skip


def _check_rejected(
    store: Store, work: str, rows: int, reasons: Counter[str], options: TabularOptions
) -> None:
    """Refuses a table of which too many rows cannot be used; what they are stays in `rejected/`."""
    limit = options.max_rejected_share
    if not rows:
        raise InputError(f"--table {options.table}: has no usable row, expected some below the header")
    bad = reasons.total()
    if bad < rows and bad <= limit * rows:
        return
    why = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items()))
    store.remove("rejected/table")
    store.publish(f"{work}/rejected/table", "rejected/table")
    store.remove(work)
    what = "has no usable row" if bad == rows else f"{bad:,} of {rows:,} rows cannot be used"
    raise InputError(
        f"--table {options.table}: {what} ({why}), expected at most --max-rejected-share {limit}; the rows "
        "are in rejected/table, nothing was published"
    )


def _named(store: Store, root: str, options: TabularOptions) -> pl.DataFrame:
    """The entities that there is telemetry of."""
    entities: Any = pl.from_arrow(store.read_table(f"{root}/entities/entities.parquet"))
    named: pl.DataFrame = entities.filter(pl.col("kind") == options.kind)
    return named


def _units(store: Store, root: str, options: TabularOptions) -> list[str]:
    """What edges may join: the entities, or their services."""
    named = _named(store, root, options)
    return list(named["service" if options.level == "service" else "entity"].unique().drop_nulls().sort())

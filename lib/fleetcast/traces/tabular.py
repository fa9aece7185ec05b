"""Any table as a source: a Parquet or CSV file, of which nothing is known but the names of its columns.

A long table has a row for each entity and time:      time, entity, metric, metric, …
A wide one has a row for each time, and a column      time, entity, entity, …          of one metric,
for each entity, or each entity and metric:           time, <entity>_<metric>, …       where columns end so.

Rows are read batch by batch, binned, and put together day by day, as ingest does, but in one process: memory
is that of a batch, of the bins that are held before they are written, and of one day's bins. A matrix and the
pairs of entities that edges join have to fit into memory. That is about 1 GB and 200,000 rows a second, so
tables of much more than 10 GB belong to a source that ingest spreads over a cluster.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, field_validator, model_validator

from fleetcast.config import Options, Seconds
from fleetcast.errors import InputError
from fleetcast.store import ACCEPTED, MANIFEST, Store, fingerprint
from fleetcast.traces.clock import Clock, median_gap, read_clock
from fleetcast.traces.columns import ColumnFile, finite, reject, texts
from fleetcast.traces.edges import ROLES, Graph
from fleetcast.traces.parts import PartWriter, by_place, combine_entities, combine_telemetry

log = logging.getLogger("fleetcast")

TRACE = "tabular"
#: Of what is written: a store that holds another's is loaded anew.
_FORMAT = 2
_DAY = 86_400
#: Steps that are only numbered are taken to be this wide [s].
_ASSUMED_STEP = 300
#: Partial bins that are held before they are written [bytes].
_HELD_BYTES = 128 << 20
#: Columns that telemetry and shards have beside the metrics.
_TAKEN = frozenset({"entity", "time", "samples", "step", "index", "group"})
#: Columns that pandas writes for an index without a name.
_NAMELESS = ("", "Unnamed: 0", "__index_level_0__")
#: Texts that say that there is no value.
_NO_VALUE = frozenset({"", "-", "na", "n/a", "nan", "null", "none"})


class TabularOptions(Options):
    """From a table to telemetry, entities and dependencies."""

    table: str
    """The rows: a .parquet, .csv or .csv.gz file, local or `s3://…`."""
    entity: str | None = None
    """Column that names what a row is about. Not given for a wide table, whose columns are the entities."""
    time: str | None = None
    """Column of times. Not given where the rows of a wide table are consecutive steps."""
    metrics: tuple[str, ...] = Field(min_length=1)
    """Columns to keep as metrics. Of a wide table, what its values are: the metric of all columns, or the
    endings of columns that are called `<entity>_<metric>`."""
    step: Seconds | None = None
    """Width of a telemetry bin [s, or 5min]; must divide a day. If not given, the divisor of a day that is
    nearest to the median gap between an entity's times; 5min where steps are only numbered."""
    time_unit: Literal["auto", "s", "ms", "us", "ns", "step"] = "auto"
    """What numbers in the time column are: Unix time in s, ms, us or ns, or numbers of steps. `auto` tells
    by how they rise and by their magnitude. Dates and ISO 8601 texts are what they are, naive ones UTC."""
    start: datetime = datetime(2018, 1, 1, tzinfo=UTC)
    """UTC time of step 0 where steps are only numbered; a Monday is assumed."""
    level: Literal["machine", "service", "container"] = "service"
    """What an entity is."""
    edges: str | None = None
    """The graph: a file with an edge list; or, of a wide table, a .csv file without a header that is a square
    matrix of weights, from row i to column j, in the order of the table's entities."""
    edges_source: str | None = None
    """Column of the edge list: where the load comes from; `source` or `from` if not given."""
    edges_target: str | None = None
    """Column of the edge list: where it goes; `target` or `to` if not given."""
    edges_weight: str | None = None
    """Column of the edge list: how much; `weight` or `value` if not given, and 1 without such a column."""
    edges_time: str | None = None
    """Column of the edge list: when; `time` or `timestamp` if not given. Without such a column the edges hold
    at all times."""
    max_rejected_share: float = Field(0.5, ge=0, le=1)
    """A table with a larger share of unusable rows [0-1] is refused: most likely an option is wrong."""

    @field_validator("metrics")
    @classmethod
    def _storable(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(metrics)) != len(metrics):
            raise ValueError("expected each metric once")
        for metric in metrics:
            if metric in _TAKEN:
                raise ValueError(f"the store keeps the name {metric} for itself; rename the column")
            if metric.removesuffix("_max") in set(metrics) - {metric}:
                raise ValueError(
                    f"the store keeps {metric} for the maximum of {metric.removesuffix('_max')} in a bin; "
                    "leave one of them out"
                )
        return metrics

    @field_validator("step")
    @classmethod
    def _divides_a_day(cls, step: int | None) -> int | None:
        if step is not None and (step < 1 or _DAY % step):
            raise ValueError("expected a width that divides a day")
        return step

    @field_validator("start")
    @classmethod
    def _in_utc(cls, start: datetime) -> datetime:
        return start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)

    @model_validator(mode="after")
    def _long_tables_have_times(self) -> TabularOptions:
        if self.entity is not None and self.time is None:
            raise ValueError(f"entity ({self.entity}) names a long table, expected time as well")
        return self

    @property
    def kind(self) -> str:
        """Of the telemetry. A service's is that of its containers; here it is its own only one."""
        return "container" if self.level == "service" else self.level


def load(store: Store, options: TabularOptions) -> dict[str, Any]:
    """Makes the table the store's telemetry, entities and dependencies, unless it is that already.

    Returns `rows` (read), `entities`, `metrics`, `step` [s], `bins`, `edges` (pairs that are joined),
    `rejected` (rows of `table` and of `edges` by reason), `values_nulled` (what was no finite number, by
    metric) and `skipped`. Readers see the table that was there before or this one whole; a run that died is
    simply run again. Raises InputError, with nothing published but the rejected rows, if a column or a file
    cannot be used, or no row can.
    """
    store.open_or_create()
    table = ColumnFile.open("table", options.table)
    edges = None if options.edges is None else ColumnFile.open("edges", options.edges)
    state = _state(options, table, edges)
    accepted = store.read_json(ACCEPTED) or {"settings": {}, "files": []}
    if accepted["files"] and accepted["settings"].get("trace") != TRACE:
        raise InputError(
            f"--store {store.uri}: holds the trace {accepted['settings'].get('trace')}; use another store"
        )
    digest = fingerprint([state["settings"], [file["key"] for file in state["files"]]])
    saved = store.read_json(f"telemetry/{MANIFEST}")
    if saved is not None and saved["fingerprint"] == digest:
        log.info("tabular: nothing new in %s", options.table)
        return {**saved["figures"], "skipped": True}

    work = f"_work/{TRACE}"
    store.remove(work)
    layout = Layout.of(table, options)
    clock = _clock(table, layout, options)
    telemetry = _load_telemetry(store, work, table, layout, clock, options)
    figures = telemetry["figures"]
    slice_width = _DAY
    if edges is not None:
        chosen = {role: getattr(options, f"edges_{role}") for role in ROLES}
        graph = Graph.of(edges, chosen, options.time_unit, clock, list(layout.cells))
        span = telemetry["spans"][options.kind]
        found, rejected = graph.load(store, work, options.level, _names(store, work, options), span)
        slice_width = graph.slice
        figures |= {"edges": found, "rejected": {**figures["rejected"], "edges": rejected}}
    store.write_json(
        f"{work}/telemetry/{MANIFEST}",
        {
            "settings": {"trace": TRACE, "step": clock.step, "slice": slice_width},
            "metrics": list(options.metrics),
            "spans": telemetry["spans"],
            "fingerprint": digest,
            "files": [path.removeprefix(f"{work}/") for path in _finished(store, work)],
            "figures": figures,
        },
    )
    _publish(store, work, state)
    return {**figures, "skipped": False}


def _state(options: TabularOptions, table: ColumnFile, edges: ColumnFile | None) -> dict[str, Any]:
    """What the store's telemetry is made of, as ingest keeps it."""
    given = options.model_dump(mode="json", exclude={"table", "edges"})
    settings = {"trace": TRACE, "format": _FORMAT, **given}
    files = [table] if edges is None else [table, edges]
    return {
        "settings": settings,
        "files": [{"table": f.option, "uri": f.uri, "size": f.size, "key": f.key} for f in files],
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


@dataclass(frozen=True)
class Layout:
    """Which column holds what."""

    entity: str | None
    time: str | None
    metrics: tuple[str, ...]
    values: dict[str, str]
    """Column → the metric that it holds."""
    cells: dict[str, dict[str, str]]
    """Of a wide table: entity → metric → column, entities in the order of their columns."""

    @classmethod
    def of(cls, table: ColumnFile, options: TabularOptions) -> Layout:
        """Raises InputError for a column that there is not, or a table without entities."""
        if options.time is not None:
            table.column("time", options.time)
        if options.entity is not None:
            table.column("entity", options.entity)
            values = {table.column("metrics", metric): metric for metric in options.metrics}
            return cls(options.entity, options.time, options.metrics, values, {})
        for metric in options.metrics:
            if metric in table.columns:
                raise InputError(
                    f"--metrics {metric}: is a column of {table.uri}, so the table is long; expected "
                    f"--entity as well, one of {table.listed()}"
                )
        cells = _cells(table, options)
        values = {column: metric for found in cells.values() for metric, column in found.items()}
        return cls(None, options.time, options.metrics, values, cells)

    @property
    def columns(self) -> list[str]:
        """All columns that are read, each once."""
        return list(dict.fromkeys([*self.keys, *self.values]))

    @property
    def keys(self) -> list[str]:
        """The columns that say of what and when a row is."""
        return [name for name in (self.entity, self.time) if name is not None]

    def long(self, values: pl.DataFrame, entity: pl.Series | None, time: pl.Series) -> pl.DataFrame:
        """`entity`, `time`, metrics: rows with a value, from the numbers of all value columns."""
        if entity is not None:
            return values.with_columns(entity.alias("entity"), time.alias("time"))
        nothing = pl.repeat(None, len(values), dtype=pl.Float64, eager=True)
        rows = pl.DataFrame(
            {
                "entity": pl.Series(list(self.cells)).gather(
                    np.repeat(np.arange(len(self.cells)), len(values))
                ),
                "time": pl.concat([time] * len(self.cells)),
                **{
                    metric: pl.concat(
                        [
                            values[found[metric]] if metric in found else nothing
                            for found in self.cells.values()
                        ]
                    )
                    for metric in self.metrics
                },
            }
        )
        return rows.filter(pl.any_horizontal(pl.col(self.metrics).is_not_null()))


def _cells(table: ColumnFile, options: TabularOptions) -> dict[str, dict[str, str]]:
    """The entities of a wide table and their columns."""
    candidates = [name for name in table.columns if name != options.time and name not in _NAMELESS]
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for name in candidates:
        ends = [metric for metric in options.metrics if name.endswith(f"_{metric}")]
        metric = max(ends, key=len, default="")
        if entity := name.removesuffix(f"_{metric}") if ends else "":
            cells[entity][metric] = name
    if not cells and len(options.metrics) == 1:
        cells |= {name: {options.metrics[0]: name} for name in candidates}
    for metric in options.metrics:
        if not any(metric in found for found in cells.values()):
            raise InputError(
                f"--metrics {metric}: without --entity the table is wide, but {table.uri} has no column that "
                f"could be an entity's, expected <entity>_{metric} among {table.listed()}"
            )
    used = [column for found in cells.values() for column in found.values()]
    for column in used:
        table.column("table", column)
    if len(used) < len(candidates):
        log.info("tabular: %d columns end in no metric, left out", len(candidates) - len(used))
    return dict(cells)


def _clock(table: ColumnFile, layout: Layout, options: TabularOptions) -> Clock:
    """How times are read, and the step of the telemetry."""
    start, assumed = int(options.start.timestamp()), options.step or _ASSUMED_STEP
    if layout.time is None:
        clock = Clock("step", start, assumed)
    else:
        values = table.sample("time", layout.time)
        clock = read_clock("time", values, options.time_unit, start, assumed)
    if clock.unit == "step":
        if options.step is None:
            log.warning("tabular: a step is taken to be %d s wide; --step says otherwise", assumed)
        return clock
    if options.time_unit == "auto" and clock.unit is not None:
        log.info("tabular: --time %s is taken for Unix time in %s", layout.time, clock.unit)
    return clock if options.step is not None else _with_step(clock, table, layout)


def _with_step(clock: Clock, table: ColumnFile, layout: Layout) -> Clock:
    """The step from the gaps between the times of one entity: the most frequent of the first batch."""
    assert layout.time is not None, "steps that are only numbered have a width"
    often: Any = None
    times: list[np.ndarray] = []
    for batch in table.batches(layout.keys):
        frame = batch.frame
        if layout.entity is not None:
            names = frame[layout.entity].cast(pl.String)
            if often is None:
                often = names.drop_nulls().mode().sort().first()
            frame = frame.filter(names == often)
        times.append(clock.milliseconds(frame[layout.time]).drop_nulls().unique().to_numpy())
    gap = median_gap(np.concatenate(times))
    if gap is None or gap > 1.5 * _DAY:
        found = "a single time" if gap is None else f"a time every {gap:,.0f} s"
        raise InputError(
            f"--step: cannot be told from {table.uri}, where {often or 'the table'} has {found}; expected a "
            "duration that divides a day"
        )
    divisors = [width for width in range(1, _DAY + 1) if _DAY % width == 0]
    step = min(divisors, key=lambda width: abs(np.log(width / gap)))
    log.info("tabular: step %d s, from a median gap of %g s", step, gap)
    return Clock(clock.unit, clock.start, step)


def _load_telemetry(
    store: Store, work: str, table: ColumnFile, layout: Layout, clock: Clock, options: TabularOptions
) -> dict[str, Any]:
    """Writes days of telemetry, and the entities; returns the `spans` and `figures` of the manifest."""
    rows = 0
    reasons: Counter[str] = Counter()
    nulled: Counter[str] = Counter()
    writer = PartWriter(
        store,
        (f"{work}/parts", f"{work}/rejected"),
        ("table", table.path.rsplit("/", 1)[-1], table.key),
        flush_rows=_HELD_BYTES // (40 + 16 * len(layout.metrics)),
    )
    for usable, count, rejected, bad in _usable(table, layout, clock):
        rows += count
        nulled.update(bad)
        if len(rejected):
            reasons.update(rejected["reason"].to_list())
            writer.reject(rejected)
        if len(usable):
            binned = _bins(usable, layout.metrics, clock.step)
            writer.add(options.kind, binned)
            writer.add("entities", _entities(binned, options))
    writer.flush()
    _check_rejected(store, work, table, rows, reasons, options.max_rejected_share)
    metrics = dict.fromkeys(options.metrics, 1.0)
    receipts = []
    for place, parts in by_place(writer.places).items():
        product, _, day = place.removesuffix("/00").partition("/")
        if product == options.kind:
            target = f"{work}/telemetry/date={day}/{options.kind}-00.parquet"
            receipts.append(combine_telemetry(store, options.kind, parts, target, metrics))
        else:
            combine_entities(store, parts, f"{work}/entities/entities.parquet")
    span = {"first": min(r["first"] for r in receipts), "last": max(r["last"] for r in receipts)}
    figures = {
        "rows": rows,
        "entities": len(_names(store, work, options)),
        "metrics": list(options.metrics),
        "step": clock.step,
        "edges": 0,
        "bins": sum(r["rows"] for r in receipts),
        "rejected": {"table": dict(sorted(reasons.items()))},
        "values_nulled": {metric: nulled[metric] for metric in options.metrics if nulled[metric]},
    }
    return {"spans": {options.kind: span}, "figures": figures}


def _usable(
    table: ColumnFile, layout: Layout, clock: Clock
) -> Iterator[tuple[pl.DataFrame, int, pl.DataFrame, dict[str, int]]]:
    """Batch by batch: long rows, how many rows were read, the rejected ones, values that became null."""
    unchecked = set(layout.values)
    for batch in table.batches(layout.columns):
        frame = batch.frame
        numbers = {name: finite(frame[name]) for name in layout.values}
        unchecked -= {name for name in unchecked if _is_numeric(table, layout, frame[name], numbers[name])}
        values = pl.DataFrame(numbers)
        entity = None if layout.entity is None else texts(frame[layout.entity])
        time = clock.milliseconds(batch.offset if layout.time is None else frame[layout.time])
        checks = {} if entity is None else {f"{layout.entity} is empty": entity.is_null()}
        if layout.time is not None:
            checks[f"{layout.time} is empty"] = frame[layout.time].is_null()
        checks["the time cannot be read"] = time.is_null()
        checks["no metric has a value"] = values.select(pl.all_horizontal(pl.all().is_null())).to_series()
        keep, rejected = reject(frame, batch.offset, checks)
        rejected = pl.concat([batch.broken, rejected]).sort("offset")
        bad: Counter[str] = Counter()
        for name in layout.values:
            bad[layout.values[name]] += values[name].null_count() - frame[name].null_count()
        named = None if entity is None else entity.filter(keep)
        usable = layout.long(values.filter(keep), named, time.filter(keep))
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
    wide = "" if layout.entity else "; a wide table has entities only, a long one needs --entity"
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


def _entities(bins: pl.DataFrame, options: TabularOptions) -> pl.DataFrame:
    """Descriptions, as `PRODUCTS` merges them. A service is its own only container."""
    service = pl.col("entity") if options.level == "service" else pl.lit(None, pl.String)
    seen = bins.group_by("entity").agg(pl.col("time").max())
    return seen.select(
        "entity",
        kind=pl.lit(options.kind),
        parent=pl.lit(None, pl.String),
        service=service,
        cpu_capacity=pl.lit(None, pl.Float32),
        memory_capacity=pl.lit(None, pl.Float32),
        measured=pl.lit(True),
        seen=pl.col("time").dt.epoch("s"),
    )  # fmt: skip


def _check_rejected(
    store: Store, work: str, table: ColumnFile, rows: int, reasons: Counter[str], limit: float
) -> None:
    """Refuses a table of which too many rows cannot be used; what they are stays in `rejected/`."""
    if not rows:
        raise InputError(f"--table {table.uri}: has no usable row, expected some below the header")
    bad = reasons.total()
    if bad < rows and bad <= limit * rows:
        return
    why = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items()))
    store.remove("rejected/table")
    store.publish(f"{work}/rejected/table", "rejected/table")
    store.remove(work)
    what = "has no usable row" if bad == rows else f"{bad:,} of {rows:,} rows cannot be used"
    raise InputError(
        f"--table {table.uri}: {what} ({why}), expected at most --max-rejected-share {limit}; the rows are "
        "in rejected/table, nothing was published"
    )


def _names(store: Store, root: str, options: TabularOptions) -> list[str]:
    entities: Any = pl.from_arrow(store.read_table(f"{root}/entities/entities.parquet"))
    return list(entities.filter(pl.col("kind") == options.kind)["entity"])

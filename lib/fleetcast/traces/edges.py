"""The graph that comes with a table: edge lists, wide edges or a matrix → dependencies."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from fleetcast import schemas
from fleetcast.errors import InputError
from fleetcast.store import Store, fingerprint
from fleetcast.traces.clock import Clock, Times, read_times
from fleetcast.traces.columns import Batch, ColumnFile, candidates, finite, reject, texts
from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.parts import Parts, PartWriter, by_place, read_parts

log = logging.getLogger("fleetcast")

#: What a column of an edge list can be, and the names by which it is known if no option says it.
ROLES = {"source": ("source", "from"), "target": ("target", "to"), "weight": ("weight", "value")}
_TIMES = ("time", "timestamp")
_HOUR, _DAY = 3600, 86_400
_TIME = pl.Datetime("ms", "UTC")
#: Columns that are left out, of those that a log lists.
_LISTED = 10


@dataclass(frozen=True)
class EdgeFile:
    """How one file of edges is read."""

    file: ColumnFile
    columns: Mapping[str, str]
    """Role → column of an edge list; empty of other forms."""
    pairs: Mapping[str, tuple[str, str]]
    """Of wide edges, column → source and target."""
    times: Times | None
    """Of edges that have a time; None where they hold at all times."""
    matrix: pl.DataFrame | None = None
    """`source`, `target`, `weight` of every cell that is not 0, with its number as `offset`."""

    def batches(self) -> Iterator[tuple[pl.DataFrame, Batch]]:
        """Batch by batch: `source`, `target`, `weight` and, as numbers of milliseconds, `time`; and the rows
        that they are made of."""
        if self.matrix is not None:
            raw = Batch(self.matrix.drop("offset"), self.matrix["offset"])
            yield raw.frame.with_columns(time=pl.lit(None, pl.Int64)), raw
            return
        time = [] if self.times is None else [self.times.column]
        read = list(dict.fromkeys([*time, *(self.pairs or self.columns.values())]))
        for batch in self.file.batches(read):
            raw = self._joined(batch) if self.pairs else batch
            frame = raw.frame
            column = _ROLES_AS_COLUMNS if self.pairs else self.columns
            weight = (
                finite(frame[column["weight"]])
                if "weight" in column
                else pl.repeat(1.0, len(frame), eager=True)
            )
            at = pl.repeat(None, len(frame), dtype=pl.Int64, eager=True)
            if self.times is not None:
                at = self.times.clock.milliseconds(frame[self.times.column])
            edges = {"source": texts(frame[column["source"]]), "target": texts(frame[column["target"]])}
            yield pl.DataFrame({**edges, "weight": weight, "time": at}), raw

    def _joined(self, batch: Batch) -> Batch:
        """Wide edges as a list of those that there are: a cell that is empty or 0 is none."""
        keys = [] if self.times is None else [self.times.column]
        rows = batch.frame.with_columns(pl.col(list(self.pairs)).cast(pl.String), offset=batch.offset)
        cells = rows.unpivot(
            list(self.pairs), index=["offset", *keys], variable_name="pair", value_name="weight"
        )
        there = cells.filter(
            cells["weight"].is_not_null()
            & (cells["weight"].cast(pl.Float64, strict=False) != 0).fill_null(True)
        )
        there = there.sort("offset", maintain_order=True)
        names = list(self.pairs)
        ends = {
            role: there["pair"].replace_strict(
                names, [self.pairs[name][n] for name in names], return_dtype=pl.String
            )
            for n, role in enumerate(("source", "target"))
        }
        return Batch(there.select(*keys, **ends, weight="weight"), there["offset"], batch.broken)


_ROLES_AS_COLUMNS = {role: role for role in ROLES}


@dataclass(frozen=True)
class Graph:
    """Where the edges are, and how they are read."""

    given: str
    """The option."""
    files: Sequence[EdgeFile]
    slice: int
    """Width of a dependency slice [s]."""

    @classmethod
    def of(
        cls,
        files: Sequence[ColumnFile],
        options: TabularOptions,
        steps: Clock,
        middles: Sequence[float],
        order: Sequence[str],
        names: Sequence[str],
    ) -> Graph:
        """`steps` is the table's clock and `middles` the middle times of its files, `order` the entities of a
        wide table, `names` what edges may join. Raises InputError for a column that there is not, edges that
        are neither a list nor wide, or a matrix of another size."""
        if len(files) == 1 and (matrix := files[0].matrix()) is not None:
            return cls(
                str(options.edges), [EdgeFile(files[0], {}, {}, None, _cells(files[0], matrix, order))], _DAY
            )
        timed = _time_columns(files, options)
        forms = [_form(file, options, set(names), timed[file.name]) for file in files]
        samples = {
            file.name: file.sample("edges-time", timed[file.name]) for file in files if timed[file.name]
        }
        unit = "step" if steps.unit == "step" else options.time_unit
        times = read_times("edges-time", samples, unit, steps.start, steps.step, middles)
        if 0 < len(times) < len(files):
            untimed = next(file for file in files if file.name not in times)
            raise InputError(f"--edges {untimed.uri}: has no times, expected them in all files or in none")
        gap = float(np.median([of.gap for of in times.values()])) if times else np.inf
        # An hour without edges is an hour without a graph; a slice holds whole steps.
        hourly = gap <= _HOUR and _HOUR % steps.step == 0
        read = [
            EdgeFile(file, columns, pairs, times.get(file.name))
            for file, (columns, pairs) in zip(files, forms, strict=True)
        ]
        return cls(str(options.edges), read, _HOUR if hourly else _DAY)

    @property
    def clocks(self) -> list[dict[str, Any]]:
        """Columns whose clocks are off."""
        return [off for one in self.files if one.times is not None for off in one.times.off]

    @property
    def _timed(self) -> bool:
        return any(one.times is not None for one in self.files)

    def load(self, store: Store, work: str, level: str, names: list[str], span: Mapping[str, int]) -> Loaded:
        """Writes days of dependencies between the entities `names` of a level.

        A window sees the last slice that had ended at its origin. So edges that hold at all times are written
        for every day, from the day before the telemetry; timed ones are summed by slice. Raises InputError
        if no edge can be used.
        """
        rows = 0
        places: dict[str, list[str]] = {}
        reasons: Counter[str] = Counter()
        pairs = pl.DataFrame(schema={"source": pl.String, "target": pl.String, "weight": pl.Float64})
        for one in self.files:
            source = ("edges", one.file.name.rsplit("/", 1)[-1], fingerprint([one.file.key, one.file.name]))
            writer = PartWriter(store, (f"{work}/parts", f"{work}/rejected"), source)
            for usable, count, rejected in self._usable(one, pl.Series(names)):
                rows += count
                if len(rejected):
                    reasons.update(rejected["reason"].to_list())
                    writer.reject(rejected)
                if one.times is not None and len(usable):
                    calls = usable.group_by("time", "source", "target").agg(pl.col("weight").sum())
                    writer.add("calls", calls)
                both = pl.concat([pairs, usable.drop("time")])
                pairs = both.group_by("source", "target", maintain_order=True).agg(pl.col("weight").sum())
            writer.flush()
            places |= writer.places
        if pairs.is_empty():
            why = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items())) or "no rows"
            raise InputError(
                f"--edges {self.given}: has no usable edge ({why}), expected positive weights between "
                f"entities such as {', '.join(names[:3])}"
            )
        for day, edges in self._days(store, by_place(places), pairs, span):
            _write(store, f"{work}/dependencies/{day}/{level}.parquet", edges)
        return Loaded(len(pairs), rows, dict(sorted(reasons.items())))

    def _usable(self, one: EdgeFile, names: pl.Series) -> Iterator[tuple[pl.DataFrame, int, pl.DataFrame]]:
        """Batch by batch: `time` (of the slice), `source`, `target`, `weight`; how many edges were read; and
        the rejected ones."""
        width = 1000 * self.slice
        for edges, raw in one.batches():
            checks = {}
            for role in ("source", "target"):
                checks[f"{role} is empty"] = edges[role].is_null()
                checks[f"{role} is no entity of the table"] = ~edges[role].is_in(names.implode())
            checks["source and target are the same"] = edges["source"] == edges["target"]
            if one.times is not None:
                checks["the time cannot be read"] = edges["time"].is_null()
            checks["weight is not a positive number"] = ~(edges["weight"].fill_null(0) > 0)
            keep, rejected = reject(raw.frame, raw.offset, checks)
            usable = edges.filter(keep).select(
                (pl.col("time") // width * width).cast(_TIME), "source", "target", "weight"
            )
            rejected = pl.concat([raw.broken, rejected]).sort("offset")
            yield usable, len(edges) + len(raw.broken), rejected

    def _days(
        self, store: Store, timed: Mapping[str, Parts], pairs: pl.DataFrame, span: Mapping[str, int]
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        if not self._timed:
            for start in range(span["first"] // _DAY * _DAY - _DAY, span["last"] + 1, _DAY):
                time = pl.Series([1000 * start]).cast(_TIME)
                yield f"date={time.dt.date()[0]}", pairs.with_columns(time=pl.lit(time[0], time.dtype))
            return
        for place, parts in timed.items():
            edges = read_parts(store, "calls", parts)
            assert edges is not None, "a place has parts"
            yield f"date={place.split('/')[1]}", edges


@dataclass(frozen=True)
class Loaded:
    """What came of the edges."""

    pairs: int
    """Pairs that they join."""
    rows: int
    """Edges that were read."""
    rejected: dict[str, int]
    """Reason → how many of them."""


def _form(
    file: ColumnFile, options: TabularOptions, names: set[str], timed: Sequence[str]
) -> tuple[dict[str, str], dict[str, tuple[str, str]]]:
    """Role → column of an edge list; or, of wide edges, column → the two that it joins."""
    known = {name.lower(): name for name in reversed(file.columns)}
    columns = {}
    for role, usual in ROLES.items():
        if (name := getattr(options, f"edges_{role}")) is not None:
            columns[role] = file.column(f"edges-{role}", name)
        elif (found := next((known[name] for name in usual if name in known), None)) is not None:
            columns[role] = file.column(f"edges-{role}", found)
    if "source" in columns and "target" in columns:
        return columns, {}
    pairs = {name: pair for name in file.columns if (pair := _pair(name, names)) is not None}
    if pairs:
        if other := set(file.columns) - set(pairs) - set(timed):
            listed = ", ".join(sorted(other)[:_LISTED])
            log.warning(
                "tabular: %s: %d columns join no two entities, left out: %s", file.name, len(other), listed
            )
        return {}, {file.column("edges", name): pair for name, pair in pairs.items()}
    role = next(role for role in ("source", "target") if role not in columns)
    raise InputError(
        f"--edges-{role}: {file.uri} has no column {' or '.join(ROLES[role])}, nor columns called like two "
        f"entities, expected one of {file.listed()}"
    )


def _pair(column: str, names: set[str]) -> tuple[str, str] | None:
    """The two entities that a column is called after, with something that is no letter or digit between."""
    for gap in re.finditer(r"[^A-Za-z0-9]+", column):
        source, target = column[: gap.start()], column[gap.end() :]
        if source in names and target in names:
            return source, target
    return None


def _time_columns(files: Sequence[ColumnFile], options: TabularOptions) -> dict[str, list[str]]:
    """File → the columns that may be its times."""
    if options.edges_time:
        return candidates("edges-time", files, options.edges_time)
    found = {}
    for file in files:
        known = {name.lower(): name for name in reversed(file.columns)}
        found[file.name] = [known[name] for name in _TIMES if name in known]
    return found


def _write(store: Store, path: str, edges: pl.DataFrame) -> None:
    ordered = edges.with_columns(kind=pl.lit("call")).sort("time", "target", "source")
    store.write_table(path, ordered.select(schemas.DEPENDENCIES.names).to_arrow().cast(schemas.DEPENDENCIES))


def _cells(file: ColumnFile, matrix: pl.DataFrame, order: Sequence[str]) -> pl.DataFrame:
    """The cells of a matrix that are not 0: row i is where the load comes from, column j where it goes."""
    if not order:
        raise InputError(
            f"--edges {file.uri}: is a matrix, whose order only the columns of a wide table say; expected an "
            "edge list with columns source and target"
        )
    if matrix.shape != (len(order), len(order)):
        raise InputError(
            f"--edges {file.uri}: a matrix of {matrix.height} x {matrix.width}, expected {len(order)} x "
            f"{len(order)} for the entities of the table"
        )
    weights = matrix.to_numpy()
    rows, columns = np.nonzero(weights)
    names = pl.Series(list(order))
    return pl.DataFrame(
        {
            "source": names.gather(rows),
            "target": names.gather(columns),
            "weight": weights[rows, columns],
            "offset": rows * len(order) + columns,
        }
    )

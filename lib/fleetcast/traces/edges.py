"""The graph that comes with a table: an edge list or a matrix → dependencies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from fleetcast import schemas
from fleetcast.errors import InputError
from fleetcast.store import Store
from fleetcast.traces.clock import Clock, median_gap, read_clock
from fleetcast.traces.columns import Batch, ColumnFile, finite, reject, texts
from fleetcast.traces.parts import Parts, PartWriter, by_place, read_parts

#: What a column of an edge list can be, and the names by which it is known if no option says it.
ROLES = {
    "source": ("source", "from"),
    "target": ("target", "to"),
    "weight": ("weight", "value"),
    "time": ("time", "timestamp"),
}
_HOUR, _DAY = 3600, 86_400
_TIME = pl.Datetime("ms", "UTC")


@dataclass(frozen=True)
class Graph:
    """Where the edges are, and how they are read."""

    file: ColumnFile
    columns: Mapping[str, str]
    """Role → column of an edge list; empty of a matrix."""
    clock: Clock | None
    """Of edges that have a time; None where they hold at all times."""
    slice: int
    """Width of a dependency slice [s]."""
    matrix: pl.DataFrame | None
    """`source`, `target`, `weight` of every cell that is not 0, with its number as `offset`."""

    @classmethod
    def of(
        cls,
        file: ColumnFile,
        chosen: Mapping[str, str | None],
        time_unit: str,
        clock: Clock,
        order: list[str],
    ) -> Graph:
        """`chosen` are the columns that options name, by role; `clock` is the table's; `order` the entities
        of a wide table. Raises InputError for a column that there is not, or a matrix of another size."""
        if (matrix := file.matrix()) is not None:
            return cls(file, {}, None, _DAY, _cells(file, matrix, order))
        columns = {}
        for role, known in ROLES.items():
            if (name := chosen[role]) is not None:
                columns[role] = file.column(f"edges-{role}", name)
            elif (found := next((name for name in known if name in file.columns), None)) is not None:
                columns[role] = file.column(f"edges-{role}", found)
            elif role in ("source", "target"):
                raise InputError(
                    f"--edges-{role}: {file.uri} has no column {' or '.join(known)}, expected one of "
                    f"{file.listed()}"
                )
        if "time" not in columns:
            return cls(file, columns, None, _DAY, None)
        column = file.sample("edges-time", columns["time"])
        if clock.unit != "step":
            clock = read_clock("edges-time", column, time_unit, clock.start, clock.step)
        gap = median_gap(clock.milliseconds(column).drop_nulls().to_numpy()) or 0
        # An hour without edges is an hour without a graph; a slice holds whole steps.
        hourly = gap <= _HOUR and _HOUR % clock.step == 0
        return cls(file, columns, clock, _HOUR if hourly else _DAY, None)

    def load(
        self, store: Store, work: str, level: str, names: list[str], span: Mapping[str, int]
    ) -> tuple[int, dict[str, int]]:
        """Writes days of dependencies between the entities `names` of a level; returns how many pairs they
        join, and how many rows were rejected by reason.

        A window sees the last slice that had ended at its origin. So edges that hold at all times are written
        for every day, from the day before the telemetry; timed ones are summed by slice. Raises InputError
        if no edge can be used.
        """
        source = ("edges", self.file.path.rsplit("/", 1)[-1], self.file.key)
        writer = PartWriter(store, (f"{work}/parts", f"{work}/rejected"), source)
        reasons: Counter[str] = Counter()
        pairs = pl.DataFrame(schema={"source": pl.String, "target": pl.String, "weight": pl.Float64})
        for usable, rejected in self._usable(pl.Series(names)):
            if len(rejected):
                reasons.update(rejected["reason"].to_list())
                writer.reject(rejected)
            if self.clock is not None and len(usable):
                writer.add("calls", usable.group_by("time", "source", "target").agg(pl.col("weight").sum()))
            both = pl.concat([pairs, usable.drop("time")])
            pairs = both.group_by("source", "target", maintain_order=True).agg(pl.col("weight").sum())
        writer.flush()
        if pairs.is_empty():
            why = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items())) or "no rows"
            raise InputError(
                f"--edges {self.file.uri}: has no usable edge ({why}), expected positive weights between "
                f"entities such as {', '.join(names[:3])}"
            )
        for day, edges in self._days(store, by_place(writer.places), pairs, span):
            _write(store, f"{work}/dependencies/{day}/{level}.parquet", edges)
        return len(pairs), dict(sorted(reasons.items()))

    def _usable(self, entities: pl.Series) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """Batch by batch: `time` (of the slice), `source`, `target`, `weight`; and the rejected rows."""
        for batch in self._batches():
            raw = batch.frame
            edges = self._edges(raw)
            checks = {}
            for role in ("source", "target"):
                checks[f"{role} is empty"] = edges[role].is_null()
                checks[f"{role} is no entity of the table"] = ~edges[role].is_in(entities.implode())
            checks["source and target are the same"] = edges["source"] == edges["target"]
            if self.clock is not None:
                checks["the time cannot be read"] = edges["time"].is_null()
            checks["weight is not a positive number"] = ~(edges["weight"].fill_null(0) > 0)
            keep, rejected = reject(raw, batch.offset, checks)
            yield edges.filter(keep), pl.concat([batch.broken, rejected]).sort("offset")

    def _batches(self) -> Iterator[Batch]:
        if self.matrix is None:
            yield from self.file.batches(list(dict.fromkeys(self.columns.values())))
        else:
            yield Batch(self.matrix.drop("offset"), self.matrix["offset"])

    def _edges(self, raw: pl.DataFrame) -> pl.DataFrame:
        column = self.columns or {role: role for role in ("source", "target", "weight")}
        weight = finite(raw[column["weight"]]) if "weight" in column else pl.repeat(1.0, len(raw), eager=True)
        time = pl.repeat(None, len(raw), dtype=pl.Int64, eager=True)
        if self.clock is not None:
            time = self.clock.milliseconds(raw[column["time"]]) // (1000 * self.slice) * (1000 * self.slice)
        return pl.DataFrame(
            {
                "time": time.cast(_TIME),
                "source": texts(raw[column["source"]]),
                "target": texts(raw[column["target"]]),
                "weight": weight,
            }
        )

    def _days(
        self, store: Store, timed: Mapping[str, Parts], pairs: pl.DataFrame, span: Mapping[str, int]
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        if self.clock is None:
            for start in range(span["first"] // _DAY * _DAY - _DAY, span["last"] + 1, _DAY):
                time = pl.Series([1000 * start]).cast(_TIME)
                yield f"date={time.dt.date()[0]}", pairs.with_columns(time=pl.lit(time[0], time.dtype))
            return
        for place, parts in timed.items():
            edges = read_parts(store, "calls", parts)
            assert edges is not None, "a place has parts"
            yield f"date={place.split('/')[1]}", edges


def _write(store: Store, path: str, edges: pl.DataFrame) -> None:
    ordered = edges.with_columns(kind=pl.lit("call")).sort("time", "target", "source")
    store.write_table(path, ordered.select(schemas.DEPENDENCIES.names).to_arrow().cast(schemas.DEPENDENCIES))


def _cells(file: ColumnFile, matrix: pl.DataFrame, order: list[str]) -> pl.DataFrame:
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
    names = pl.Series(order)
    return pl.DataFrame(
        {
            "source": names.gather(rows),
            "target": names.gather(columns),
            "weight": weights[rows, columns],
            "offset": rows * len(order) + columns,
        }
    )

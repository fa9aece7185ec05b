"""Which column of a file holds what; and its rows as one row for each entity and time."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from fleetcast.errors import InputError
from fleetcast.traces.columns import ColumnFile
from fleetcast.traces.mapping import LABELS, TabularOptions

log = logging.getLogger("fleetcast")

#: Columns that pandas writes for an index without a name.
_NAMELESS = ("", "Unnamed: 0", "__index_level_0__")
#: What an entity is described by.
ROLES = ("entity", "service", "machine")


@dataclass(frozen=True)
class Layout:
    """Which column holds what in one file."""

    roles: dict[str, str]
    """Of `ROLES`, those that are columns; `entity` is none of a wide table."""
    labels: dict[str, str]
    """What the file's name says, by role."""
    time: str | None
    """The column of times; None where rows are consecutive steps."""
    metrics: tuple[str, ...]
    """All of the table."""
    values: dict[str, str]
    """Column → the metric that it holds."""
    cells: dict[str, dict[str, str]]
    """Of a wide table: entity → metric → column, entities in the order of their columns."""

    @classmethod
    def of(cls, table: ColumnFile, options: TabularOptions, time: str | None) -> Layout:
        """Of a file whose times are in the column `time`. Raises InputError for a column that there is not,
        a name that does not say what it should, or a table without entities."""
        labels = _labels(table, options)
        if options.is_long:
            given = {role: getattr(options, role) for role in ROLES}
            roles = {role: table.column(role, name) for role, name in given.items() if name is not None}
            values = {}
            for metric, of in options.columns.items():
                name = of.column or metric
                if name in table.columns:
                    values[table.column("metrics", name)] = metric
            if not values:
                table.column("metrics", options.columns[options.names[0]].column or options.names[0])
            return cls(roles, labels, time, options.names, values, {})
        for metric, of in options.columns.items():
            if (of.column or metric) in table.columns:
                raise InputError(
                    f"--metrics {metric}: is a column of {table.uri}, so the table is long; expected "
                    f"--entity as well, one of {table.listed()}"
                )
        cells = _cells(table, options, labels.pop("metric", None))
        values = {column: metric for found in cells.values() for metric, column in found.items()}
        return cls({}, labels, time, options.names, values, cells)

    @property
    def columns(self) -> list[str]:
        """All columns that are read, each once."""
        return list(dict.fromkeys([*self.keys, *self.values]))

    @property
    def keys(self) -> list[str]:
        """The columns that say of what and when a row is."""
        return [*self.roles.values(), *([] if self.time is None else [self.time])]

    def long(self, values: pl.DataFrame, named: dict[str, pl.Series], time: pl.Series) -> pl.DataFrame:
        """`ROLES`, `time`, metrics: rows with a value, from the numbers of all value columns."""
        if not self.cells:
            rows = values.rename(self.values).with_columns(time.alias("time"))
            who = {role: named.get(role, self.labels.get(role)) for role in ROLES}
            return self._whole(
                rows.with_columns(
                    pl.lit(of, pl.String).alias(role) if of is None or isinstance(of, str) else of.alias(role)
                    for role, of in who.items()
                )
            )
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
                    for metric in dict.fromkeys(self.values.values())
                },
            }
        )
        return self._whole(rows).filter(pl.any_horizontal(pl.col(self.metrics).is_not_null()))

    def _whole(self, rows: pl.DataFrame) -> pl.DataFrame:
        """With every role and metric, null where this file does not say it."""
        texts = [pl.lit(None, pl.String).alias(role) for role in ROLES if role not in rows.columns]
        numbers = [pl.lit(None, pl.Float64).alias(one) for one in self.metrics if one not in rows.columns]
        return rows.with_columns(*texts, *numbers).select(*ROLES, "time", *self.metrics)


def _labels(table: ColumnFile, options: TabularOptions) -> dict[str, str]:
    """What the file's name says. Raises InputError if it does not say all it should."""
    if options.file_name is None:
        return {}
    match = re.search(options.file_name, table.name)
    found = {} if match is None else {role: text for role, text in match.groupdict().items() if text}
    if missing := [role for role in LABELS if role in options.labels and role not in found]:
        raise InputError(
            f"--file-name {options.file_name}: says no {missing[0]} for {table.name}, expected every file of "
            f"--table {options.table} to have one"
        )
    return found


def _cells(table: ColumnFile, options: TabularOptions, only: str | None) -> dict[str, dict[str, str]]:
    """The entities of a wide table and their columns; `only` is the metric that the file's name says."""
    candidates = [name for name in table.columns if name not in (*options.time, *_NAMELESS)]
    if only is not None:
        metric = next((m for m, of in options.columns.items() if only in (m, of.column)), None)
        if metric is None:
            raise InputError(
                f"--file-name {options.file_name}: {table.name} is of {only}, expected a metric among "
                f"{', '.join(of.column or m for m, of in options.columns.items())}"
            )
        return {table.column("table", name): {metric: name} for name in candidates}
    endings = {f"_{of.column or metric}": metric for metric, of in options.columns.items()}
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for name in candidates:
        ending = max((end for end in endings if name.endswith(end)), key=len, default="")
        if entity := name.removesuffix(ending) if ending else "":
            cells[entity][endings[ending]] = name
    if not cells and len(endings) == 1:
        cells |= {name: {options.names[0]: name} for name in candidates}
    if not cells:
        raise InputError(_no_entities(table, options.names[0], next(iter(endings))))
    used = [column for found in cells.values() for column in found.values()]
    for column in used:
        table.column("table", column)
    if len(used) < len(candidates):
        log.info("tabular: %d columns end in no metric, left out", len(candidates) - len(used))
    return dict(cells)


def _no_entities(table: ColumnFile, metric: str, ending: str) -> str:
    return (
        f"--metrics {metric}: without --entity the table is wide, but {table.uri} has no column that "
        f"could be an entity's, expected <entity>{ending} among {table.listed()}"
    )


def check_all_metrics(files: Sequence[tuple[ColumnFile, Layout]], options: TabularOptions) -> None:
    """Raises InputError for a metric that no file has."""
    held = {metric for _, layout in files for metric in layout.values.values()}
    for metric, of in options.columns.items():
        if metric not in held:
            table = files[0][0]
            if options.is_long:
                table.column("metrics", of.column or metric)
            raise InputError(_no_entities(table, metric, f"_{of.column or metric}"))

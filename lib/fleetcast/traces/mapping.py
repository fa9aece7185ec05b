"""How a table is read: which column, or which part of a file's name, holds what."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fleetcast.config import Options, Seconds

_DAY = 86_400
#: Columns that telemetry and shards have beside the metrics.
_TAKEN = frozenset({"entity", "time", "samples", "step", "index", "group"})
#: What the name of a file can say.
LABELS = ("entity", "service", "machine", "metric")
#: How many of a unit are one of ours.
UNITS = {"percent": 100.0, "millicores": 1000.0, "ms": 1e3, "us": 1e6, "ns": 1e9, "per_minute": 60.0}


def _listed(value: Any) -> Any:
    """One name is a list of one."""
    return (value,) if isinstance(value, str) else value


class MetricColumn(Options):
    """Where a metric is."""

    column: str | None = None
    """Its column, or its ending of a wide table's columns; called like the metric if not given."""
    unit: Annotated[float, Field(gt=0)] | Literal["percent", "millicores", "ms", "us", "ns", "per_minute"] = (
        1.0
    )
    """What the column counts in: a name, or how much of our unit one is (0.01 is a percent)."""

    @property
    def divisor(self) -> float:
        """How many of the column's units are one of ours."""
        return UNITS[self.unit] if isinstance(self.unit, str) else 1 / self.unit


class TabularOptions(Options):
    """From a table to telemetry, entities and dependencies."""

    table: str
    """The rows: .parquet, .csv or .csv.gz; a file, a folder with all below it, or a pattern such as
    `load/*_metric.csv`; local or `s3://…`."""
    file_name: str | None = None
    """What the files' names say: a regular expression with named groups entity, service, machine or metric,
    such as `(?P<entity>[^/]+)_metric`. It is looked for in each file's path below the folder. A file of one
    metric is wide."""
    entity: str | None = None
    """Column that names what a row is about. Neither it nor an entity in the files' names for a wide table,
    whose columns are the entities."""
    service: str | None = None
    """Column of the service that an entity belongs to; an entity is its own service if not given."""
    machine: str | None = None
    """Column of the machine that an entity runs on."""
    time: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Column of times. Of several, each file is read by the first whose clock agrees with the other files;
    clocks that are off are named. Not given where the rows of one wide file are consecutive steps."""
    metrics: Annotated[tuple[str, ...] | dict[str, MetricColumn], BeforeValidator(_listed)] = Field(
        min_length=1
    )
    """Columns to keep as metrics, or metric → its column and unit. Of a wide table, what its values are: the
    metric of all columns, or the endings of columns that are called `<entity>_<metric>`."""
    step: Seconds | None = None
    """Width of a telemetry bin [s, or 5min]; must divide a day. If not given, the divisor of a day that is
    nearest to the median gap between an entity's times; 5min where steps are only numbered."""
    time_unit: Literal["auto", "s", "ms", "us", "ns", "step"] = "auto"
    """What numbers in the time column are: Unix time in s, ms, us or ns, or numbers of steps. `auto` tells
    by how they rise and by their magnitude. Dates and ISO 8601 texts, and times as Go prints them, are what
    they are, naive ones UTC."""
    start: datetime = datetime(2018, 1, 1, tzinfo=UTC)
    """UTC time of step 0 where steps are only numbered; a Monday is assumed."""
    level: Literal["machine", "service", "container"] = "service"
    """What is forecast, and what the edges join: entities that are machines or containers, or services."""
    edges: str | None = None
    """The graph: a file, folder or pattern of edge lists, or of wide edges, whose columns are called like two
    entities with something in between (`a_b`: from a to b); or, of a wide table, a .csv file without a header
    that is a square matrix of weights, from row i to column j, in the order of the table's entities."""
    edges_source: str | None = None
    """Column of the edge list: where the load comes from; `source` or `from` if not given."""
    edges_target: str | None = None
    """Column of the edge list: where it goes; `target` or `to` if not given."""
    edges_weight: str | None = None
    """Column of the edge list: how much; `weight` or `value` if not given, and 1 without such a column."""
    edges_time: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Column of the edges: when; `time` and `timestamp` if not given, chosen as with several of the table's.
    Without such a column the edges hold at all times."""
    max_rejected_share: float = Field(0.5, ge=0, le=1)
    """A table with a larger share of unusable rows [0-1] is refused: most likely an option is wrong."""

    @field_validator("file_name")
    @classmethod
    def _says_something(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if not groups or (unknown := set(groups) - set(LABELS)):
            found = ", ".join(sorted(unknown)) if groups else "none"
            raise ValueError(f"expected named groups among {', '.join(LABELS)}, got {found}")
        return pattern

    @field_validator("metrics")
    @classmethod
    def _storable(cls, metrics: tuple[str, ...] | dict[str, MetricColumn]) -> Any:
        names = list(metrics)
        if len(set(names)) != len(names):
            raise ValueError("expected each metric once")
        for metric in names:
            if metric in _TAKEN:
                raise ValueError(f"the store keeps the name {metric} for itself; call the metric otherwise")
            if metric.removesuffix("_max") in set(names) - {metric}:
                raise ValueError(
                    f"the store keeps {metric} for the maximum of {metric.removesuffix('_max')} in a bin; "
                    "leave one of them out"
                )
        if isinstance(metrics, dict):
            columns = [of.column or metric for metric, of in metrics.items()]
            for column in columns:
                if columns.count(column) > 1:
                    raise ValueError(f"expected each column once, got {column} twice")
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
    def _roles_fit(self) -> TabularOptions:
        for role in ("entity", "service", "machine"):
            if getattr(self, role) is not None and role in self.labels:
                raise ValueError(
                    f"{role} ({getattr(self, role)}) is in file_name as well, expected one of them"
                )
        if self.is_long and "metric" in self.labels:
            raise ValueError("file_name: a file of one metric is wide, expected no entity as well")
        if self.is_long and not self.time:
            raise ValueError(
                f"entity ({self.entity or self.file_name}) names a long table, expected time as well"
            )
        of = [
            role for role in ("service", "machine") if getattr(self, role) is not None or role in self.labels
        ]
        if of and not self.is_long:
            raise ValueError(f"{of[0]}: a wide table has entities only, expected entity as well")
        if of and self.level == "machine":
            raise ValueError(f"{of[0]}: machines have none, expected level container or service")
        return self

    @property
    def labels(self) -> frozenset[str]:
        """What the files' names say."""
        return frozenset(re.compile(self.file_name).groupindex if self.file_name else ())

    @property
    def is_long(self) -> bool:
        """Whether a row is about one entity."""
        return self.entity is not None or "entity" in self.labels

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics."""
        return tuple(self.metrics)

    @property
    def columns(self) -> dict[str, MetricColumn]:
        """Metric → where it is."""
        if isinstance(self.metrics, dict):
            return self.metrics
        return {metric: MetricColumn() for metric in self.metrics}

    @property
    def kind(self) -> str:
        """Of the telemetry. A service's is that of its containers, or its own, as if it were the only one."""
        return "container" if self.level == "service" else self.level

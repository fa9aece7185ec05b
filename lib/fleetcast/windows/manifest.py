"""A windows dataset: what its `manifest.json` says, and the chronological split.

    step      0 ············· train ············· | ······ val ······ | ······ test ······ T
    window          [ look-back )[ horizon )                             a view: origin = first target step

A window belongs to the part that holds its whole horizon; its look-back may reach into the part before, which
is known by then. So no target is ever seen in two parts.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from fleetcast import __version__
from fleetcast.config import Options, Seconds
from fleetcast.errors import InputError
from fleetcast.store import MANIFEST, Store
from fleetcast.windows.calendar import Calendar, CalendarOptions

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
FORMAT = 3


class Scaler(Options):
    """Mean and standard deviation over the observed values of the training part: of each metric, and, where
    the dataset is scaled by entity, of each metric of each entity."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    entity_mean: tuple[tuple[float, ...], ...] = ()
    """[entities][F], group after group; empty where all entities share the metric's."""
    entity_std: tuple[tuple[float, ...], ...] = ()

    def of(self, nodes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[N, F] mean and std of the entities at these positions; those at −1 get the metric's."""
        mean, std = np.array(self.mean), np.array(self.std)
        if not self.entity_mean:
            return tuple(np.broadcast_to(part, (len(nodes), len(part))) for part in (mean, std))  # type: ignore[return-value]
        known = (nodes >= 0)[:, None]
        of_entity = self._of_entity
        return np.where(known, of_entity[0][nodes], mean), np.where(known, of_entity[1][nodes], std)

    @cached_property
    def _of_entity(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As arrays, made once: `of` is asked for every batch."""
        return np.array(self.entity_mean), np.array(self.entity_std)


class Shard(Options):
    """One stretch of time of one group: origins [start, stop), stored with the halo their windows need."""

    path: str
    edges: str
    group: int
    start: int
    stop: int
    first: int
    """The step of the first stored row."""
    last: int
    """One past the step of the last stored row."""


class Manifest(Options):
    """`windows/<name>/manifest.json`."""

    format: int = FORMAT
    created_by: str = f"fleetcast {__version__}"
    name: str
    level: str
    """What an entity is: machine, container or service."""
    metrics: tuple[str, ...]
    normalised: tuple[str, ...] = ()
    """Those that the publisher has scaled over the trace, so that nobody knows their unit."""
    calendar: Calendar = Calendar()
    """What time features are made of."""
    start: int
    """Unix seconds of step 0."""
    step: int
    """Width of a step [s]."""
    steps: int
    """T, steps in all."""
    history: int
    """L, look-back [steps]."""
    horizon: int
    """H [steps]."""
    lags: tuple[int, ...]
    """Seasonal lags [steps]."""
    max_gap: int
    """Longest gap that is interpolated [steps]."""
    slice: int
    """Width of a dependency slice [s]."""
    boundaries: tuple[int, int]
    """First step of the validation and of the test part."""
    groups: tuple[tuple[str, ...], ...]
    """Entities of each group; every entity is in exactly one. Only these are forecast, scored and counted."""
    borders: tuple[tuple[str, ...], ...]
    """Of each group the entities of other groups whose load flows into it: context, never targets."""
    renamed: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Entity → the earlier names of its series, the first first."""
    scaler: Scaler
    seasonal_error: tuple[float, ...]
    """Mean absolute difference of each metric to the step one (first) lag before, on the training part: the
    unit of MASE."""
    observed: tuple[float, ...]
    """Share of observed values of each metric, all parts."""
    shards: tuple[Shard, ...]
    fingerprint: str
    """Of the telemetry and the options: equal fingerprints, equal datasets."""

    @property
    def entities(self) -> int:
        """N over all groups."""
        return sum(len(group) for group in self.groups)

    @property
    def marks(self) -> tuple[str, ...]:
        """What the calendar's features are, after those of the clock."""
        return self.calendar.names

    @property
    def timezone(self) -> str:
        """In which days are counted."""
        return self.calendar.timezone

    @property
    def names(self) -> tuple[str, ...]:
        """All entities, group after group."""
        return tuple(name for group in self.groups for name in group)

    def members(self, group: int) -> tuple[str, ...]:
        """The entity axis of a group's shards: its own entities, then its border."""
        return self.groups[group] + self.borders[group]

    def nodes(self, group: int) -> NDArray[np.int64]:
        """[N] positions of a group's members in `names`."""
        places = places_of(self.groups)
        return np.array([places[name] for name in self.members(group)], np.int64)

    @property
    def last_shards(self) -> tuple[Shard, ...]:
        """The shard of each group, in their order, that ends where the telemetry does."""
        last = {shard.group: shard for shard in self.shards}  # those of a group come in the order of time
        return tuple(last[group] for group in sorted(last))

    @property
    def context(self) -> int:
        """Steps before its origin that a window may look at."""
        return context(self.history, self.lags, self.max_gap)

    def origins(self, shard: Shard, part: Part) -> NDArray[np.int64]:
        """The origins of a part's windows that lie in a shard."""
        low, high = self.bounds(part)
        first = max(low, self.history, shard.start)
        return np.arange(first, max(first, min(high - self.horizon + 1, shard.stop)), dtype=np.int64)

    def bounds(self, part: Part) -> tuple[int, int]:
        """First step of a part, and one past its last."""
        edges = (0, *self.boundaries, self.steps)
        at = PARTS.index(part)
        return edges[at], edges[at + 1]

    def windows(self, part: Part) -> int:
        """How many origins a part has (each counts all entities)."""
        low, high = self.bounds(part)
        return max(0, high - self.horizon + 1 - max(low, self.history))


@lru_cache(maxsize=2)
def places_of(groups: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    """Entity → its position among all, group after group. Not to be changed: it is made once."""
    return {name: place for place, name in enumerate(name for group in groups for name in group)}


def context(history: int, lags: tuple[int, ...], max_gap: int) -> int:
    """Steps before its origin that a window may look at: those of its look-back and, before them, the longest
    lag or the gap that is open where it begins, as its filling leans on the last value before it."""
    return history + max((max_gap, *lags))


def boundaries(steps: int, shares: tuple[float, float, float], history: int, horizon: int) -> tuple[int, int]:
    """The chronological split. Raises InputError if a part holds no whole window."""
    train, val, _ = shares
    first = round(steps * train)
    second = first + round(steps * val)
    parts = {"train": first - history, "val": second - first, "test": steps - second}
    for name, room in parts.items():
        if room < horizon:
            raise InputError(
                f"--split {' '.join(map(str, shares))}: of {steps} steps the {name} part leaves "
                f"{max(room, 0)} for targets, expected at least the horizon of {horizon}; use more data, a "
                "shorter horizon or another split"
            )
    return first, second


def load(store: Store, name: str) -> Manifest:
    """The manifest of a published dataset. Raises InputError if there is none, or of another format."""
    saved = store.read_json(f"windows/{name}/{MANIFEST}")
    if saved is None:
        known = sorted({path.split("/")[1] for path in store.list("windows", MANIFEST)})
        raise InputError(
            f"--windows {name}: no such dataset in {store.uri}; there: {', '.join(known) or 'none'}"
        )
    if saved.get("format") != FORMAT:
        raise InputError(
            f"{store.uri}/windows/{name}: written in format {saved.get('format')!r} by "
            f"{saved.get('created_by')!r}, fleetcast {__version__} expects format {FORMAT}; run shard again"
        )
    return Manifest(**saved)


class ShardOptions(Options):
    """From telemetry and dependencies to a windows dataset."""

    windows: str = Field("default", pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the windows dataset."""
    level: Literal["machine", "container", "service"] = "machine"
    """What is forecast: machines, containers, or services (the mean of their containers)."""
    metrics: tuple[str, ...] = ("cpu", "memory", "disk_io", "net_in", "net_out")
    """Metrics to read and forecast; `<metric>_max` is the maximum within the bin."""
    step: Seconds = Field(900, ge=1)
    """Width of a step [s, or 15min]; a multiple of the telemetry's, whose bins are averaged."""
    span: Seconds | None = Field(None, ge=1)
    """How much telemetry becomes windows [s, or 56d]: the last so many whole steps, and the entities that
    there is telemetry of in them; all of it if not given."""
    until: int | None = None
    """When the windows end [Unix s]: telemetry from then on is not used; all of it is if not given."""
    history: Seconds = 86_400
    """Look-back [s, or 1d]."""
    horizon: Seconds = 86_400
    """How far ahead to forecast [s, or 1d]."""
    lags: tuple[Seconds, ...] = (86_400, 604_800)
    """Seasonal lags whose values are given to models and to the naive rungs [s]. Lags shorter than the
    horizon, or too long for the training part, are left out."""
    max_gap: Seconds = Field(3600, ge=0)
    """Longest gap that is interpolated [s]; longer ones stay missing."""
    split: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of training, validation and test, in the order of time."""
    scale: Literal["metric", "entity"] = "metric"
    """What shares a scale: all entities of a metric, or each entity has its own. The latter makes small
    services count as much as large ones, in training and in scaled errors."""
    calendar: CalendarOptions = CalendarOptions()
    """Holidays and events that are known in advance, and the time zone of days."""
    renamed: Seconds | None = Field(None, ge=0)
    """Of containers: one that begins at most so long [s, or 30min] before or after another of its service
    ends takes its place, as one series with the newer's name; nobody does if not given."""
    dependencies: tuple[str, ...] = ("call", "batch", "colocation", "correlation")
    """Kinds of dependencies that become edges."""
    group_size: int = Field(64, ge=1)
    """Most entities of a group; more are cut along the dependency graph."""
    border: int = Field(16, ge=0)
    """Most entities of other groups that a group also sees: those that send the most load into it. They are
    context alone, forecast and counted in their own group. 0: groups see nothing of each other."""
    entities: int | None = Field(None, ge=1)
    """Only so many of the entities, drawn at random but always the same: of two numbers, the larger draws all
    that the smaller does. All of them if not given."""
    shard_mb: int = Field(64, ge=1)
    """Rough size of a shard in memory [MB]."""

    @field_validator("split")
    @classmethod
    def _shares(cls, split: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(split) <= 0 or abs(sum(split) - 1) > 1e-6:
            raise ValueError("expected three positive shares that sum to 1")
        return split

    @field_validator("metrics")
    @classmethod
    def _distinct(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if not metrics or len(set(metrics)) != len(metrics):
            raise ValueError("expected at least one metric, each once")
        return metrics

    @model_validator(mode="after")
    def _whole_steps(self) -> ShardOptions:
        for name in ("history", "horizon"):
            if (width := getattr(self, name)) < 1 or width % self.step:
                raise ValueError(f"{name} ({width} s) must be a positive multiple of step ({self.step} s)")
        for lag in self.lags:
            if lag % self.step:
                raise ValueError(f"lag ({lag} s) must be a multiple of step ({self.step} s)")
        if self.span is not None:
            try:
                boundaries(
                    self.span // self.step, self.split, self.history // self.step, self.horizon // self.step
                )
            except InputError as error:
                raise ValueError(f"span ({self.span} s) is too short: {error}") from error
        return self

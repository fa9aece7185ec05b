"""Live forecasts: the served model on telemetry that the server was sent, or that comes with the request.

    live = Live.load(store, snapshot)
    live.add([...])                        # newest points into the state cache
    live.forecast([Asked(...), Asked(...)])   # one answer each, whatever else is asked at the same time

The state is the end of every known entity's telemetry: what the windows had, and what was sent since. A
known entity is forecast with its whole group and what borders it, as in the nightly job, so its neighbours'
load is seen; an unknown one alone. Requests that come at the same time share runs of the model along the
window axis, which no window looks across: an answer does not depend on its batch mates.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.errors import InputError
from fleetcast.evaluation import backtest
from fleetcast.evaluation.backtest import Rung
from fleetcast.forecasting.cold_start import Kin, begin_earlier, kin_of
from fleetcast.forecasting.predict import ForecastOptions, Selected, bounds
from fleetcast.forecasting.run import read_selected
from fleetcast.schemas import QUANTILES
from fleetcast.serving.past import NO_EDGES, Floats, graph_at
from fleetcast.store import Store
from fleetcast.windows import manifest as manifests
from fleetcast.windows.batch import Batch, Edges
from fleetcast.windows.edges import SliceEdges
from fleetcast.windows.manifest import Manifest, Shard
from fleetcast.windows.views import OpenShard, read_values

#: Gives the values [K, N, F] that a window is made of.
_Values = Callable[[], "Floats"]
#: A group or an unknown entity; the step where its forecast begins; the request if it brings own points.
_Key = tuple[int | str, int, int]

#: Look-backs of which less is observed than this share are answered by the naive forecast, as nightly.
SHARE = ForecastOptions().min_history_share
_OLD = "older than what a forecast looks at"
#: Why an entity that the model does not know is forecast, and how sure that is.
UNKNOWN = "the model was not trained on this entity: its interval is twice as wide"
_WIDER = 2.0
#: Points of a step beyond which they weigh no more.
_MOST_COUNTED = 60_000
#: What a batch has of each window; the rest is of all of them.
_OF_WINDOWS = [part.name for part in dataclasses.fields(Batch) if part.name not in ("edges", "nodes")]
#: Steps that state keeps beyond what a window looks at, so that points may come a little late.
_SLACK = 4


@dataclass(frozen=True)
class Points:
    """Observations of one entity."""

    entity: str
    times: NDArray[np.int64]
    """[K] Unix seconds."""
    values: Mapping[str, NDArray[np.float64]]
    """Metric → [K], NaN where nothing was observed."""


@dataclass(frozen=True)
class Asked:
    """One request: whom to forecast, from when on, and telemetry for this request alone."""

    entities: tuple[str, ...]
    points: tuple[Points, ...] = ()
    origin: int | None = None
    """Unix time of the first step; the step after the newest observation if not given."""


@dataclass(frozen=True)
class Answer:
    """Forecasts of one request, in its order of entities."""

    origin: int
    """Unix time of the first step."""
    values: Floats
    """[N, F, H, 1 + Q] mean and quantiles in original units."""
    reasons: tuple[str | None, ...]
    """[N] why a forecast is not the model's own, or is unsure; None where it is."""


class Track:
    """The last steps of some entities: [T, N, F] in original units, NaN where nothing was observed."""

    def __init__(self, steps: int, entities: int, metrics: int, end: int) -> None:
        self.end = end
        """The step after the last one."""
        self.values = np.full((steps, entities, metrics), np.nan, np.float32)
        self.counts = np.zeros((steps, entities, metrics), np.uint16)
        """How many points each mean is of."""

    def copy(self) -> Track:
        """For a request's own points."""
        other = Track(0, 0, 0, self.end)
        other.values, other.counts = self.values.copy(), self.counts.copy()
        return other

    def reach(self, end: int) -> None:
        """Moves on, so that `end` is the step after the last one."""
        new = end - self.end
        if new <= 0:
            return
        for array, empty in ((self.values, np.nan), (self.counts, 0)):
            if new < len(array):
                array[:-new] = array[new:]
            array[max(0, len(array) - new) :] = empty
        self.end = end

    def until(self, end: int, steps: int) -> Floats:
        """[steps, N, F] what a forecast that begins at the step `end` may look at."""
        # A step that has not been reached is a gap; one that has been passed is not seen.
        seen = np.full((steps, *self.values.shape[1:]), np.nan, np.float32)
        begin, start = end - steps, self.end - len(self.values)
        low, high = max(begin, start), min(end, self.end)
        if low < high:
            seen[low - begin : high - begin] = self.values[low - start : high - start]
        return seen

    def add(
        self, places: NDArray[np.int64], steps: NDArray[np.int64], metric: int, values: NDArray[np.float64]
    ) -> int:
        """Takes points [K] of one metric into the means of their steps; returns how many were too old.

        A step that the windows had already (its mean is of points that are not here) is replaced.
        """
        at = steps - (self.end - len(self.values))
        kept = at >= 0
        cells = at[kept] * self.values.shape[1] + places[kept]
        cells, which, number = np.unique(cells, return_inverse=True, return_counts=True)
        sums = np.bincount(which, values[kept], minlength=len(cells))
        here = np.unravel_index(cells, self.values.shape[:2])
        means, counts = self.values[..., metric], self.counts[..., metric]
        known = counts[here].astype(np.int64)
        before = np.where(known > 0, means[here].astype(np.float64), 0.0)
        means[here] = (before * known + sums) / (known + number)
        counts[here] = np.minimum(known + number, _MOST_COUNTED)
        return int((~kept).sum())


@dataclass
class Live:
    """The served model and the state of all entities. Its methods may be called from several threads."""

    data: Manifest
    """The windows that the state began with."""
    selected: Selected
    model: Rung | None
    """None where a naive rung is served."""
    naive: Rung
    refused: str | None
    """Why a naive rung is served."""
    tracks: list[Track]
    """Of each group's own entities."""
    graphs: list[tuple[NDArray[np.int64], Floats]]
    """Of each group: [2, E] places among its members, and weights."""
    kin: list[list[list[Kin]]]
    """Of each group's own entities: whose past stands in for that of one that has only just begun."""
    unknown: dict[str, Track] = field(default_factory=dict)
    most_unknown: int = 10_000

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._places = {
            name: (group, place)
            for group, names in enumerate(self.data.groups)
            for place, name in enumerate(names)
        }
        self._border = [[self._places[name] for name in names] for names in self.data.borders]
        self._homes = [{group, *(home for home, _ in border)} for group, border in enumerate(self._border)]
        known = self.selected.places
        self._nodes = [
            np.array([known.get(name, -1) for name in self.data.members(group)], np.int64)
            for group in range(len(self.data.groups))
        ]
        self._shifts = self.selected.calibration["shifts"]
        self._remembered: dict[Any, tuple[Floats, tuple[str | None, ...]]] = {}

    @classmethod
    def load(cls, store: Store, windows: str, most_unknown: int = 10_000) -> Live:
        """The selected model with the end of a windows dataset as its state. Raises InputError if there is no
        model, or it does not fit the windows."""
        data = manifests.load(store, windows)
        selected = read_selected(store)
        selected.check(data)
        model, naive, refused = selected.rungs(data)
        if refused is not None and selected.rung == selected.name:
            raise InputError(refused)
        steps = data.context + _SLACK
        tracks, graphs, kin = [], [], []
        for shard in data.last_shards:
            values = read_values(store, data, shard)[-steps:]
            track = Track(steps, values.shape[1], values.shape[2], data.steps)
            track.values[steps - len(values) :] = values
            tracks.append(track)
            graphs.append(graph_at(store, data, shard, data.start + data.step * data.steps))
            kin.append(kin_of(store, data, shard.group, *graphs[-1]))
        return cls(data, selected, model, naive, refused, tracks, graphs, kin, most_unknown=most_unknown)

    def take_over(self, older: Live) -> None:
        """Keeps what an older state was sent since; both are of the same steps and metrics."""
        if (older.data.step, older.data.metrics) != (self.data.step, self.data.metrics):
            return
        moved = (older.data.start - self.data.start) // self.data.step
        with older._lock, self._lock:
            for name, (group, place) in older._places.items():
                if name not in self._places:
                    continue
                track, (own, at) = older.tracks[group], self._places[name]
                mine = self.tracks[own]
                mine.reach(track.end + moved)
                sent = track.counts[:, place] > 0
                steps = np.flatnonzero(sent.any(1))
                to = steps + (track.end + moved - len(track.values)) - (mine.end - len(mine.values))
                keep = to >= 0
                steps, to = steps[keep], to[keep]
                empty = ~np.isfinite(mine.values[to, at]) & sent[steps]
                mine.values[to, at] = np.where(empty, track.values[steps, place], mine.values[to, at])
                mine.counts[to, at] = np.where(empty, track.counts[steps, place], mine.counts[to, at])
            for name, track in older.unknown.items():
                if name not in self._places and len(track.values) == self.data.context + _SLACK:
                    self.unknown[name] = track.copy()
                    self.unknown[name].end += moved

    # -- telemetry -------------------------------------------------------------------------------------------

    def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        """Takes new observations into the state. Returns how many values are kept, and why others are not."""
        with self._lock:
            self._remembered.clear()
            return self._add(points, self.tracks, self.unknown)

    def _add(
        self, points: Sequence[Points], tracks: list[Track], unknown: dict[str, Track]
    ) -> tuple[int, dict[str, int]]:
        if not points:
            return 0, {}
        # A wrong clock must not make all that is known look old.
        known = max(track.end for track in self.tracks)
        last = max(known + self.data.horizon, (int(time.time()) - self.data.start) // self.data.step + 1)
        step = (np.concatenate([one.times for one in points]) - self.data.start) // self.data.step
        latest = max(0, int(step[step < last].max(initial=-1)) + 1)
        places, rows, found = self._find(points, tracks, unknown, latest)

        kept, rejected = 0, Counter[str]()
        for name in dict.fromkeys(name for one in points for name in one.values):
            values = np.concatenate([one.values.get(name, np.full(len(one.times), np.nan)) for one in points])
            seen = np.isfinite(values)
            for reason, wrong in (
                (f"{name} is not a metric of the model", np.full(len(step), name not in self.data.metrics)),
                ("too many entities that the model does not know", places < 0),
                ("negative", values < 0),
                ("in the future", step >= last),
            ):
                rejected[reason] += int((seen & wrong).sum())
                seen &= ~wrong
            for track, of in zip(found, rows, strict=True):
                good = of[seen[of]]
                if len(good):
                    metric = self.data.metrics.index(name)
                    old = track.add(places[good], step[good], metric, values[good])
                    rejected[_OLD] += old
                    kept += len(good) - old
        return kept, {reason: count for reason, count in rejected.items() if count}

    def _find(
        self, points: Sequence[Points], tracks: list[Track], unknown: dict[str, Track], end: int
    ) -> tuple[NDArray[np.int64], list[NDArray[np.int64]], list[Track]]:
        """The place of each time in its track, −1 where there is no room for its entity; and, of each track
        that is concerned, moved on to the step `end`, which times are its own."""
        places, first = np.full(sum(len(one.times) for one in points), -1, np.int64), 0
        found: dict[int, tuple[Track, list[NDArray[np.int64]]]] = {}
        for one in points:
            here, first = np.arange(first, first + len(one.times)), first + len(one.times)
            where = self._track(one.entity, tracks, unknown, end)
            if where is not None:
                track, places[here] = where
                found.setdefault(id(track), (track, []))[1].append(here)
        return places, [np.concatenate(rows) for _, rows in found.values()], [of for of, _ in found.values()]

    def _track(
        self, entity: str, tracks: list[Track], unknown: dict[str, Track], end: int
    ) -> tuple[Track, int] | None:
        """Where an entity's values are, moved on to `end`; None where too many are unknown already."""
        if entity in self._places:
            group, place = self._places[entity]
            tracks[group].reach(end)
            return tracks[group], place
        if entity not in unknown:
            if len(unknown) >= self.most_unknown:
                return None
            unknown[entity] = Track(self.data.context + _SLACK, 1, len(self.data.metrics), end)
        unknown[entity].reach(end)
        return unknown[entity], 0

    # -- forecasts -------------------------------------------------------------------------------------------

    def forecast(self, asked: Sequence[Asked]) -> list[Answer | InputError]:
        """An answer, or what is wrong with it, for each request."""
        with self._lock:
            prepared = [self._prepare(one) for one in asked]
            work: dict[_Key, _Values] = {}
            for one in prepared:
                if not isinstance(one, InputError):
                    work |= one.work
            found = self._run(work)
        return [one if isinstance(one, InputError) else one.answer(found, self.data) for one in prepared]

    def _prepare(self, one: Asked) -> _Prepared | InputError:
        """The tracks that a request needs: the state's own, or copies with the request's points."""
        own = {point.entity for point in one.points}
        groups = {self._places[name][0] for name in own if name in self._places}
        tracks = [track.copy() if group in groups else track for group, track in enumerate(self.tracks)]
        touched = {group for group, homes in enumerate(self._homes) if groups and homes & groups}
        unknown = {
            name: self.unknown[name].copy() for name in own.union(one.entities) if name in self.unknown
        }
        _, rejected = self._add(one.points, tracks, unknown)
        for reason, count in rejected.items():
            if reason != _OLD:
                return InputError(f"telemetry: {count} values cannot be used: {reason}")
        missing = [name for name in one.entities if name not in self._places and name not in unknown]
        if missing:
            return InputError(f"entities: {missing[0]} is not known and has no telemetry")
        ends = {
            name: tracks[self._places[name][0]].end if name in self._places else unknown[name].end
            for name in one.entities
        }
        end = max(ends.values())
        if one.origin is not None:
            end = -(-(one.origin - self.data.start) // self.data.step)
            if not max(ends.values()) - _SLACK <= end <= max(ends.values()) + self.data.horizon:
                newest = self.data.start + self.data.step * max(ends.values())
                asked, known = (f"{np.datetime64(time, 's')}Z" for time in (one.origin, newest))
                return InputError(
                    f"origin: {asked}, expected a time within {_SLACK} steps before and {self.data.horizon} "
                    f"after the newest observation, which ends at {known}"
                )
        work: dict[_Key, _Values] = {}
        where = []
        for name in one.entities:
            group, place = self._places.get(name, (name, 0))
            private = isinstance(group, str) or group in touched
            key = (group, end, id(one) if private else -1)
            if key not in work:
                work[key] = (
                    partial(self._members, group, end, tracks)
                    if isinstance(group, int)
                    else partial(unknown[name].until, end, self.data.context)
                )
            where.append((key, place))
        return _Prepared(end, work, where)

    def _run(self, work: Mapping[Any, _Values]) -> dict[Any, tuple[Floats, tuple[str | None, ...]]]:
        """Group, origin and request → [N, F, H, 1 + Q] and reasons. The same group of several requests is one
        run of the model, in which each is a window."""
        found: dict[Any, tuple[Floats, tuple[str | None, ...]]] = {}
        by_group: dict[Any, list[Any]] = {}
        for key in work:
            if key in self._remembered:
                found[key] = self._remembered[key]
            else:
                # Unknown entities are all alike: each a window of its own, of one entity.
                group = key[0] if isinstance(key[0], int) else ("unknown", key[1])
                by_group.setdefault(group, []).append(key)
        if len(self._remembered) > 2 * len(self.tracks):
            self._remembered.clear()
        for group, keys in by_group.items():
            if isinstance(group, int):
                batch = _stack([self._batch(group, key[1], work[key]()) for key in keys])
            else:
                batch = self._unknown(group[1], [work[key]() for key in keys])
            for key, one in zip(keys, self._forecast(batch), strict=True):
                found[key] = one
                if key[2] == -1:
                    self._remembered[key] = one
        return found

    def _members(self, group: int, end: int, tracks: Sequence[Track]) -> Floats:
        """[K, N, F] the values of a group's own entities and of its border, as the tracks have them."""
        seen = {home: tracks[home].until(end, self.data.context) for home in self._homes[group]}
        border = [seen[home][:, [place]] for home, place in self._border[group]]
        return np.concatenate([seen[group], *border], axis=1)

    def _batch(self, group: int, end: int, values: Floats) -> Batch:
        """A group's window that ends where a forecast begins."""
        own = len(self.data.groups[group])
        if any(self.kin[group]):
            values, _ = begin_earlier(values, self.kin[group], self.data.history)
        return self._window(self._nodes[group], own, end, values, *self.graphs[group])

    def _unknown(self, end: int, values: Sequence[Floats]) -> Batch:
        """A window of each of some unknown entities, without edges."""
        count = len(values)
        found = self._window(np.full(count, -1), count, end, np.concatenate(values, axis=1), *NO_EDGES)
        tensors = {}
        for name in _OF_WINDOWS:
            part: torch.Tensor = getattr(found, name)
            # [1, L, U, …] → [U, L, 1, …], but [1, L, C] and [1] are the same for all.
            tensors[name] = part.transpose(0, 2) if part.dim() > 3 else part.expand(count, *part.shape[1:])
        return Batch(edges=found.edges, nodes=found.nodes[:1], **tensors)

    def _window(
        self,
        nodes: NDArray[np.int64],
        own: int,
        end: int,
        values: Floats,
        ends: NDArray[np.int64],
        weight: Floats,
    ) -> Batch:
        """The window of some entities, `own` of which are forecast, that ends at the step `end`, with values
        [K, N, F] until then."""
        first = end - len(values)
        shard = Shard(path="", edges="", group=0, start=end, stop=end + 1, first=first, last=end)
        index, times = torch.from_numpy(ends), torch.zeros(len(weight), dtype=torch.int64)
        edges = SliceEdges.build(torch.tensor([0]), times, index[0], index[1], torch.from_numpy(weight))
        opened = OpenShard(self.data, shard, values, edges, nodes, own, self.selected.scaler)
        return opened.batch(np.array([end]))

    def _forecast(self, batch: Batch) -> list[tuple[Floats, tuple[str | None, ...]]]:
        """[O, F, H, 1 + Q] and reasons, for each window."""
        scaler = self.selected.scaler
        rung = self.model or self.naive
        name = self.selected.rung if self.model is not None else self.selected.naive
        own = backtest.forecast(rung, batch, scaler, QUANTILES, self._shifts[name])
        stand_in = backtest.forecast(self.naive, batch, scaler, QUANTILES, self._shifts[self.selected.naive])
        low, high = bounds(self.data.metrics)
        found = []
        for window in range(len(batch.origins)):
            share = batch.mask[window, :, : batch.own].float().mean((0, 2)).numpy()
            finite = np.isfinite(own.mean[window]).all((0, 2))
            finite &= np.isfinite(own.quantiles[window]).all((0, 2, 3))
            naive = (share < SHARE) | ~finite
            mean = np.where(naive[:, None], stand_in.mean[window], own.mean[window])
            quantiles = np.where(naive[:, None, None], stand_in.quantiles[window], own.quantiles[window])
            stranger = batch.nodes[: batch.own].numpy() < 0
            wide = mean[..., None] + _WIDER * (quantiles - mean[..., None])
            quantiles = np.where(stranger[:, None, None], wide, quantiles)
            values = np.concatenate(
                [np.clip(mean, low, high)[..., None], np.clip(quantiles, low[:, None], high[:, None])], -1
            )
            reasons = tuple(
                f"less than {SHARE:.0%} of the look-back is observed"
                if share[n] < SHARE
                else "the model's forecast is not a finite number"
                if not finite[n]
                else UNKNOWN
                if stranger[n]
                else self.refused
                for n in range(len(share))
            )
            found.append((values.transpose(1, 2, 0, 3).astype(np.float32), reasons))
        return found


@dataclass(frozen=True)
class _Prepared:
    """What a request needs to be run, and where its entities are in it."""

    end: int
    work: dict[_Key, _Values]
    where: list[tuple[_Key, int]]

    def answer(self, found: Mapping[Any, tuple[Floats, tuple[str | None, ...]]], data: Manifest) -> Answer:
        """Picks its entities out of what was run."""
        values = np.stack([found[key][0][place] for key, place in self.where])
        reasons = tuple(found[key][1][place] for key, place in self.where)
        return Answer(data.start + data.step * self.end, values, reasons)


def _stack(batches: Sequence[Batch]) -> Batch:
    """Windows of the same number of entities as one batch."""
    if len(batches) == 1:
        return batches[0]
    nodes = batches[0].x.shape[2]
    index = torch.cat([one.edges.index + place * nodes for place, one in enumerate(batches)], dim=1)
    edges = Edges(index, torch.cat([one.edges.weight for one in batches]))
    tensors = {name: torch.cat([getattr(one, name) for one in batches]) for name in _OF_WINDOWS}
    return Batch(edges=edges, nodes=batches[0].nodes, **tensors)

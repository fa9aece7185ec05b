"""A published forecast in memory, and what can be asked of it.

    snapshot = Snapshot.load(store, folder)        # checked: whole, finite, not negative
    snapshot.values                                # one array [N, F, H, 1 + Q]
    snapshot.peaks("cpu", 0.95, first=0, most=10)

A snapshot never changes; a newer forecast is another snapshot, so an answer is always of one forecast. It
takes 4 · N · F · H · 9 bytes, 70 MB for 4,000 machines, 5 metrics and 96 steps; as much again for the
forecast before it, if there is one, and a third of that for what was observed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from fleetcast import schemas
from fleetcast.errors import InputError
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.serving.past import NO_EDGES, Floats, Past
from fleetcast.store import MANIFEST, Store
from fleetcast.training.register import SELECTED

log = logging.getLogger("fleetcast")

#: Columns of the array's last axis: the mean, then the quantiles.
COLUMNS = ("mean", *(quantile_name(q) for q in QUANTILES))
MEAN = 0
#: Quantile by which the dependence of entities is told from the width of their total.
_WIDE = 1 + QUANTILES.index(0.95)
#: History that is kept at least [s]; three horizons, if that is longer.
_RECENT = 2 * 86_400


def column(quantile: float) -> int:
    """Where a quantile is on the last axis. Raises InputError for a level that is not forecast."""
    for place, known in enumerate(QUANTILES):
        if abs(known - quantile) < 1e-9:
            return 1 + place
    raise InputError(f"quantile: {quantile:g}, expected one of {', '.join(map(str, QUANTILES))}")


def newest(store: Store, noun: str = "forecasts") -> str | None:
    """The folder of the newest published forecast, or None; `noun` is the folder in which forecasts are."""
    found = [path.rsplit("/", 1)[0] for path in store.list(noun, MANIFEST)]
    return max(found, default=None)


@dataclass(frozen=True)
class Snapshot:
    """One published forecast."""

    store: Store
    folder: str
    manifest: dict[str, Any]
    """The forecast's own manifest."""
    entities: tuple[str, ...]
    values: Floats
    """[N, F, H, 1 + Q] mean and quantiles in original units."""
    fallback: tuple[str | None, ...]
    """[N] why an entity has the naive forecast, or None."""
    past: Past
    """What came before, and the graph."""
    earlier: Snapshot | None = None
    """The forecast before, which had time to prove itself; None if there is none."""

    @classmethod
    def load(cls, store: Store, folder: str) -> Snapshot:
        """Reads a forecast and what is around it. Raises InputError if the forecast is not whole, or holds
        what no one should act on."""
        alone = cls._read(store, folder)
        most = max(3 * alone.horizon, _RECENT // alone.step)
        past = Past.read(
            store,
            alone.manifest["windows"],
            alone.entities,
            alone.metrics,
            int(alone.issued.timestamp()),
            alone.step,
            most,
        )
        return replace(alone, past=past, earlier=_earlier(alone))

    @classmethod
    def _read(cls, store: Store, folder: str) -> Snapshot:
        """A forecast without what is around it."""
        manifest = store.read_json(f"{folder}/{MANIFEST}")
        if manifest is None:
            raise InputError(f"{store.uri}/{folder}: is not a published forecast")
        metrics, horizon = manifest["metrics"], manifest["horizon"]
        each = len(metrics) * horizon
        names: list[str] = []
        parts, reasons = [], []
        for path in store.list(folder, ".parquet"):
            table = store.read_table(path)
            if table.num_rows % each:
                raise InputError(f"{store.uri}/{path}: {table.num_rows} rows, expected a multiple of {each}")
            # Rows are in the order of entity, metric and time.
            firsts = pa.array(np.arange(0, table.num_rows, each))
            names += table["entity"].take(firsts).to_pylist()
            reasons += table["fallback"].take(firsts).to_pylist()
            values = np.stack([table[name].to_numpy() for name in COLUMNS], axis=-1)
            parts.append(
                values.astype(np.float32, copy=False).reshape(-1, len(metrics), horizon, len(COLUMNS))
            )
        expected = manifest["figures"]["entities"]
        if not parts or len(set(names)) != expected:
            raise InputError(f"{store.uri}/{folder}: {len(set(names))} entities, expected {expected}")
        if store.read_json(f"{folder}/{MANIFEST}") != manifest:
            raise InputError(f"{store.uri}/{folder}: was published anew while it was read")
        values = np.concatenate(parts)
        wrong = int((~np.isfinite(values)).sum() + (values < 0).sum())
        if wrong:
            raise InputError(f"{store.uri}/{folder}: {wrong} values are negative or not finite")
        nothing = Past(np.zeros((0, len(names), len(metrics)), np.float32), *NO_EDGES)
        return cls(store, folder, manifest, tuple(names), values, tuple(reasons), nothing)

    # -- what it is ------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> tuple[str, ...]:
        """F metrics."""
        return tuple(self.manifest["metrics"])

    @property
    def normalised(self) -> tuple[str, ...]:
        """Those whose unit nobody knows."""
        return tuple(self.manifest.get("normalised", ()))

    @property
    def step(self) -> int:
        """Width of a step [s]."""
        return int(self.manifest["step"])

    @property
    def horizon(self) -> int:
        """H steps."""
        return int(self.manifest["horizon"])

    @cached_property
    def issued(self) -> datetime:
        """Start of the first step."""
        return _issued(self.manifest)

    @property
    def valid_until(self) -> datetime:
        """End of the last step."""
        return self.issued + timedelta(seconds=self.step * self.horizon)

    @cached_property
    def seconds(self) -> NDArray[np.int64]:
        """[H] Unix time of each step's start."""
        return int(self.issued.timestamp()) + self.step * np.arange(self.horizon)

    @cached_property
    def times(self) -> NDArray[np.datetime64]:
        """[H] start of each step, UTC."""
        return self.seconds.astype("datetime64[s]")

    @cached_property
    def places(self) -> dict[str, int]:
        """Entity → its place on the first axis."""
        return {name: place for place, name in enumerate(self.entities)}

    def place(self, entity: str) -> int:
        """Where an entity is. Raises KeyError."""
        return self.places[entity]

    def metric(self, name: str) -> int:
        """Where a metric is. Raises InputError for one that is not forecast."""
        if name not in self.metrics:
            raise InputError(f"metric: {name}, expected one of {', '.join(self.metrics)}")
        return self.metrics.index(name)

    @cached_property
    def overview(self) -> dict[str, Any]:
        """The cluster's total and its history, as the forecast job wrote them."""
        found: dict[str, Any] = self.store.read_json(f"{self.folder}/overview.json")
        return found

    @cached_property
    def details(self) -> dict[str, dict[str, Any]]:
        """Entity → parent, service, capacities."""
        path = "entities/entities.parquet"
        if not self.store.exists(path):
            return {}
        columns = ["entity", "parent", "service", "cpu_capacity", "memory_capacity"]
        table: Any = pl.from_arrow(self.store.read_table(path, columns))
        rows = table.filter(pl.col("entity").cast(pl.String).is_in(list(self.entities)))
        return {row["entity"]: row for row in rows.iter_rows(named=True)}

    # -- what can be asked -----------------------------------------------------------------------------------

    def search(self, text: str) -> list[str]:
        """Entities whose name has the text, in any case; those that begin with it first."""
        if not text:
            return list(self._sorted)
        wanted = text.lower()
        found = [name for name in self._sorted if wanted in name.lower()]
        return sorted(found, key=lambda name: not name.lower().startswith(wanted))

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.entities, key=lambda name: (len(name), name))

    def members(self, service: str | None, parent: str | None) -> list[int]:
        """The entities of a service, on a parent, or both."""
        wanted = {"service": service, "parent": parent}
        asked = {name: value for name, value in wanted.items() if value is not None}
        return [
            place
            for place, name in enumerate(self.entities)
            if all(self.details.get(name, {}).get(key) == value for key, value in asked.items())
        ]

    def first_step(self, now: datetime) -> int:
        """The first step that is not over."""
        return int(np.clip((now - self.issued).total_seconds() // self.step, 0, self.horizon - 1))

    def peaks(self, metric: str, quantile: float, first: int, most: int) -> list[tuple[int, int]]:
        """(entity, step) of the highest values of a quantile, highest first, one for each entity."""
        values = self.values[:, self.metric(metric), first:, column(quantile)]
        highest = values.max(1)
        most = min(most, len(highest))
        chosen = np.argpartition(-highest, most - 1)[:most]
        order = chosen[np.lexsort((chosen, -highest[chosen]))]
        return [(int(n), first + int(values[n].argmax())) for n in order]

    def passes(self, metric: str, quantile: float, limit: float, first: int) -> NDArray[np.int64]:
        """[N] first step at which the quantile is above the limit, −1 where it never is."""
        above = self.values[:, self.metric(metric), first:, column(quantile)] > limit
        return np.where(above.any(1), first + above.argmax(1), -1)

    def total(self, metric: str, entities: Sequence[int] | None) -> tuple[Floats, str]:
        """[H, 1 + Q] the sum over some entities, or all, and how its interval was made."""
        f = self.metric(metric)
        if entities is None:
            found = self.overview["total"][metric]["forecast"]
            columns = [np.asarray(found[name], np.float32) for name in COLUMNS]
            return np.stack(columns, -1), self.manifest["total"]
        values = self.values[list(entities), f].astype(np.float64)
        mean, away = values[..., :1], np.abs(values - values[..., :1])
        share = self._dependence[f]
        width = np.sqrt((1 - share) * (away**2).sum(0) + share * away.sum(0) ** 2)
        side = np.where(np.arange(len(COLUMNS)) == MEAN, 0, np.sign(np.array([0.5, *QUANTILES]) - 0.5))
        median = (values - mean).sum(0)  # next to the mean the sign follows the entities' own
        side = np.where(np.abs(np.array([0.5, *QUANTILES]) - 0.5) < 1e-9, np.sign(median), side)
        total = np.maximum(mean.sum(0) + side * width, 0)
        total[:, 1:] = np.sort(total[:, 1:], axis=-1)
        return total.astype(np.float32), (
            "The sum of means; deviations of the entities' quantiles are added as if any two had a "
            f"correlation of {share:.2f}: the one, but at least 0, with which all entities together give the "
            "cluster's own interval, which comes from its own errors on the validation part."
        )

    @cached_property
    def _dependence(self) -> NDArray[np.float64]:
        """[F] the correlation between entities with which their widths add up to the total's."""
        found = []
        for f, metric in enumerate(self.metrics):
            whole, _ = self.total(metric, None)
            away = np.abs(self.values[:, f, :, _WIDE] - self.values[:, f, :, MEAN]).astype(np.float64)
            squares, square = (away**2).sum(0).mean(), (away.sum(0) ** 2).mean()
            width = ((whole[:, _WIDE] - whole[:, MEAN]) ** 2).mean()
            found.append(np.clip((width - squares) / max(square - squares, 1e-12), 0, 1))
        return np.array(found)

    def table(self, entities: Sequence[int], metrics: Sequence[int], horizon: int) -> pa.Table:
        """Rows as in the store, for some entities and metrics and the first steps."""
        shape = (len(entities), len(metrics), horizon)
        values = self.values[np.ix_(list(entities), list(metrics))][:, :, :horizon]
        n, f, h = (grid.ravel() for grid in np.indices(shape))
        reasons = pa.array([self.fallback[e] for e in entities], pa.string()).take(pa.array(n))
        rungs = [
            self.manifest["rung"] if self.fallback[e] is None else self.manifest["naive"] for e in entities
        ]
        columns = {
            "entity": pa.array([self.entities[e] for e in entities]).take(pa.array(n)),
            "metric": pa.array([self.metrics[m] for m in metrics]).take(pa.array(f)),
            "time": pa.array(self.seconds[h] * 1000).cast(schemas.TIME),
            **{name: pa.array(values[..., k].ravel()) for k, name in enumerate(COLUMNS)},
            "model": pa.array(rungs).take(pa.array(n)),
            "fallback": reasons,
        }
        return pa.table(columns).cast(schemas.FORECASTS)

    # -- what came before, and what is around ----------------------------------------------------------------

    def history(self, entity: str) -> tuple[NDArray[np.datetime64], Floats]:
        """[T] times and [T, F] values before the forecast, NaN in gaps, from the first that was observed."""
        values = self.past.values[:, self.place(entity)]
        seen = np.isfinite(values).any(1)
        values = values[seen.argmax() :] if seen.any() else values[:0]
        seconds = int(self.issued.timestamp()) - self.step * np.arange(len(values), 0, -1)
        return seconds.astype("datetime64[s]"), values

    def accuracy(self, entity: str) -> tuple[datetime | None, dict[str, dict[str, float]]]:
        """How the forecast before did on an entity: when that was issued, and of each metric its errors."""
        earlier = self.earlier
        if earlier is None or entity not in earlier.places:
            return None, {}
        times, observed = self.history(entity)
        forecast = earlier.values[earlier.place(entity)]  # [F, H, K]
        common, at, then = np.intersect1d(times, earlier.times, return_indices=True)
        if not len(common):
            return None, {}
        low, high = column(0.05), column(0.95)
        found = {}
        for f, metric in enumerate(self.metrics):
            if metric not in earlier.metrics:
                continue
            of = forecast[earlier.metrics.index(metric)][then]
            y = observed[at, f]
            seen = np.isfinite(y)
            if seen.any():
                found[metric] = {
                    "mean_absolute_error": float(np.abs(y - of[:, column(0.5)])[seen].mean()),
                    "inside_90": float(((y >= of[:, low]) & (y <= of[:, high]))[seen].mean()),
                    "observations": int(seen.sum()),
                }
        return earlier.issued, found

    def card(self) -> dict[str, Any]:
        """What is known of the model that made the forecast."""
        folder = self.manifest["model"]
        about = self.store.read_json(f"{folder}/{MANIFEST}") or {}
        figures = self.store.read_json(f"{folder}/metrics.json") or {}
        selected = self.store.read_json(SELECTED) or {}
        told = ("data", "windows", "level", "step")
        rest = ("options", "scaler", "seasonal_error", *told)
        return {
            "model": self.manifest["rung"],
            "folder": folder,
            "reason": selected.get("reason", "") if selected.get("model") == folder else "",
            "trained_on": {name: about.get(name) for name in told},
            "figures": figures.get("summary", {}),
            "options": about.get("options", {}),
            "provenance": {name: value for name, value in about.items() if name not in rest},
        }


def _earlier(snapshot: Snapshot) -> Snapshot | None:
    """The newest forecast that was over, or half over, when this one was issued, and that can be used."""
    store = snapshot.store
    noun = snapshot.folder.split("/", 1)[0]
    folders = {path.rsplit("/", 1)[0] for path in store.list(noun, MANIFEST)}
    for folder in sorted((one for one in folders if one < snapshot.folder), reverse=True):
        manifest = store.read_json(f"{folder}/{MANIFEST}")
        half = timedelta(seconds=manifest["step"] * manifest["horizon"] / 2)
        if snapshot.issued - _issued(manifest) < half:
            continue
        try:
            return Snapshot._read(store, folder)
        except InputError as error:
            log.warning("serve: the forecast before is not looked at: %s", error)
    return None


def _issued(manifest: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(manifest["figures"]["issued"].replace("Z", "+00:00"))


def now(clock: str, snapshot: Snapshot) -> datetime:
    """What time it is for a forecast: by the server's clock, or where the trace stands."""
    return snapshot.issued if clock == "trace" else datetime.now(UTC)

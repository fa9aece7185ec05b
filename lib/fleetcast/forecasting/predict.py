"""The forecast of one entity group from its last window; plain torch and Arrow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from fleetcast import schemas
from fleetcast.config import Options, Seconds
from fleetcast.errors import InputError
from fleetcast.evaluation import backtest
from fleetcast.evaluation.backtest import Forecast, Rung
from fleetcast.forecasting.cold_start import KINDS, Kind, begin_earlier, kin_of
from fleetcast.models import saving
from fleetcast.schemas import FRACTIONS, QUANTILES
from fleetcast.store import MANIFEST, Store
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler, Shard
from fleetcast.windows.views import OpenShard, read_values

log = logging.getLogger("fleetcast")


#: What a model saw that was trained before there were calendars.
_CLOCK_ALONE: dict[str, Any] = {"marks": [], "timezone": "UTC"}


#: What is said of the model of a forecast whose entity has only just begun.
COLD: dict[Kind | None, str] = {
    None: "",
    "siblings": " (cold start)",
    "neighbours": " (cold start from neighbours)",
}


class ForecastOptions(Options):
    """From the selected model and the newest windows to published forecasts."""

    windows: str = "default"
    """Name of the windows dataset whose end is the forecast's origin."""
    min_history_share: float = Field(0.25, ge=0, le=1)
    """Share of the look-back [0-1] that must be observed of an entity; else it gets the naive forecast."""
    gone_after: Seconds = Field(86_400, ge=0)
    """An entity that nothing was observed of for so long [s, or 1d], nor in the look-back, has been shut down
    or renamed: it is not forecast."""
    cold_start: tuple[Kind, ...] = KINDS
    """Whose past may stand in for that of an entity that began within the look-back, the first first: its
    siblings' of the same service, or its neighbours' in the graph. Nobody's if empty."""


@dataclass(frozen=True)
class Selected:
    """The served model: its folder, the rung that forecasts, and the naive one that stands in for it."""

    store: Store
    folder: str
    rung: str
    naive: str
    reason: str

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The model's manifest.json."""
        return self._read(MANIFEST)

    @property
    def name(self) -> str:
        """The model's name in the ladder."""
        return str(self.manifest["options"]["model"])

    @cached_property
    def scaler(self) -> Scaler:
        """The scaler of the data that the model was trained on."""
        return Scaler(**self.manifest["scaler"])

    @cached_property
    def places(self) -> dict[str, int]:
        """Each entity that the model was trained on → its place among them."""
        return {name: place for place, name in enumerate(self._read(saving.CONFIG)["geometry"]["entities"])}

    @cached_property
    def calibration(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """`shifts` and `total_shifts` of every rung."""
        found = self._read("calibration.json")
        return {
            kind: {rung: np.asarray(shifts) for rung, shifts in found[kind].items()}
            for kind in ("shifts", "total_shifts")
        }

    def _read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] | None = self.store.read_json(f"{self.folder}/{name}")
        if found is None:
            raise InputError(
                f"{self.store.uri}/{self.folder}/{name}: no such file, expected the selected model; run train"
            )
        return found

    def check(self, data: Manifest) -> None:
        """Raises InputError if the model does not fit a windows dataset."""
        own = self.manifest
        wanted = {**_CLOCK_ALONE, **self._read(saving.CONFIG)["geometry"]}
        wanted |= {"step": own["step"], "level": own["level"]}
        for name in ("level", "step", "metrics", "history", "horizon", "lags", "marks", "timezone"):
            given = getattr(data, name)
            given = list(given) if isinstance(given, tuple) else given
            if given != wanted[name]:
                raise InputError(
                    f"windows {data.name}: {name} {given}, but the selected model {self.folder} "
                    f"was trained with {wanted[name]}; train a model on this dataset"
                )

    def rungs(self, data: Manifest) -> tuple[Rung | None, Rung, str | None]:
        """The model's forecaster, the naive one, and why the model cannot be used at all (or None)."""
        naive = backtest.rungs(data, None, "")[self.naive]
        if self.rung != self.name:
            return None, naive, f"{self.name} is not better than {self.naive} ({self.reason})"
        try:
            return self._saved.model, naive, None
        except InputError as error:
            return None, naive, f"the model cannot be loaded: {error}"

    @cached_property
    def _saved(self) -> saving.Saved:
        return saving.Saved(self.store, self.folder)


@dataclass(frozen=True)
class GroupForecast:
    """The forecast of one group in original units."""

    entities: tuple[str, ...]
    """N of the group's own that there is still telemetry of."""
    mean: NDArray[np.float64]
    """[H, N, F]."""
    quantiles: NDArray[np.float64]
    """[H, N, F, Q], rising."""
    fallback: list[str | None]
    """Per entity: why it has the naive forecast, or None."""
    cold: list[Kind | None]
    """Per entity: who stood in for its past, if it has only just begun."""
    history: NDArray[np.float64]
    """[3 H or less, N, F] what was observed before the origin, NaN in gaps."""
    gone: NDArray[np.float64]
    """[3 H or less, G, F] the same of those that nothing was observed of in the whole look-back: they have
    been shut down, or renamed, and are not forecast."""


def predict(
    store: Store, data: Manifest, shard: Shard, selected: Selected, options: ForecastOptions
) -> GroupForecast:
    """Forecasts a group's own entities from the end of the telemetry, but those that are gone."""
    scaler = selected.scaler
    opened = OpenShard.read(store, data, shard, scaler, selected.places)
    history, recent = _history(opened, data, scaler), max(data.history, -(-options.gone_after // data.step))
    here = np.atleast_1d(opened.last_steps(recent)[1].any((0, 2)))
    batch = opened.batch(np.array([data.steps]))
    edges = batch.edges.index.numpy(), batch.edges.weight.numpy()
    kin, new = kin_of(store, data, shard.group, *edges, options.cold_start), dict[int, Kind]()
    if any(kin):
        values = read_values(store, data, shard, border=True)
        values[-data.context :], new = begin_earlier(values[-data.context :], kin, data.history)
        batch = opened.of(values).batch(np.array([data.steps])) if new else batch
    model, naive, refused = selected.rungs(data)
    shifts = selected.calibration["shifts"]
    stand_in = backtest.forecast(naive, batch, scaler, QUANTILES, shifts[selected.naive])
    entities = data.groups[shard.group]
    own, reasons = stand_in, [refused] * len(entities)
    if model is not None:
        own, reasons = _by_model(selected, model, batch, scaler, len(entities))
    reasons = [_too_little(batch, n, options.min_history_share) or reason for n, reason in enumerate(reasons)]
    use_naive = np.array([reason is not None for reason in reasons])
    mean = np.where(use_naive[:, None], stand_in.mean[0], own.mean[0])
    quantiles = np.where(use_naive[:, None, None], stand_in.quantiles[0], own.quantiles[0])
    low, high = bounds(data.metrics)
    return GroupForecast(
        tuple(name for name, is_here in zip(entities, here, strict=True) if is_here),
        np.clip(mean, low, high)[:, here],
        np.clip(quantiles, low[:, None], high[:, None])[:, here],
        [reason for reason, is_here in zip(reasons, here, strict=True) if is_here],
        [new.get(n) for n in np.flatnonzero(here).tolist()],
        history[:, here],
        history[:, ~here],
    )


def _by_model(
    selected: Selected, model: Rung, batch: Batch, scaler: Scaler, entities: int
) -> tuple[Forecast, list[str | None]]:
    """The model's forecast, and per entity why it cannot be used."""
    try:
        found = backtest.forecast(
            model, batch, scaler, QUANTILES, selected.calibration["shifts"][selected.rung]
        )
    except Exception as error:  # whatever a model does wrong, the fleet still gets a forecast
        log.exception("%s failed", selected.folder)
        point = np.full(batch.y.shape, np.nan)
        nothing = Forecast(point, point, np.full((*point.shape, len(QUANTILES)), np.nan))
        return nothing, [f"the model failed: {type(error).__name__}: {error}"] * entities
    finite = np.isfinite(found.mean).all((0, 1, 3)) & np.isfinite(found.quantiles).all((0, 1, 3, 4))
    return found, [
        None if ok else "the model's forecast is not a finite number" for ok in np.atleast_1d(finite)
    ]


def _too_little(batch: Batch, entity: int, share: float) -> str | None:
    """The reason why an entity's look-back is too empty for a model, or None."""
    observed = float(batch.mask[0, :, entity].float().mean())
    return f"less than {share:.0%} of the look-back is observed" if observed < share else None


def bounds(metrics: tuple[str, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """No load is negative, and no fraction of a capacity above 1."""
    fraction = np.array([metric.removesuffix("_max") in FRACTIONS for metric in metrics])
    return np.zeros(len(metrics)), np.where(fraction, 1.0, np.inf)


def _history(opened: OpenShard, data: Manifest, scaler: Scaler) -> NDArray[np.float64]:
    values, observed = opened.last_steps(3 * data.horizon)
    scaled = np.where(observed, values, np.nan).astype(np.float64)
    centre, spread = scaler.of(opened.nodes[: opened.own])
    return scaled * spread + centre


def rows(found: GroupForecast, data: Manifest, model: str, naive: str) -> pa.Table:
    """A group's forecast as rows of `schemas.FORECASTS`, by entity, metric and time."""
    horizon, entities, metrics = found.mean.shape
    times = (data.start + data.step * (data.steps + np.arange(horizon, dtype=np.int64))) * 1000
    each = horizon * metrics

    def flat(values: NDArray[np.float64]) -> pa.Array:
        return pa.array(values.transpose(1, 2, 0).reshape(-1).astype(np.float32))

    def per_entity(names: list[Any]) -> pa.Array:
        return pa.array(np.repeat(np.array(names, dtype=object), each), pa.string())

    columns = {
        "entity": per_entity(list(found.entities)),
        "metric": pa.array(np.tile(np.repeat(np.array(data.metrics, dtype=object), horizon), entities)),
        "time": pa.array(np.tile(times, entities * metrics)).cast(schemas.TIME),
        "mean": flat(found.mean),
        **{schemas.quantile_name(q): flat(found.quantiles[..., i]) for i, q in enumerate(QUANTILES)},
        "model": per_entity(
            [
                (model if reason is None else naive) + COLD[cold]
                for reason, cold in zip(found.fallback, found.cold, strict=True)
            ]
        ),
        "fallback": per_entity(found.fallback),
    }
    return pa.table(columns).cast(schemas.FORECASTS)

"""A rolling-origin test of several rungs side by side: the same windows, mask and split for all of them.

A rung is a name and a function from a batch to its forecast in scaled units. `measure` takes some windows and
returns states that add up, so it may run anywhere in any order: residuals and scores of the validation part
calibrate; scores of the test part are what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.evaluation.intervals import ResidualHistogram, bucket_of, calibrate
from fleetcast.evaluation.metrics import COUNT, ERROR, PerEntity, Scores, per_origin
from fleetcast.evaluation.naive import naive_rungs
from fleetcast.evaluation.peaks import Peaks
from fleetcast.models.base import Model, Output
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler

#: A batch to its forecast in scaled units; without quantiles where the rung gives a point only.
Rung = Callable[[Batch], Output]

#: An absolute percentage error counts only where the target reaches this share of the metric's training std.
FLOOR = 0.25


def rungs(manifest: Manifest, model: Model | None, name: str) -> dict[str, Rung]:
    """The model under its name, if there is one, and every naive rung that the dataset's lags allow."""
    points: dict[str, Rung] = {
        rung: partial(_point, forecaster)
        for rung, forecaster in naive_rungs(manifest.lags, manifest.step).items()
    }
    return {name: model, **points} if model is not None else points


def _point(forecaster: Callable[[Batch], Any], batch: Batch) -> Output:
    return Output(forecaster(batch.alone()), None)


@dataclass(frozen=True)
class Forecast:
    """One rung's forecast of a batch's own entities in original units."""

    mean: NDArray[np.float64]
    """[B, H, O, F]."""
    median: NDArray[np.float64]
    """[B, H, O, F] the quantile at 0.5 of a rung that gives quantiles, the mean of one that gives a point."""
    quantiles: NDArray[np.float64]
    """[B, H, O, F, Q], calibrated where shifts were given."""


def forecast(
    rung: Rung, batch: Batch, scaler: Scaler, levels: tuple[float, ...], shifts: NDArray[np.float64] | None
) -> Forecast:
    """A rung's forecast, its quantiles moved by `shifts` [K, F, Q] of the validation part."""
    with torch.no_grad():
        output = rung(batch)
    mean, quantiles = output.mean.double().numpy(), _levels(output, len(levels))
    if shifts is not None:
        quantiles = calibrate(quantiles, shifts)
    centre, spread = scaler.of(batch.nodes[: batch.own].numpy())
    mean, quantiles = mean * spread + centre, quantiles * spread[..., None] + centre[..., None]
    has_median = output.quantiles is not None and 0.5 in levels
    return Forecast(mean, quantiles[..., levels.index(0.5)] if has_median else mean, quantiles)


def _levels(output: Output, levels: int) -> NDArray[np.float64]:
    if output.quantiles is not None:
        return np.asarray(output.quantiles.double().numpy())
    return np.repeat(output.mean.double().numpy()[..., None], levels, axis=-1)


@dataclass
class Measured:
    """What some windows say of one rung."""

    scores: Scores
    residuals: ResidualHistogram | None
    """Of the validation part, uncalibrated."""
    by_origin: dict[int, NDArray[np.float64]]
    """Origin → [K, H, F] the sums of `metrics.per_origin` over all entities."""
    peaks: Peaks | None = None
    """Where thresholds of high load were given."""
    entities: PerEntity | None = None
    """By position in the list of all entities; None where a file of an earlier version is among them."""

    def __add__(self, other: Measured) -> Measured:
        residuals = self.residuals
        if residuals is not None and other.residuals is not None:
            residuals = residuals + other.residuals
        by_origin = dict(self.by_origin)
        for origin, sums in other.by_origin.items():
            by_origin[origin] = by_origin[origin] + sums if origin in by_origin else sums
        peaks = self.peaks
        if peaks is not None and other.peaks is not None:
            peaks = peaks + other.peaks
        entities = None
        if self.entities is not None and other.entities is not None:
            entities = self.entities + other.entities
        return Measured(self.scores + other.scores, residuals, by_origin, peaks, entities)


def measure(
    batches: Iterable[Batch],
    ladder: dict[str, Rung],
    scaler: Scaler,
    levels: tuple[float, ...],
    horizon: int,
    shifts: dict[str, NDArray[np.float64]] | None,
    thresholds: NDArray[np.float32] | None = None,
) -> dict[str, Measured]:
    """Scores all rungs on all windows of some batches, own entities alone. Without `shifts` residuals are
    collected as well.

    With `thresholds` [N, F] of high load (`peaks.thresholds`, original units, all entities in the order that
    `batch.nodes` counts in) peaks are, too.
    """
    metrics = len(scaler.mean)
    floor = np.asarray(scaler.std) * FLOOR
    measured = {
        name: Measured(
            Scores.zeros(horizon, levels, floor, scaler.mean),
            ResidualHistogram.zeros(horizon, metrics, levels) if shifts is None else None,
            {},
            None if thresholds is None else Peaks.zeros(metrics, levels),
            PerEntity.zeros(0, metrics),
        )
        for name in ladder
    }
    for batch in batches:
        nodes = batch.nodes[: batch.own].numpy()
        centre, spread = scaler.of(nodes)
        y = batch.y.double().numpy() * spread + centre
        seen = batch.y_mask.numpy()
        limit = None if thresholds is None else _limit(thresholds, nodes, scaler)
        for name, rung in ladder.items():
            found = measured[name]
            given = forecast(rung, batch, scaler, levels, None if shifts is None else shifts[name])
            found.scores = found.scores + Scores.of(
                y, seen, given.mean, given.quantiles, levels, floor, given.median, scaler.mean, spread
            )
            if found.residuals is not None:
                scaled = (given.quantiles - centre[..., None]) / spread[..., None]
                found.residuals.add(batch.y.double().numpy(), seen, scaled)
            if found.peaks is not None and limit is not None:
                found.peaks = found.peaks + Peaks.of(
                    y, seen, given.mean, given.median, given.quantiles, levels, limit
                )
            if found.entities is not None:
                found.entities = found.entities + PerEntity.of(y, seen, given.median, nodes, spread)
            sums = per_origin(y, seen, given.mean, given.median, given.quantiles, levels, spread)
            for origin, part in zip(batch.origins.tolist(), sums, strict=True):
                found.by_origin[origin] = found.by_origin.get(origin, 0) + part
    return measured


def _limit(thresholds: NDArray[np.float32], nodes: NDArray[np.int64], scaler: Scaler) -> NDArray[np.float64]:
    """[O, F] the thresholds of the entities at these positions; NaN of unknown ones."""
    own = np.where(nodes[:, None] >= 0, thresholds[nodes], np.float32(np.nan))
    # Scaled and back as the targets were: a load that just reaches its threshold is not above it by rounding.
    mean, std = scaler.of(nodes)
    scaled = ((own - mean.astype(np.float32)) / std.astype(np.float32)).astype(np.float64)
    return scaled * std + mean


def total_shifts(
    by_origin: dict[int, NDArray[np.float64]], levels: tuple[float, ...], entities: int
) -> NDArray[np.float64]:
    """[K, F, Q] how far each quantile of the cluster's mean per entity lies from its mean forecast, by bucket
    of horizon steps.

    The errors of entities move together, so a total's interval cannot be made of theirs; it comes from the
    size of the total's own errors on the validation part, over the origins and steps at which most were
    observed. Origins overlap, so a short validation part says little, least of all on which side of a
    forecast a total will be: intervals are alike on both sides, so that a bias of a few days widens them and
    does not move them away from the forecast.
    """
    sums = np.stack([by_origin[origin] for origin in sorted(by_origin)])
    count = sums[:, COUNT]
    mean = np.where(count >= entities / 2, sums[:, ERROR] / np.maximum(count, 1), np.nan)
    horizon = mean.shape[1]
    buckets = bucket_of(np.arange(horizon), horizon)
    shifts = np.zeros((int(buckets.max()) + 1, mean.shape[2], len(levels)))
    for bucket in range(len(shifts)):
        for metric in range(mean.shape[2]):
            residuals = mean[:, buckets == bucket, metric]
            residuals = residuals[np.isfinite(residuals)]
            if len(residuals):
                away = np.abs(2 * np.asarray(levels) - 1)
                side = np.sign(np.asarray(levels) - 0.5)
                shifts[bucket, metric] = side * np.quantile(np.abs(residuals), away, method="higher")
    return shifts


def save(measured: dict[str, Measured], file: IO[bytes]) -> None:
    """Writes what `measure` gave as one compressed NumPy archive."""
    arrays: dict[str, Any] = {}
    for position, found in enumerate(measured.values()):
        state = found.scores.to_json()
        arrays |= {f"{position}.scores.{key}": np.asarray(value) for key, value in state.items()}
        if found.residuals is not None:
            arrays[f"{position}.counts"] = found.residuals.counts
            arrays[f"{position}.largest"] = found.residuals.largest
        if found.peaks is not None:
            arrays |= {f"{position}.peaks.{key}": value for key, value in found.peaks.arrays().items()}
        if found.entities is not None:
            arrays |= {f"{position}.entities.{key}": value for key, value in vars(found.entities).items()}
        arrays[f"{position}.origins"] = np.asarray(list(found.by_origin), np.int64)
        arrays[f"{position}.by_origin"] = np.asarray(list(found.by_origin.values()))
    np.savez_compressed(file, names=np.asarray(list(measured)), **arrays)


def load(file: IO[bytes], levels: tuple[float, ...], horizon: int) -> dict[str, Measured]:
    """What `save` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        measured = {}
        for position, name in enumerate(arrays["names"].tolist()):
            state = {key: value.tolist() for key, value in _under(arrays, f"{position}.scores.").items()}
            peaks = _under(arrays, f"{position}.peaks.")
            entities = _under(arrays, f"{position}.entities.")
            residuals = None
            if f"{position}.counts" in arrays:
                counts, largest = arrays[f"{position}.counts"], arrays[f"{position}.largest"]
                residuals = ResidualHistogram(levels, horizon, counts, largest)
            origins, sums = arrays[f"{position}.origins"].tolist(), arrays[f"{position}.by_origin"]
            by_origin = dict(zip(origins, sums, strict=True))
            measured[name] = Measured(
                Scores.from_json(state),
                residuals,
                by_origin,
                Peaks.from_arrays(peaks) if peaks else None,
                PerEntity(**entities) if "nodes" in entities else None,
            )
        return measured


def _under(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}

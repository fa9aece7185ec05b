"""A rolling-origin test of several rungs side by side: the same windows, mask and split for all of them.

A rung is a name and a function from a batch to its forecast in scaled units. `measure` takes some windows and
returns states that add up, so it may run anywhere in any order: residuals and scores of the validation part
calibrate; scores of the test part are what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.evaluation.intervals import ResidualHistogram, bucket_of, calibrate
from fleetcast.evaluation.metrics import Scores
from fleetcast.evaluation.naive import naive_rungs
from fleetcast.models.base import Model, Output
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler

#: A batch to its forecast in scaled units; without quantiles where the rung gives a point only.
Rung = Callable[[Batch], Output]

#: An absolute percentage error counts only where the target reaches this share of the metric's training std.
_FLOOR = 0.25


def rungs(manifest: Manifest, model: Model | None, name: str) -> dict[str, Rung]:
    """The model under its name, if there is one, and every naive rung that the dataset's lags allow."""
    points: dict[str, Rung] = {
        rung: partial(_point, forecaster)
        for rung, forecaster in naive_rungs(manifest.lags, manifest.step).items()
    }
    return {name: model, **points} if model is not None else points


def _point(forecaster: Callable[[Batch], Any], batch: Batch) -> Output:
    return Output(forecaster(batch), None)


@dataclass(frozen=True)
class Forecast:
    """One rung's forecast of a batch in original units."""

    mean: NDArray[np.float64]
    """[B, H, N, F]."""
    quantiles: NDArray[np.float64]
    """[B, H, N, F, Q], calibrated where shifts were given."""


def forecast(
    rung: Rung, batch: Batch, scaler: Scaler, levels: tuple[float, ...], shifts: NDArray[np.float64] | None
) -> Forecast:
    """A rung's forecast, its quantiles moved by `shifts` [K, F, Q] of the validation part."""
    with torch.no_grad():
        output = rung(batch)
    mean, quantiles = output.mean.double().numpy(), _levels(output, len(levels))
    if shifts is not None:
        quantiles = calibrate(quantiles, shifts)
    centre, spread = (np.asarray(part, np.float64) for part in (scaler.mean, scaler.std))
    return Forecast(mean * spread + centre, quantiles * spread[:, None] + centre[:, None])


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
    total_error: dict[int, NDArray[np.float64]]
    """Origin → [2, H, F]: Σ (y − ŷ) over observed entities, and how many they are."""

    def __add__(self, other: Measured) -> Measured:
        residuals = self.residuals
        if residuals is not None and other.residuals is not None:
            residuals = residuals + other.residuals
        total = dict(self.total_error)
        for origin, error in other.total_error.items():
            total[origin] = total[origin] + error if origin in total else error
        return Measured(self.scores + other.scores, residuals, total)


def measure(
    batches: Iterable[Batch],
    ladder: dict[str, Rung],
    scaler: Scaler,
    levels: tuple[float, ...],
    horizon: int,
    shifts: dict[str, NDArray[np.float64]] | None,
) -> dict[str, Measured]:
    """Scores all rungs on all windows of some batches. Without `shifts` residuals are collected as well."""
    metrics = len(scaler.mean)
    floor = np.asarray(scaler.std) * _FLOOR
    measured = {
        name: Measured(
            Scores.zeros(horizon, levels, floor),
            ResidualHistogram.zeros(horizon, metrics, levels) if shifts is None else None,
            {},
        )
        for name in ladder
    }
    centre, spread = (np.asarray(part, np.float64) for part in (scaler.mean, scaler.std))
    for batch in batches:
        y = batch.y.double().numpy() * spread + centre
        seen = batch.y_mask.numpy()
        for name, rung in ladder.items():
            found = measured[name]
            given = forecast(rung, batch, scaler, levels, None if shifts is None else shifts[name])
            found.scores = found.scores + Scores.of(y, seen, given.mean, given.quantiles, levels, floor)
            if found.residuals is not None:
                scaled = (given.quantiles - centre[:, None]) / spread[:, None]
                found.residuals.add(batch.y.double().numpy(), seen, scaled)
            error = np.where(seen, y - given.mean, 0).sum(2)
            both = np.stack([error, seen.sum(2).astype(np.float64)], axis=1)
            for origin, part in zip(batch.origins.tolist(), both, strict=True):
                found.total_error[origin] = found.total_error.get(origin, 0) + part
    return measured


def total_shifts(
    total_error: dict[int, NDArray[np.float64]], levels: tuple[float, ...], entities: int
) -> NDArray[np.float64]:
    """[K, F, Q] quantiles of the error of the cluster's mean per entity, by bucket of horizon steps.

    The errors of entities move together, so a total's interval cannot be made of theirs; it comes from the
    total's own errors on the validation part, over the origins and steps at which most were observed.
    Origins overlap, so with a short validation part these are rough.
    """
    errors = np.stack([total_error[origin] for origin in sorted(total_error)])
    count = errors[:, 1]
    mean = np.where(count >= entities / 2, errors[:, 0] / np.maximum(count, 1), np.nan)
    horizon = mean.shape[1]
    buckets = bucket_of(np.arange(horizon), horizon)
    shifts = np.zeros((int(buckets.max()) + 1, mean.shape[2], len(levels)))
    for bucket in range(len(shifts)):
        for metric in range(mean.shape[2]):
            residuals = mean[:, buckets == bucket, metric]
            residuals = residuals[np.isfinite(residuals)]
            if len(residuals):
                shifts[bucket, metric] = np.quantile(residuals, levels, method="higher")
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
        arrays[f"{position}.origins"] = np.asarray(list(found.total_error), np.int64)
        arrays[f"{position}.total"] = np.asarray(list(found.total_error.values()))
    np.savez_compressed(file, names=np.asarray(list(measured)), **arrays)


def load(file: IO[bytes], levels: tuple[float, ...], horizon: int) -> dict[str, Measured]:
    """What `save` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        measured = {}
        for position, name in enumerate(arrays["names"].tolist()):
            prefix = f"{position}.scores."
            state = {
                key.removeprefix(prefix): arrays[key].tolist() for key in arrays if key.startswith(prefix)
            }
            residuals = None
            if f"{position}.counts" in arrays:
                counts, largest = arrays[f"{position}.counts"], arrays[f"{position}.largest"]
                residuals = ResidualHistogram(levels, horizon, counts, largest)
            total = dict(
                zip(arrays[f"{position}.origins"].tolist(), arrays[f"{position}.total"], strict=True)
            )
            measured[name] = Measured(Scores.from_json(state), residuals, total)
        return measured

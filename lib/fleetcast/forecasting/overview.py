"""What people look at first in a forecast: the cluster's total and the highest expected peaks.

Groups contribute sums and their own highest peaks, and two shares make one of the same size, so no process
ever holds the whole forecast.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.evaluation.intervals import bucket_of
from fleetcast.forecasting.predict import GroupForecast
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.windows.manifest import Manifest

#: Entities with the highest peaks that are kept of each metric.
PEAKS = 10
_Q95 = QUANTILES.index(0.95)


def of_group(found: GroupForecast, data: Manifest) -> dict[str, Any]:
    """A group's share of the overview, as plain lists."""
    history = np.concatenate([found.history, found.gone], axis=1)
    observed = np.isfinite(history)
    # Who is gone was there until it was last observed.
    until = np.maximum.accumulate(np.isfinite(found.gone)[::-1])[::-1].sum(1)
    peaks = [peak for f, metric in enumerate(data.metrics) for peak in _peaks(found, f, metric)]
    return {
        "entities": len(found.entities),
        "history_sum": np.where(observed, history, 0).sum(1).tolist(),
        "history_count": observed.sum(1).tolist(),
        "history_there": (len(found.entities) + until).tolist(),
        "mean_sum": found.mean.sum(1).tolist(),
        "peaks": peaks,
    }


def _peaks(found: GroupForecast, f: int, metric: str) -> list[dict[str, Any]]:
    """The entities whose 95 % quantile rises highest, with their history and forecast."""
    top = found.quantiles[:, :, f, _Q95].max(0)
    order = sorted(range(len(found.entities)), key=lambda n: (-top[n], found.entities[n]))[:PEAKS]
    peaks = []
    for n in order:
        step = int(found.quantiles[:, n, f, _Q95].argmax())
        peaks.append(
            {
                "entity": found.entities[n],
                "metric": metric,
                "step": step,
                "mean": found.mean[step, n, f],
                "q95": found.quantiles[step, n, f, _Q95],
                "history": _nulls(found.history[:, n, f]),
                "forecast": _series(found.mean[:, n, f], found.quantiles[:, n, f]),
            }
        )
    return peaks


def _series(mean: NDArray[np.float64], quantiles: NDArray[np.float64]) -> dict[str, list[float]]:
    """[H] and [H, Q] → named lists."""
    columns = {quantile_name(q): quantiles[:, i].tolist() for i, q in enumerate(QUANTILES)}
    return {"mean": mean.tolist(), **columns}


def _nulls(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The shares of some groups and of others as one."""
    # A group's last shard may reach less far back than another's.
    known = min(len(share["history_sum"]) for share in (one, other))
    sums = {
        name: (np.asarray(one[name])[-known:] + np.asarray(other[name])[-known:]).tolist()
        for name in ("history_sum", "history_count", "history_there")
    }
    return {
        **sums,
        "entities": one["entities"] + other["entities"],
        "mean_sum": (np.asarray(one["mean_sum"]) + np.asarray(other["mean_sum"])).tolist(),
        "peaks": _highest([*one["peaks"], *other["peaks"]]),
    }


def _highest(peaks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The highest peaks of each metric; metrics in the order that they come in."""
    found = []
    for metric in dict.fromkeys(peak["metric"] for peak in peaks):
        of_metric = [peak for peak in peaks if peak["metric"] == metric]
        found += sorted(of_metric, key=lambda peak: (-peak["q95"], peak["entity"]))[:PEAKS]
    return found


def of_cluster(
    groups: Iterable[dict[str, Any]], data: Manifest, shifts: NDArray[np.float64]
) -> dict[str, Any]:
    """All groups' shares, read one by one → the overview.

    `shifts` [K, F, Q] are the validation part's quantiles of the error of the mean over entities; times the
    number of entities they are the total's interval. In the past the total is the mean over the entities that
    were observed, times those that were there, some of which may be gone; null where fewer than half were
    observed.
    """
    whole = reduce(together, groups)
    entities = whole["entities"]
    total, count, there = (np.asarray(whole[f"history_{name}"]) for name in ("sum", "count", "there"))
    mean = np.asarray(whole["mean_sum"])
    history = np.where(count >= there / 2, total / np.maximum(count, 1) * there, np.nan)
    horizon = np.arange(data.horizon)
    quantiles = mean[..., None] + entities * shifts[bucket_of(horizon, data.horizon)]
    quantiles = np.maximum(np.sort(quantiles, axis=-1), 0)
    return {
        "total": {
            metric: {"history": _nulls(history[:, f]), "forecast": _series(mean[:, f], quantiles[:, f])}
            for f, metric in enumerate(data.metrics)
        },
        "peaks": whole["peaks"],
    }

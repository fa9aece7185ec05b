"""From a snapshot or a live answer to what `schemas` says: plain values and arrays, to be written as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from fleetcast.errors import InputError
from fleetcast.schemas import FRACTIONS, QUANTILES, describe, describe_total
from fleetcast.serving.past import Floats
from fleetcast.serving.snapshot import MEAN, Snapshot, column, now
from fleetcast.serving.source import Found

_HOUR = 3600


def issue(snapshot: Snapshot, clock: str) -> dict[str, Any]:
    """`schemas.Issue`."""
    return {
        "issued": snapshot.issued,
        "valid_until": snapshot.valid_until,
        "stale": now(clock, snapshot) >= snapshot.valid_until,
        "model": snapshot.manifest["rung"],
    }


def cluster(snapshot: Snapshot, clock: str) -> dict[str, Any]:
    """`schemas.Cluster`."""
    m = snapshot.manifest
    return issue(snapshot, clock) | {
        "level": m["level"],
        "entities": len(snapshot.entities),
        "metrics": [{"name": name, "unit": describe(name, snapshot.normalised)} for name in snapshot.metrics],
        "step": snapshot.step,
        "horizon": snapshot.horizon,
        "quantiles": list(QUANTILES),
        "fallbacks": m["figures"]["fallbacks"],
    }


def entities(snapshot: Snapshot, search: str, limit: int, offset: int) -> dict[str, Any]:
    """`schemas.Entities`."""
    found = snapshot.search(search)
    shown = found[offset : offset + limit]
    return {"total": len(found), "entities": [detail(snapshot, name) for name in shown]}


def detail(snapshot: Snapshot, entity: str) -> dict[str, Any]:
    """`schemas.Entity`."""
    nothing = {"parent": None, "service": None, "cpu_capacity": None, "memory_capacity": None}
    return {"entity": entity, **nothing, **snapshot.details.get(entity, {})}


def steps_of(hours: float | None, step: int, horizon: int) -> int:
    """How many steps so many hours are; the whole horizon if not given."""
    return horizon if hours is None else min(horizon, max(1, math.ceil(hours * _HOUR / step)))


def series(
    values: Floats,
    metrics: Sequence[str],
    normalised: Sequence[str],
    chosen: Sequence[int],
    quantiles: Sequence[float],
    steps: int,
) -> list[dict[str, Any]]:
    """`schemas.Series` of an entity's [F, H, 1 + Q]."""
    columns = {f"{quantile:g}": column(quantile) for quantile in quantiles}
    return [
        {
            "metric": metrics[f],
            "unit": describe(metrics[f], normalised),
            "mean": np.ascontiguousarray(values[f, :steps, MEAN]),
            "quantiles": {
                name: np.ascontiguousarray(values[f, :steps, place]) for name, place in columns.items()
            },
        }
        for f in chosen
    ]


def forecasts(
    snapshot: Snapshot,
    clock: str,
    places: Sequence[int],
    metrics: Sequence[int],
    hours: float | None,
    quantiles: Sequence[float],
) -> dict[str, Any]:
    """`schemas.Forecasts`."""
    steps = steps_of(hours, snapshot.step, snapshot.horizon)
    return issue(snapshot, clock) | {
        "times": snapshot.times[:steps],
        "forecasts": [
            {
                "entity": snapshot.entities[place],
                "fallback": snapshot.fallback[place],
                "series": series(
                    snapshot.values[place], snapshot.metrics, snapshot.normalised, metrics, quantiles, steps
                ),
            }
            for place in places
        ],
    }


def live(
    found: Found, names: Sequence[str], hours: float | None, quantiles: Sequence[float]
) -> dict[str, Any]:
    """`schemas.LiveForecasts`."""
    answer, step = found.answer, found.step
    steps = steps_of(hours, step, answer.values.shape[2])
    every = range(len(found.metrics))
    return {
        "origin": datetime.fromtimestamp(answer.origin, UTC),
        "model": found.model,
        "times": (answer.origin + step * np.arange(steps)).astype("datetime64[s]"),
        "forecasts": [
            {
                "entity": name,
                "fallback": reason,
                "series": series(values, found.metrics, found.normalised, every, quantiles, steps),
            }
            for name, values, reason in zip(names, answer.values, answer.reasons, strict=True)
        ],
    }


def history(snapshot: Snapshot, entity: str) -> dict[str, Any]:
    """`schemas.History`; a value that is not a number is written as null."""
    times, values = snapshot.history(entity)
    of = {name: np.ascontiguousarray(values[:, f]) for f, name in enumerate(snapshot.metrics)}
    return {"entity": entity, "times": times, "values": of}


def total(snapshot: Snapshot, clock: str, metric: str, places: Sequence[int] | None) -> dict[str, Any]:
    """`schemas.Total`."""
    values, how = snapshot.total(metric, places)
    whole = snapshot.overview["total"][metric]["history"] if places is None else []
    return issue(snapshot, clock) | {
        "entities": len(snapshot.entities) if places is None else len(places),
        "metric": metric,
        "unit": describe_total(metric, snapshot.normalised),
        "times": snapshot.times,
        "mean": np.ascontiguousarray(values[:, MEAN]),
        "quantiles": {f"{q:g}": np.ascontiguousarray(values[:, column(q)]) for q in QUANTILES},
        "how": how,
        "history": whole,
    }


def peaks(snapshot: Snapshot, clock: str, metric: str, quantile: float, most: int) -> dict[str, Any]:
    """`schemas.Peaks`, of the steps that are not over."""
    first = snapshot.first_step(now(clock, snapshot))
    f, q = snapshot.metric(metric), column(quantile)
    return issue(snapshot, clock) | {
        "quantile": quantile,
        "peaks": [
            {
                "entity": snapshot.entities[n],
                "metric": metric,
                "time": snapshot.times[h],
                "mean": snapshot.values[n, f, h, MEAN],
                "value": snapshot.values[n, f, h, q],
            }
            for n, h in snapshot.peaks(metric, quantile, first, most)
        ],
    }


def limits(
    snapshot: Snapshot,
    clock: str,
    metric: str,
    limit: float,
    quantile: float,
    most: int,
    place: int | None = None,
) -> dict[str, Any]:
    """`schemas.Limits`: those that pass the limit, soonest and then highest first; or one entity."""
    moment = now(clock, snapshot)
    first = snapshot.first_step(moment)
    f, q = snapshot.metric(metric), column(quantile)
    when = snapshot.passes(metric, quantile, limit, first)
    highest = snapshot.values[:, f, first:, q].max(1)
    passing = np.flatnonzero(when >= 0)
    order = passing[np.lexsort((-highest[passing], when[passing]))][:most]
    chosen = order.tolist() if place is None else [place]
    return issue(snapshot, clock) | {
        "quantile": quantile,
        "limit": limit,
        "horizon_hours": (snapshot.horizon - first) * snapshot.step / _HOUR,
        "limits": [
            {
                "entity": snapshot.entities[n],
                "metric": metric,
                "hours": _hours(snapshot, moment, int(when[n])),
                "time": snapshot.times[when[n]] if when[n] >= 0 else None,
                "highest": highest[n],
            }
            for n in chosen
        ],
    }


def _hours(snapshot: Snapshot, moment: datetime, step: int) -> float | None:
    if step < 0:
        return None
    begins = snapshot.issued + timedelta(seconds=step * snapshot.step)
    return max(0.0, (begins - moment).total_seconds() / _HOUR)


def neighbours(snapshot: Snapshot, entity: str) -> dict[str, Any]:
    """`schemas.Neighbours`, strongest first."""
    (sources, targets), weights = snapshot.past.ends, snapshot.past.weights
    place = snapshot.place(entity)
    found = []
    for mine, theirs, direction in ((targets, sources, "upstream"), (sources, targets, "downstream")):
        for edge in np.flatnonzero(mine == place):
            other = snapshot.entities[theirs[edge]]
            found.append({"entity": other, "direction": direction, "weight": weights[edge]})
    return {"entity": entity, "neighbours": sorted(found, key=lambda one: -float(one["weight"]))}


def accuracy(snapshot: Snapshot, entity: str) -> dict[str, Any]:
    """`schemas.Accuracy`."""
    issued, found = snapshot.accuracy(entity)
    return {"entity": entity, "issued": issued, "metrics": found}


def scaling(
    snapshot: Snapshot,
    clock: str,
    place: int,
    metric: str,
    quantile: float,
    lead_minutes: float,
    replicas: int | None,
    per_replica: float | None,
    target: float,
    least: int,
) -> dict[str, Any]:
    """`schemas.Scaling`: of the highest load until the lead time is over. Raises InputError where a capacity
    cannot be told."""
    if metric.removesuffix("_max") in snapshot.normalised:
        raise InputError(
            f"metric: {metric} is normalised over the trace, expected one with a unit to scale by"
        )
    moment = now(clock, snapshot)
    first = snapshot.first_step(moment)
    last = first + max(1, math.ceil(lead_minutes * 60 / snapshot.step))
    f, q = snapshot.metric(metric), column(quantile)
    values = snapshot.values[place, f, first:last, q]
    load = float(values.max())
    if per_replica is not None:
        required = math.ceil(load / per_replica)
        words = f"load / per_replica, rounded up: {load:.6g} / {per_replica:g}"
    elif metric.removesuffix("_max") not in FRACTIONS:
        raise InputError(f"per_replica: is needed for {metric}, which is no fraction of a replica's capacity")
    elif replicas is None:
        raise InputError(f"replicas: the present number is needed, as {metric} is the share that they use")
    else:
        required = math.ceil(replicas * load / target)
        words = f"replicas · load / target, rounded up: {replicas} · {load:.6g} / {target:g}"
    start = snapshot.issued + timedelta(seconds=first * snapshot.step)
    return {
        "workload": snapshot.entities[place],
        "required_replicas": max(least, required),
        "load": load,
        "metric": metric,
        "quantile": quantile,
        "start": start,
        "end": start + timedelta(seconds=len(values) * snapshot.step),
        "capacity_model": f"{words}; at least {least}",
        "generated_at": snapshot.issued,
        "valid_until": snapshot.valid_until,
        "model": snapshot.manifest["rung"],
        "fallback": snapshot.fallback[place] is not None,
    }

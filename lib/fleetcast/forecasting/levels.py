"""Levels side by side: each level's forecast, what the level below says of it, and one forecast of both.

    compare_levels(store, ("container", "service", "machine"))

Each level is a store in the store (`Store.level`) with its own windows, model and published forecast. First
every group of every level is forecast again from origins of the validation and the test part; then each
metric is brought together on its own (`hierarchy`), judged on the test part, and the published forecasts are
published once more, reconciled, as `levels/<level>/reconciled/issued=…`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from fleetcast import memory, schemas
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.evaluation import backtest
from fleetcast.evaluation.hierarchy_report import LevelResult, Series, hierarchy_pages
from fleetcast.evaluation.metrics import per_origin
from fleetcast.forecasting.hierarchy import (
    CHILD,
    PARENTS,
    Family,
    Fit,
    Floats,
    Links,
    Side,
    errors,
    fit_of,
    known,
    reconcile,
    scale_of,
)
from fleetcast.forecasting.predict import Selected, bounds
from fleetcast.forecasting.run import OVERVIEW, folder_of, read_selected
from fleetcast.ingest.make import make
from fleetcast.schemas import QUANTILES, quantile_name
from fleetcast.store import MANIFEST, Store, fingerprint
from fleetcast.windows import manifest as manifests
from fleetcast.windows.manifest import Manifest, Part
from fleetcast.windows.views import OpenShard

log = logging.getLogger("fleetcast")

#: Width of a normal distribution's 90 % interval in standard deviations.
_INTERVAL = 3.2897
#: Origins of a shard that are forecast at once.
_AT_ONCE = 8
_PARTS: tuple[Part, Part] = ("val", "test")
_COLUMNS = ("past", "mean", "spread", "y")
_Sums = dict[str, dict[int, NDArray[np.float64]]]


class LevelOptions(Options):
    """How levels are compared."""

    origins: int = Field(24, ge=2)
    """Most origins of the validation and of the test part, a horizon or more apart."""


@dataclass(frozen=True)
class _Level:
    """One level's store and what is in it."""

    name: str
    store: Store
    data: Manifest
    selected: Selected
    folder: str
    """Of the published forecast."""
    published: dict[str, Any]
    """Its manifest."""

    @classmethod
    def open(cls, store: Store, name: str) -> _Level:
        own = store.level(name)
        data = manifests.load(own, "default")
        folder = folder_of(data)
        published = own.read_json(f"{folder}/{MANIFEST}")
        if published is None:
            raise InputError(f"{own.uri}/{folder}: no such forecast, expected one of level {name}")
        return cls(name, own, data, read_selected(own), folder, published)

    @property
    def end(self) -> int:
        return self.data.start + self.data.step * self.data.steps

    def times(self, part: Part) -> tuple[int, int]:
        """The first and the last origin of a part [Unix s]."""
        low, high = self.data.bounds(part)
        at = (max(low, self.data.history), high - self.data.horizon)
        return self.data.start + self.data.step * at[0], self.data.start + self.data.step * at[1]


def compare_levels(store: Store, names: tuple[str, ...], options: LevelOptions) -> dict[str, Any]:
    """Compares and reconciles the published forecasts of some levels; writes the report of it.

    Raises InputError if containers or both of services and machines are missing, or forecasts do not fit
    together.
    """
    parents = tuple(level for level in PARENTS if level in names)
    if CHILD not in names or not parents:
        raise InputError(
            f"levels {', '.join(names)}: nothing to compare, expected container and service or machine"
        )
    levels = {name: _Level.open(store, name) for name in (CHILD, *parents)}
    _check(levels)
    origins = {part: _origins(list(levels.values()), part, options.origins) for part in _PARTS}
    digest = fingerprint([{name: one.published["fingerprint"] for name, one in levels.items()}, origins])
    page = f"reports/{levels[CHILD].folder.split('/')[1]}/levels"
    metrics = [
        metric
        for metric in levels[CHILD].data.metrics
        if not metric.endswith("_max") and any(metric in levels[one].data.metrics for one in parents)
    ]
    if not metrics:
        raise InputError(
            f"levels {', '.join(levels)}: containers have {', '.join(levels[CHILD].data.metrics)}, expected "
            "a metric, not a maximum, that services or machines have as well"
        )
    done = store.read_json(f"{page}/{MANIFEST}")
    if done is not None and done["fingerprint"] == digest:
        log.info("levels: %s are reconciled", ", ".join(levels))
        return {**done["figures"], "skipped": True}
    work = f"_work/levels/{digest}"
    files = _forecast_again(store, work, levels, [*origins["val"], *origins["test"]])
    results = _bring_together(store, work, levels, parents, metrics, origins, files)
    for one in levels.values():
        _publish(store, work, one, metrics, results, digest)
    report = hierarchy_pages(
        datetime.fromtimestamp(levels[CHILD].end, UTC),
        [_result(one) for metric in results.values() for one in metric["levels"]],
    )
    place = report.pages.write(store, page)
    figures = {"levels": list(levels), "metrics": metrics, "report": place, "verdicts": report.verdicts}
    store.write_json(f"{page}/{MANIFEST}", {"fingerprint": digest, "figures": figures})
    store.remove(work)
    return {**figures, "skipped": False}


def _check(levels: dict[str, _Level]) -> None:
    for name in ("step", "horizon"):
        found = {level: getattr(one.data, name) for level, one in levels.items()}
        if len(set(found.values())) > 1:
            raise InputError(f"levels: {name} differs ({found}), expected the same of all levels")
    ends = {level: one.published["figures"]["issued"] for level, one in levels.items()}
    if len(set(ends.values())) > 1:
        raise InputError(f"levels: forecasts were issued at {ends}, expected the same time of all levels")


def _origins(levels: list[_Level], part: Part, most: int) -> list[int]:
    """Times that are origins of a part at every level, at least a horizon apart [Unix s]."""
    first, last = (f(one.times(part)[i] for one in levels) for i, f in enumerate((max, min)))
    width = levels[0].data.step * levels[0].data.horizon
    if last < first:
        raise InputError(f"levels: their {part} parts have no time in common; use more telemetry")
    stride = width * max(1, -(-((last - first) // width + 1) // most))
    return sorted(range(last, first - 1, -stride))


# -- forecasts of every level from earlier origins -----------------------------------------------------------


def _forecast_again(
    store: Store, work: str, levels: dict[str, _Level], times: list[int]
) -> dict[str, list[str]]:
    """Files of each level, one for each group: a row group for each origin and metric, the last origin being
    that of the published forecast."""
    plan = {
        f"{work}/{one.name}/group-{group:05d}.arrow": {"level": one.name, "group": group, "times": times}
        for one in levels.values()
        for group in range(len(one.data.groups))
    }

    def work_on(item: dict[str, Any]) -> dict[str, Any]:
        parts = _of_group(levels[item["level"]], item["group"], item["times"])
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])]).tolist()
        store.write_row_groups(item["target"], pa.concat_tables(parts), starts)
        return {"rows": len(parts[0])}

    room = max(memory.windows(one.data, 2) for one in levels.values())
    make(store, plan, work_on, f"{work}/receipts/forecasts", "levels: forecasts of earlier times", room)
    return {name: [path for path, item in plan.items() if item["level"] == name] for name in levels}


def _of_group(level: _Level, group: int, times: list[int]) -> list[pa.Table]:
    """A table for each origin and metric, a row for each of a group's own entities."""
    data, scaler = level.data, level.selected.scaler
    steps = np.array([(at - data.start) // data.step for at in times] + [data.steps], np.int64)
    model, naive, _ = level.selected.rungs(data)
    rung, name = (naive, level.selected.naive) if model is None else (model, level.selected.rung)
    shifts = level.selected.calibration["shifts"][name]
    low, high = QUANTILES.index(0.05), QUANTILES.index(0.95)
    found: dict[int, list[pa.Table]] = {}
    for shard in (one for one in data.shards if one.group == group):
        here = steps[(steps >= shard.start) & (steps < shard.stop)]
        opened = (
            OpenShard.read(level.store, data, shard, scaler, level.selected.places) if len(here) else None
        )
        for first in range(0, len(here), _AT_ONCE):
            assert opened is not None
            at = here[first : first + _AT_ONCE]
            batch = opened.batch(at)
            given = backtest.forecast(rung, batch, scaler, QUANTILES, shifts)
            centre, spread = scaler.of(batch.nodes[: batch.own].numpy())
            own = slice(batch.own)
            past = np.where(batch.mask[:, :, own].numpy(), batch.x[:, :, own].double().numpy(), np.nan)
            arrays = {
                "past": past * spread + centre,
                "mean": given.mean,
                "spread": (given.quantiles[..., high] - given.quantiles[..., low]) / _INTERVAL,
                "y": np.where(batch.y_mask.numpy(), batch.y.double().numpy(), np.nan) * spread + centre,
            }
            for b, step in enumerate(at.tolist()):
                found[step] = [
                    _table(data.groups[group], {k: v[b, :, :, f] for k, v in arrays.items()})
                    for f in range(len(data.metrics))
                ]
    return [table for step in steps.tolist() for table in found[step]]


def _table(names: tuple[str, ...], arrays: dict[str, Floats]) -> pa.Table:
    """[T, N] arrays → a row for each entity, with lists over time."""
    lists = {
        name: pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(values.T).reshape(-1).astype(np.float32)), len(values)
        )
        for name, values in arrays.items()
    }
    return pa.table({"entity": pa.array(names, pa.string()), **lists})


def _side(store: Store, groups: list[tuple[str, int]]) -> Side:
    """What `_of_group` wrote of one origin and metric."""
    table = store.read_row_groups(groups).combine_chunks()
    arrays = [np.stack(table[name].to_numpy(zero_copy_only=False)).astype(np.float64).T for name in _COLUMNS]
    return Side(tuple(table["entity"].to_pylist()), *arrays)


# -- one metric of all levels --------------------------------------------------------------------------------


def _bring_together(
    store: Store,
    work: str,
    levels: dict[str, _Level],
    parents: tuple[str, ...],
    metrics: list[str],
    origins: dict[Part, list[int]],
    files: dict[str, list[str]],
) -> dict[str, dict[str, Any]]:
    """Each metric's results, from one task each."""
    plan = {
        f"{work}/metrics/{metric}.json": {"metric": metric, "origins": origins, "files": files}
        for metric in metrics
    }

    def work_on(item: dict[str, Any]) -> dict[str, Any]:
        found = _of_metric(store, work, levels, parents, item["metric"], origins, files)
        store.write_json(item["target"], found)
        return {"rows": sum(len(one.data.names) for one in levels.values())}

    history = max(one.data.history for one in levels.values())
    entities = sum(one.data.entities for one in levels.values())
    room = memory.PROCESS_TORCH + 6 * 8 * entities * (history + 3 * levels[CHILD].data.horizon)
    make(store, plan, work_on, f"{work}/receipts/metrics", "levels: metrics", room)
    return {metric: store.read_json(f"{work}/metrics/{metric}.json") for metric in metrics}


def _of_metric(
    store: Store,
    work: str,
    levels: dict[str, _Level],
    parents: tuple[str, ...],
    metric: str,
    origins: dict[Part, list[int]],
    files: dict[str, list[str]],
) -> dict[str, Any]:
    """Fits and judges one metric, and writes by how much each published forecast changes."""
    mine = tuple(level for level in parents if metric in levels[level].data.metrics)
    entities: Any = pl.from_arrow(store.read_table("entities/entities.parquet"))
    entities = entities.with_columns(pl.col("entity", "kind", "parent", "service").cast(pl.String))
    links: Links | None = None

    def family(number: int) -> Family:
        nonlocal links
        sides = {}
        for level in (CHILD, *mine):
            named = levels[level].data.metrics
            at = number * len(named) + named.index(metric)
            sides[level] = _side(store, [(path, at) for path in files[level]])
        if links is None:
            names = {level: sides[level].names for level in mine}
            links = Links.of(entities, sides[CHILD].names, names, metric)
        of = np.repeat(np.arange(len(mine)), [len(sides[level].names) for level in mine])
        return Family(sides[CHILD], reduce(add, (sides[level] for level in mine)), of, links)

    val, test = (len(origins[part]) for part in _PARTS)
    scale = scale_of(reduce(add, (family(i).moments() for i in range(val))), mine)
    fit = fit_of(scale, reduce(add, (errors(family(i), scale) for i in range(val))))
    low, high = bounds((metric,))
    limits = (float(low[0]), float(high[0]))
    sums: dict[str, _Sums] = {}
    for number, time in enumerate(origins["test"]):
        _judge(sums, family(val + number), fit, limits, time, levels, mine, metric)
    return {
        "fit": {
            "scale": dict(zip(mine, scale.tolist(), strict=True)),
            "below": fit.below,
            "above": fit.above,
        },
        "levels": [
            {
                "level": level,
                "metric": metric,
                "normalised": metric in levels[level].data.normalised,
                "sums": {m: [[at, v.tolist()] for at, v in of.items()] for m, of in sums[level].items()},
                **found,
            }
            for level, found in _changes(store, work, family(val + test), fit, limits, levels, mine, metric)
        ],
    }


def _judge(
    sums: dict[str, _Sums],
    family: Family,
    fit: Fit,
    limits: tuple[float, float],
    time: int,
    levels: dict[str, _Level],
    parents: tuple[str, ...],
    metric: str,
) -> None:
    """Adds one origin's errors of every level and method; parents without children are left out of it."""
    found = reconcile(family, fit, limits)
    told = known(found.below)
    ways = {CHILD: {"own": family.children.mean, "reconciled": found.children}}
    truth, counted = {CHILD: family.children.y}, {CHILD: known(family.children.mean)}
    for place, level in enumerate(parents):
        at = family.level == place
        ways[level] = {
            "own": family.parents.mean[:, at],
            "sum of the level below": np.clip(found.below[:, at], *limits),
            "reconciled": found.parents[:, at],
        }
        truth[level], counted[level] = family.parents.y[:, at], told[at]
    for level, methods in ways.items():
        data = levels[level].data
        std = data.scaler.std[data.metrics.index(metric)]
        y = truth[level][None, ..., None]
        seen = np.isfinite(y) & counted[level][None, None, :, None]
        for method, mean in methods.items():
            given = np.nan_to_num(mean)[None, ..., None]
            of_origin = per_origin(y, seen, given, given, given[..., None], (0.5,), std)[0, :, :, 0]
            sums.setdefault(level, {}).setdefault(method, {})[time] = of_origin


def _changes(
    store: Store,
    work: str,
    family: Family,
    fit: Fit,
    limits: tuple[float, float],
    levels: dict[str, _Level],
    parents: tuple[str, ...],
    metric: str,
) -> list[tuple[str, dict[str, Any]]]:
    """Reconciles what is published; writes each level's changes [H] of its entities, and returns what the
    report shows."""
    children = _published(levels[CHILD], family.children, metric)
    sides = [
        _published(levels[level], _part(family.parents, family.level == place), metric)
        for place, level in enumerate(parents)
    ]
    whole = Family(children, reduce(add, sides), family.level, family.links)
    found = reconcile(whole, fit, limits)
    shown = []
    for place, level in enumerate((CHILD, *parents)):
        at = family.level == place - 1
        old = children if level == CHILD else sides[place - 1]
        new = found.children if level == CHILD else found.parents[:, at]
        changed = np.nan_to_num(new - old.mean)
        store.write_table(f"{work}/changes/{level}/{metric}.parquet", _table(old.names, {"change": changed}))
        below = None if level == CHILD else found.below[:, at]
        there = known(old.mean) if below is None else known(old.mean) & known(below)
        series = {
            "past": old.past[:, there],
            "own": old.mean[:, there],
            "reconciled": new[:, there],
            **({} if below is None else {"sum of the level below": below[:, there]}),
        }
        means = {name: _mean_over(values) for name, values in series.items()}
        apart = None
        if below is not None and there.any():
            size = max(np.abs(old.mean[:, there]).mean(), 1e-12)
            apart = float(np.abs(old.mean[:, there] - below[:, there]).mean() / size)
        shown.append(
            (
                level,
                {
                    "entities": int(there.sum()),
                    "of": len(old.names),
                    "apart": apart,
                    "series": means,
                    "start": levels[level].end,
                    "step": levels[level].data.step,
                },
            )
        )
    return shown


def _mean_over(values: Floats) -> list[float | None]:
    """[T, N] → [T] over entities, null where fewer than half are known."""
    seen = np.isfinite(values)
    count = seen.sum(1)
    mean = np.where(seen, values, 0).sum(1) / np.maximum(count, 1)
    enough = 2 * count >= max(values.shape[1], 1)
    return [float(m) if ok else None for m, ok in zip(mean, enough, strict=True)]


def _part(side: Side, at: NDArray[np.bool_]) -> Side:
    names = tuple(name for name, wanted in zip(side.names, at, strict=True) if wanted)
    return Side(names, side.past[:, at], side.mean[:, at], side.spread[:, at], side.y[:, at])


def _published(level: _Level, side: Side, metric: str) -> Side:
    """The same entities with the published forecast; NaN for those that have none, as they are gone."""
    place = {name: n for n, name in enumerate(side.names)}
    mean, spread = np.full_like(side.mean, np.nan), np.full_like(side.spread, np.nan)
    for path in level.store.list(level.folder, ".parquet"):
        table = level.store.read_table(path, ["entity", "metric", "mean", "q05", "q95"])
        rows: Any = pl.from_arrow(table)
        rows = rows.with_columns(pl.col("entity", "metric").cast(pl.String)).filter(
            pl.col("metric") == metric
        )
        names = rows["entity"].to_list()[:: level.data.horizon]
        at = np.array([place[name] for name in names], np.int64)
        shape = (len(names), level.data.horizon)
        low, high = (rows[name].to_numpy().astype(np.float64).reshape(shape) for name in ("q05", "q95"))
        mean[:, at] = rows["mean"].to_numpy().astype(np.float64).reshape(shape).T
        spread[:, at] = ((high - low) / _INTERVAL).T
    return Side(side.names, side.past, mean, spread, side.y)


# -- what is published ---------------------------------------------------------------------------------------


def _publish(
    store: Store,
    work: str,
    level: _Level,
    metrics: list[str],
    results: dict[str, dict[str, Any]],
    digest: str,
) -> None:
    """A level's forecast with its changes, in a folder beside the forecast, of the same form."""
    own = level.store
    staging = f"_work/reconciled/{digest}"
    mine = [metric for metric in metrics if metric in level.data.metrics]
    plan = {
        f"{staging}/rows/{path.rsplit('/', 1)[1]}": {"source": path, "digest": digest}
        for path in own.list(level.folder, ".parquet")
    }

    def work_on(item: dict[str, Any]) -> dict[str, Any]:
        table = own.read_table(item["source"])
        changes = {metric: _changes_of(store, work, level.name, metric) for metric in mine}
        own.write_table(item["target"], _changed(table, level.data, changes))
        return {"rows": len(table)}

    make(own, plan, work_on, f"{staging}/receipts", f"levels: {level.name}", memory.PROCESS_TORCH)
    overview = own.read_json(f"{level.folder}/{OVERVIEW}")
    for metric in mine:
        _of_overview(overview, metric, _changes_of(store, work, level.name, metric), level)
    own.write_json(f"{staging}/rows/{OVERVIEW}", overview)
    about = {metric: results[metric]["fit"] for metric in mine}
    own.write_json(
        f"{staging}/rows/{MANIFEST}", {**level.published, "fingerprint": digest, "reconciled": about}
    )
    own.publish(f"{staging}/rows", level.folder.replace("forecasts/", "reconciled/", 1))
    own.remove(staging)


def _changes_of(store: Store, work: str, level: str, metric: str) -> dict[str, NDArray[np.float64]]:
    """Entity → [H]."""
    table = store.read_table(f"{work}/changes/{level}/{metric}.parquet").combine_chunks()
    values = np.stack(table["change"].to_numpy(zero_copy_only=False)).astype(np.float64)
    return dict(zip(table["entity"].to_pylist(), values, strict=True))


def _changed(table: pa.Table, data: Manifest, changes: dict[str, dict[str, Floats]]) -> pa.Table:
    """Rows by entity, metric and time with means and quantiles moved alike, within their bounds."""
    shape = (-1, len(data.metrics), data.horizon)
    names = table["entity"].take(pa.array(np.arange(0, len(table), shape[1] * shape[2]))).to_pylist()
    low, high = bounds(data.metrics)
    for column in ("mean", *(quantile_name(q) for q in QUANTILES)):
        values = table[column].to_numpy().astype(np.float64).reshape(shape)
        for metric, of_entity in changes.items():
            f = data.metrics.index(metric)
            values[:, f] = np.clip(
                values[:, f] + np.stack([of_entity[name] for name in names]), low[f], high[f]
            )
        place = table.schema.get_field_index(column)
        table = table.set_column(place, column, pa.array(values.reshape(-1).astype(np.float32)))
    return table.cast(schemas.FORECASTS)


def _of_overview(overview: dict[str, Any], metric: str, changes: dict[str, Floats], level: _Level) -> None:
    """Moves the total and the peaks that are shown; which entities these are stays as it was."""

    def moved(series: dict[str, list[float]], change: Floats, high: float) -> dict[str, list[float]]:
        return {name: np.clip(values + change, 0, high).tolist() for name, values in series.items()}

    total = reduce(add, changes.values())
    overview["total"][metric]["forecast"] = moved(overview["total"][metric]["forecast"], total, np.inf)
    high = float(bounds((metric,))[1][0])
    for peak in (one for one in overview["peaks"] if one["metric"] == metric):
        peak["forecast"] = moved(peak["forecast"], changes[peak["entity"]], high)
        peak["step"] = int(np.argmax(peak["forecast"]["q95"]))
        peak["mean"], peak["q95"] = (peak["forecast"][name][peak["step"]] for name in ("mean", "q95"))


def _result(found: dict[str, Any]) -> LevelResult:
    """What the report shows, from the file of a metric."""
    sums = {
        method: {int(at): np.array(values)[..., None] for at, values in rows}
        for method, rows in found["sums"].items()
    }
    series = found["series"]
    end, step = datetime.fromtimestamp(found["start"], UTC), found["step"]
    past = series.pop("past")
    return LevelResult(
        level=found["level"],
        metric=found["metric"],
        normalised=found["normalised"],
        entities=found["entities"],
        of=found["of"],
        apart=found["apart"],
        sums=sums,
        series=Series(end, step, past, series),
    )

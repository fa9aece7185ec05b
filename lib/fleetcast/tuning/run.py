"""The tuning job: the points of the grids, their trials on Ray Tune, and the page with the papers' claims."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetcast.backtesting import data as sources
from fleetcast.backtesting import results
from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import Rung, Trial
from fleetcast.errors import InputError
from fleetcast.evaluation import metrics, sensitivity
from fleetcast.evaluation.levels import check as check_rate
from fleetcast.evaluation.metrics import Scores
from fleetcast.evaluation.sensitivity import Grid, Study
from fleetcast.models import configure
from fleetcast.provenance import provenance
from fleetcast.store import MANIFEST, Store
from fleetcast.tuning import grids, levels, trials
from fleetcast.tuning.grids import LevelGrid
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.search import search
from fleetcast.windows import manifest as manifests

log = logging.getLogger("fleetcast")

#: What a figure is divided by: the standard deviation of the training part, to this power.
_POWERS = {"mse": 2, "mae": 1, "rmse": 1}


@dataclass(frozen=True)
class Point:
    """A point of a grid, and its trials: one for each seed."""

    value: float
    data: Data
    trials: list[Trial]


def tune(store: Store, options: TuneOptions) -> dict[str, Any]:
    """Runs the search, or the trials of the grids that are not complete; writes
    `tuning/<name>/report.{html,md}` and `studies.json` or `search.json`.

    A trial that fails is left out with its reason; the others go on. Raises InputError if no grid has a point
    that came to its end.
    """
    store = store.open_or_create() if options.given else store.open_existing()
    if options.search is not None:
        return search(store, _data(store, options), options)
    found = Store(f"{store.uri}/backtests").open_or_create()
    plan, missing = _plan(store, options)
    # Points that are the models' defaults are the same trials in several grids.
    every = {
        one.folder: (one, point.data) for points in plan.values() for point in points for one in point.trials
    }
    stopped = trials.run(found, list(every.values()), options, provenance())
    for name, of_grid in plan.items():
        if of_grid and isinstance(grids.GRIDS[name], LevelGrid):
            levels.run(found, of_grid[0].data, of_grid[0].trials, options)
    studies = [
        study
        for name, of_grid in plan.items()
        if (study := _study(found, name, of_grid, missing[name], options))
    ]
    done = {study.grid.name for study in studies}
    left_out = {
        grids.GRIDS[name].setting: "; ".join(sorted({*missing[name].values(), *stopped.values()}))
        for name in plan
        if name not in done
    }
    if not studies:
        raise InputError(f"tune {options.name}: no trial came to its end: {'; '.join(left_out.values())}")
    place = Store(f"{store.uri}/tuning").open_or_create()
    page = sensitivity.render(studies, f"Sensitivity studies: {options.name}", left_out)
    place.write_json(f"{options.name}/studies.json", [study.to_json() for study in studies])
    return {
        "report": page.write(place, options.name),
        "trials": len(every),
        "stopped": stopped,
        "verdicts": {study.grid.name: study.words for study in studies},
        "left_out": left_out,
    }


def _plan(store: Store, options: TuneOptions) -> tuple[dict[str, list[Point]], dict[str, dict[float, str]]]:
    """The points of each grid, and those that the data do not allow, with the reason."""
    plan: dict[str, list[Point]] = {}
    missing: dict[str, dict[float, str]] = {}
    chosen = [(name, grids.GRIDS[name]) for name in options.grids]
    whole = None if all(grids.changes_windows(grid) for _, grid in chosen) else _data(store, options)
    for name, grid in chosen:
        plan[name], missing[name] = [], {}
        for value in options.points or grid.points:
            try:
                data = _point_data(store, options, grid, value, whole)
            except InputError as error:
                missing[name][value] = str(error)
                log.info("tune: %s of %s is left out: %s", grid.point(value), name, error)
                continue
            plan[name].append(Point(value, data, _trials(grid, value, data, options)))
    return plan, missing


def _point_data(store: Store, options: TuneOptions, grid: Grid, value: float, whole: Data | None) -> Data:
    """The windows of a point. Raises InputError if the data do not allow it."""
    if grids.changes_windows(grid):
        return _cut(store, options, grid, value)
    assert whole is not None, "a grid of the model's options takes the windows as they are"
    if isinstance(grid, LevelGrid):
        check_rate(whole.manifest)
    return whole


def _data(store: Store, options: TuneOptions) -> Data:
    if options.windows is not None:
        manifest = manifests.load(store, options.windows)
        return Data(options.windows, store, manifest, f"windows/{options.windows} of the store")
    return sources.make(store, options.shard.windows, options)


def _cut(store: Store, options: TuneOptions, grid: Grid, value: float) -> Data:
    """The windows of a point. Raises InputError if the data do not allow it."""
    if options.windows is not None:
        raise InputError("windows are given, and it needs others of a source")
    return sources.make(
        store, options.shard.windows, options, lambda given: grids.windows(grid, value, given)
    )


def _trials(grid: Grid, value: float, data: Data, options: TuneOptions) -> list[Trial]:
    given = options.options.get(grid.model, {}) | grids.options(grid, value)
    rung = Rung(
        name=grid.model, model=grid.model, options=configure(grid.model, given).model_dump(mode="json")
    )
    return [
        Trial(
            data=data.name,
            data_fingerprint=data.manifest.fingerprint,
            rung=rung,
            fit=options.fit_options(seed),
            workers=options.workers_per_trial,
        )
        for seed in range(options.seeds)
    ]


def _study(
    found: Store, name: str, points: list[Point], missing: dict[float, str], options: TuneOptions
) -> Study | None:
    """What the trials of a grid found; None if none came to its end."""
    grid, values = grids.GRIDS[name], {}
    fits: dict[str, float] = {}
    matched = True
    for point in points:
        complete = [one for one in point.trials if found.exists(f"{one.folder}/{MANIFEST}")]
        if not complete:
            missing = missing | {point.value: "none of its trials came to its end"}
            continue
        scores = [_scores(found, one, point, grid) for one in complete]
        if not all(of.n.any() for of in scores):
            missing = missing | {point.value: "no target of the test part is of such a time"}
            continue
        matched &= len(complete) == len(point.trials)
        by_seed = [_figures(of, point.data) for of in scores]
        values[point.value] = {figure: [of[figure] for of in by_seed] for figure in grid.figures}
        fits |= {
            one.folder: found.read_json(f"{one.folder}/{MANIFEST}")["cost"]["fit_seconds"] for one in complete
        }
    if not values:
        return None
    seconds = sum(fits.values())
    return Study(grid, points[0].data.name, values, _budget(grid, options), seconds, missing, matched)


def _scores(found: Store, one: Trial, point: Point, grid: Grid) -> Scores:
    """Of a trial on the targets of a point."""
    if isinstance(grid, LevelGrid):
        return levels.read(found, one, grid)[point.value]
    (measured,) = results.measured(found, one.folder, point.data.manifest.horizon).values()
    return measured.scores


def _figures(scores: Scores, data: Data) -> dict[str, float]:
    """Figure → the mean over metrics, in units of the training part's standard deviation."""
    m = data.manifest
    of_metrics = metrics.figures(scores, np.asarray(m.seasonal_error))
    return {
        figure: float(
            np.mean(
                [
                    (np.nan if (value := of[figure]) is None else value) / std ** _POWERS.get(figure, 0)
                    for of, std in zip(of_metrics, m.scaler.std, strict=True)
                ]
            )
        )
        for figure in sensitivity.TITLES
    }


def _budget(grid: Grid, options: TuneOptions) -> str:
    fit = options.fit
    steps = f"{fit.steps_per_epoch} steps" if fit.steps_per_epoch else "all training windows"
    return (
        f"{grid.model}, at most {fit.epochs} epochs of {steps} of {fit.batch_size} windows, learning rate "
        f"{options.learning_rate:g}, {options.seeds} seeds."
    )

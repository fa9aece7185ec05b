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
from fleetcast.evaluation.sensitivity import Grid, Study
from fleetcast.models import configure
from fleetcast.provenance import provenance
from fleetcast.store import MANIFEST, Store
from fleetcast.tuning import grids, trials
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
    every = [(one, point.data) for points in plan.values() for point in points for one in point.trials]
    stopped = trials.run(found, every, options, provenance())
    studies = [
        study
        for name, points in plan.items()
        if (study := _study(found, name, points, missing[name], options))
    ]
    if not studies:
        reasons = sorted(
            {*stopped.values(), *(why for left_out in missing.values() for why in left_out.values())}
        )
        raise InputError(f"tune {options.name}: no trial came to its end: {'; '.join(reasons)}")
    place = Store(f"{store.uri}/tuning").open_or_create()
    page = sensitivity.render(studies, f"Sensitivity studies: {options.name}").write(place, options.name)
    place.write_json(f"{options.name}/studies.json", [_as_json(study) for study in studies])
    return {
        "report": page,
        "trials": len(every),
        "stopped": stopped,
        "verdicts": {study.grid.name: study.words for study in studies},
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
                data = _cut(store, options, grid, value) if grids.changes_windows(grid) else whole
                assert data is not None, "a grid of the model's options takes the windows as they are"
            except InputError as error:
                missing[name][value] = str(error)
                log.info("tune: %s of %s is left out: %s", grid.point(value), name, error)
                continue
            plan[name].append(Point(value, data, _trials(grid, value, data, options)))
    return plan, missing


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
        )
        for seed in range(options.seeds)
    ]


def _study(
    found: Store, name: str, points: list[Point], missing: dict[float, str], options: TuneOptions
) -> Study | None:
    """What the trials of a grid found; None if none came to its end."""
    grid, values, seconds = grids.GRIDS[name], {}, 0.0
    for point in points:
        complete = [one for one in point.trials if found.exists(f"{one.folder}/{MANIFEST}")]
        if not complete:
            missing = missing | {point.value: "none of its trials came to its end"}
            continue
        by_seed = [_figures(found, one, point.data) for one in complete]
        values[point.value] = {figure: [of[figure] for of in by_seed] for figure in grid.figures}
        seconds += sum(found.read_json(f"{one.folder}/{MANIFEST}")["cost"]["fit_seconds"] for one in complete)
    if not values:
        return None
    return Study(grid, points[0].data.name, values, _budget(grid, options), seconds, missing)


def _figures(found: Store, one: Trial, data: Data) -> dict[str, float]:
    """Figure → the mean over metrics, in units of the training part's standard deviation."""
    m = data.manifest
    (measured,) = results.measured(found, one.folder, m.horizon).values()
    of_metrics = metrics.figures(measured.scores, np.asarray(m.seasonal_error))
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


def _as_json(study: Study) -> dict[str, Any]:
    """For those who draw it anew."""
    return {
        "grid": study.grid.name,
        "data": study.data,
        "model": study.grid.model,
        "values": {f"{point:g}": dict(found) for point, found in study.values.items()},
        "missing": {f"{point:g}": why for point, why in study.missing.items()},
        "best": study.best,
        "paper": study.grid.best,
        "verdict": study.verdict,
        "seconds": study.seconds,
    }

"""What trials of a grid that splits the test targets say of each level of load: kept beside each trial."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fleetcast.backtesting import trial as trials
from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import Trial
from fleetcast.errors import InputError
from fleetcast.evaluation import levels
from fleetcast.evaluation.metrics import Scores
from fleetcast.runtime import Failed, tasks
from fleetcast.store import MANIFEST, Store
from fleetcast.tuning.grids import LevelGrid
from fleetcast.tuning.options import TuneOptions


def _file(one: Trial, kind: levels.Kind) -> str:
    return f"{one.folder}/{'levels' if kind == 'paper' else f'levels-{kind}'}.json"


def run(results: Store, data: Data, plan: Sequence[Trial], options: TuneOptions) -> None:
    """Scores the models of complete trials at each level, where that is not there yet."""

    def work(one: Trial) -> None:
        torch.set_num_threads(max(1, int(options.cpus_per_trial)))
        scores = trials.by_level(results, data, one.folder, options.levels)
        results.write_json(_file(one, options.levels), [of.to_json() for of in scores])

    todo = [
        one
        for one in plan
        if results.exists(f"{one.folder}/{MANIFEST}") and not results.exists(_file(one, options.levels))
    ]
    found = tasks(
        todo,
        work,
        "levels",
        lambda one: f"{one.rung.name}, seed {one.fit.seed}",
        options.cpus_per_trial,
        options.gpus_per_trial,
        options.max_concurrent,
    )
    failed = [one.reason for one in found if isinstance(one, Failed)]
    if failed:
        raise InputError(f"levels of load: {'; '.join(failed)}")


def read(results: Store, one: Trial, grid: LevelGrid) -> dict[float, Scores]:
    """Point of the grid → what `run` found."""
    saved = results.read_json(_file(one, grid.levels))
    return {point: Scores.from_json(of) for point, of in zip(grid.points, saved, strict=True)}

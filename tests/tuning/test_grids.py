"""Each point of a grid changes one thing, and the papers' points and optima are the papers'."""

import numpy as np
import pytest
from fleetcast.evaluation.sensitivity import Optimum, StaysAbove
from fleetcast.models import configure
from fleetcast.tuning import grids
from fleetcast.tuning.grids import GRIDS
from fleetcast.tuning.options import TuneOptions
from fleetcast.windows.manifest import ShardOptions
from pydantic import ValidationError

SHARD = ShardOptions(windows="w", step=300, history=3600, horizon=1800, lags=(86_400,))
TABLE = {"table": "t.csv", "time": "t", "metrics": ("cpu",)}


def test_the_studies_are_the_papers():
    found = {name: (grid.model, grid.points, grid.claim) for name, grid in GRIDS.items()}
    assert found == {
        "layers": ("fusion", (1, 2, 3, 4, 5, 6), Optimum(4)),
        "heads": ("fusion", (1, 2, 4, 8), Optimum(4)),
        "sparsity": ("fusion", tuple(i / 10 for i in range(1, 10)), Optimum(0.5)),
        "nodes": ("fusion", (20, 40, 60, 80, 100), Optimum(60)),
        "window": ("stgnn", (5, 10, 30, 60), Optimum(10)),
        "concurrency": ("stgnn", (1000, 2500, 5000, 8000, np.inf), StaysAbove(5000, "r2", 0.9)),
        grids.FIFTHS_GRID: ("stgnn", (0.2, 0.4, 0.6, 0.8, 1), StaysAbove(0.6, "r2", 0.9)),
    }


@pytest.mark.parametrize("name", ["layers", "heads", "sparsity"])
def test_a_point_of_an_option_changes_that_option_alone(name):
    grid = GRIDS[name]
    default = configure(grid.model, {}).model_dump()
    for point in grid.points:
        changed = configure(grid.model, grids.options(grid, point)).model_dump()
        assert {option for option in default if changed[option] != default[option]} <= {name}
        assert changed[name] == point


def test_more_nodes_are_more_entities_of_the_same_windows():
    found = grids.windows(GRIDS["nodes"], 40, SHARD)
    assert found == SHARD.model_copy(update={"windows": "w-nodes-40", "entities": 40})


def test_levels_are_called_as_in_the_paper():
    grid = GRIDS["concurrency"]
    assert [grid.point(point) for point in grid.points] == [
        "Low (≤ 1,000/s)",
        "Medium (≤ 2,500/s)",
        "High (≤ 5,000/s)",
        "Very High (≤ 8,000/s)",
        "Extreme (> 8,000/s)",
    ]


def test_levels_of_a_cluster_of_any_size_are_fifths_of_the_time():
    grid = GRIDS[grids.FIFTHS_GRID]
    assert [grid.point(point) for point in grid.points][::4] == ["Lowest fifth", "Highest fifth"]
    for given in ("concurrency", "all"):
        paper = TuneOptions(grid=given, windows="w").grids
        fifths = TuneOptions(grid=given, windows="w", levels="quantiles").grids
        assert fifths == [name.replace("concurrency", grids.FIFTHS_GRID) for name in paper]


def test_a_wider_step_keeps_the_number_of_steps():
    found = grids.windows(GRIDS["window"], 30, SHARD)
    assert (found.step, found.history, found.horizon) == (1800, 12 * 1800, 6 * 1800)
    assert found.lags == SHARD.lags
    assert GRIDS["window"].point(30) == "30 min"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": "all"}, "expected exactly one of tabular, raw, synthesize and windows"),
        (
            {"grid": "all", "tabular": TABLE, "windows": "w"},
            "expected exactly one of tabular, raw, synthesize and windows",
        ),
        ({"windows": "w", "grid": "nodes"}, "the grid nodes cuts windows of its own, expected a source"),
        ({"grid": "all", "tabular": TABLE, "points": (4,)}, "points: expected one grid as well, got all"),
        (
            {"tabular": TABLE, "search": "mlp", "scheduler": "pbt", "workers_per_trial": 2},
            "workers_per_trial: pbt takes over the state of single processes, expected 1",
        ),
        (
            {"tabular": TABLE, "grid": "heads", "workers_per_trial": 2, "gpus_per_trial": 0.5},
            r"gpus_per_trial: expected 0 or 1 of each worker, got 0\.5",
        ),
        ({"tabular": TABLE, "grid": "heads", "points": (3,)}, "points: 3 is none of heads's: 1, 2, 4, 8"),
    ],
)
def test_options_that_clash_are_named(given, message):
    with pytest.raises(ValidationError, match=message):
        TuneOptions(**given)

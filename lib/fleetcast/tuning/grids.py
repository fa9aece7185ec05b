"""The papers' sensitivity studies: which points each has, and what a point changes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fleetcast.evaluation.levels import FIFTHS, LEVELS, Kind
from fleetcast.evaluation.sensitivity import Grid, Optimum, StaysAbove
from fleetcast.windows.manifest import ShardOptions

_FUSION = "Wang 2026, temporal-structural fusion (doi 10.20944/preprints202602.1772.v1)"
_STGNN = "Xue et al., multi-level service performance forecasting with spatiotemporal graph networks"
_ALL = ("mse", "mae", "mape", "rmse")


class WindowGrid(Grid):
    """Its points are widths of a step, in minutes."""

    def point(self, value: float) -> str:
        """`10 min`."""
        return f"{value:g} min"


class LevelGrid(Grid):
    """Its points are the upper bounds of the cluster's request rates; all come of the same trials."""

    levels: ClassVar[Kind] = "paper"

    def point(self, value: float) -> str:
        """`High (≤ 5,000/s)`."""
        *_, last = (bound for bound in LEVELS if np.isfinite(bound))
        bound = f"≤ {value:,.0f}/s" if np.isfinite(value) else f"> {last:,.0f}/s"
        return f"{LEVELS[value]} ({bound})"

    def tick(self, value: float) -> str:
        """The name above the bound."""
        return self.point(value).replace(" (", "\n").removesuffix(")")


class FifthGrid(LevelGrid):
    """Its points are the upper ends of fifths of the test part's time, by the cluster's request rate."""

    levels: ClassVar[Kind] = "quantiles"

    def point(self, value: float) -> str:
        """`Lowest fifth`."""
        return FIFTHS[value]

    def tick(self, value: float) -> str:
        """In two lines."""
        return self.point(value).replace(" ", "\n")


#: The study of concurrency where the levels are quantiles.
FIFTHS_GRID = "concurrency-quantiles"
#: Grids whose points are values of an option of the model, by that option's name.
_OPTIONS = {"layers": "layers", "heads": "heads", "sparsity": "sparsity"}

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid(
            "layers",
            "graph-convolution layers",
            "fusion",
            (1, 2, 3, 4, 5, 6),
            ("mape",),
            Optimum(4),
            f"{_FUSION}, Fig. 2",
        ),
        Grid("heads", "attention heads", "fusion", (1, 2, 4, 8), _ALL, Optimum(4), f"{_FUSION}, Fig. 3"),
        Grid(
            "sparsity",
            "sparsity of the adjacency",
            "fusion",
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            ("mse",),
            Optimum(0.5),
            f"{_FUSION}, Fig. 4",
        ),
        Grid(
            "nodes",
            "number of nodes",
            "fusion",
            (20, 40, 60, 80, 100),
            _ALL,
            Optimum(60),
            f"{_FUSION}, Fig. 5",
        ),
        WindowGrid(
            "window",
            "width of a step",
            "stgnn",
            (5, 10, 30, 60),
            ("mae", "rmse", "r2"),
            Optimum(10),
            f"{_STGNN}, Fig. 2",
        ),
        LevelGrid(
            "concurrency",
            "requests per second",
            "stgnn",
            tuple(LEVELS),
            ("mae", "rmse", "r2"),
            StaysAbove(5000, "r2", 0.9),
            f"{_STGNN}, Fig. 3",
        ),
        FifthGrid(
            FIFTHS_GRID,
            "requests per second, by fifths of the time",
            "stgnn",
            tuple(FIFTHS),
            ("mae", "rmse", "r2"),
            StaysAbove(0.6, "r2", 0.9),
            f"{_STGNN}, Fig. 3; its five levels are fixed rates, of which the third is the last above",
        ),
    )
}


def options(grid: Grid, point: float) -> dict[str, Any]:
    """What a point changes of the model."""
    if grid.name not in _OPTIONS:
        return {}
    return {_OPTIONS[grid.name]: point if grid.name == "sparsity" else int(point)}


def changes_windows(grid: Grid) -> bool:
    """Whether each point has windows of its own."""
    return grid.name in ("nodes", "window")


def windows(grid: Grid, point: float, given: ShardOptions) -> ShardOptions:
    """What a point makes of the windows.

    A wider step keeps the number of steps: look-back and horizon are as many times longer, as the paper's
    window is the width over which a service's load is averaged.
    """
    changed: dict[str, Any] = {"windows": f"{given.windows}-{grid.name}-{point:g}"}
    if grid.name == "nodes":
        changed |= {"entities": int(point)}
    else:
        step = int(point * 60)
        changed |= {
            "step": step,
            "history": given.history // given.step * step,
            "horizon": given.horizon // given.step * step,
        }
    return ShardOptions(**(given.model_dump() | changed))

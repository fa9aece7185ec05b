"""Evaluation of a trained model beside the naive rungs, as Ray Data tasks over windows.

The validation part calibrates the intervals and decides whether the model may be served; the test part is
looked at once, for the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast import memory
from fleetcast.evaluation import backtest, metrics
from fleetcast.evaluation.backtest import Measured
from fleetcast.models import saving
from fleetcast.runtime import spread
from fleetcast.schemas import QUANTILES
from fleetcast.store import Store
from fleetcast.windows import order
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest, Part

#: Windows that one task evaluates; of many groups a task has so many more that there are at most so many
#: tasks: what they found is added up in one process.
_WINDOWS_PER_TASK = 64
_MOST_TASKS = 256
_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """What the validation and test parts say of each rung."""

    validation: dict[str, Measured]
    test: dict[str, Measured]
    shifts: dict[str, NDArray[np.float64]]
    """Rung → [K, F, Q] in scaled units."""
    total_shifts: dict[str, NDArray[np.float64]]
    """Rung → [K, F, Q] in original units, for the mean over all entities."""
    peak_bytes: int


def evaluate(store: Store, manifest: Manifest, folder: str, name: str, work: str) -> Evaluation:
    """Evaluates the model saved in `folder`, called `name`, on the windows of a dataset."""
    validation, peak_a = _measure(store, manifest, folder, name, work, "val", None)
    shifts = {rung: _residual_shifts(found) for rung, found in validation.items()}
    totals = {
        rung: backtest.total_shifts(found.by_origin, QUANTILES, manifest.entities)
        for rung, found in validation.items()
    }
    test, peak_b = _measure(store, manifest, folder, name, work, "test", shifts)
    return Evaluation(validation, test, shifts, totals, max(peak_a, peak_b))


def _residual_shifts(found: Measured) -> NDArray[np.float64]:
    assert found.residuals is not None, "the validation part is measured without shifts"
    return found.residuals.shifts()


def _measure(
    store: Store,
    manifest: Manifest,
    folder: str,
    name: str,
    work: str,
    part: Part,
    shifts: dict[str, NDArray[np.float64]] | None,
) -> tuple[dict[str, Measured], int]:
    plan = order.evaluation(manifest, part, _WINDOWS_PER_TASK)
    share = -(-len(plan) // _MOST_TASKS)
    items: list[dict[str, Any]] = [
        {
            "plan": [(index, origins.tolist()) for index, origins in plan[first : first + share]],
            "file": f"{work}/{part}-{first:05d}.npz",
        }
        for first in range(0, len(plan), share)
    ]
    saved = saving.Saved(store, folder)

    def work_on(item: dict[str, Any]) -> dict[str, Any]:
        if not store.exists(item["file"]):
            ladder = backtest.rungs(manifest, saved.model, name)
            plan = [
                (index, np.array(origins[i : i + _BATCH], np.int64))
                for index, origins in item["plan"]
                for i in range(0, len(origins), _BATCH)
            ]
            batches = Shards(store, manifest, most=1).batches(plan)
            measured = backtest.measure(batches, ladder, manifest.scaler, QUANTILES, manifest.horizon, shifts)
            with store.write(item["file"]) as file:
                backtest.save(measured, file)
        return {"windows": sum(len(origins) for _, origins in item["plan"])}

    room = memory.windows(manifest, 2)  # one in use, one read ahead
    receipts = spread(items, work_on, f"evaluation of the {part} part", "windows", room)
    total: dict[str, Measured] = {}
    for item in items:  # in the order of the items, so that sums do not depend on who was first
        with store.fs.open(store.path(item["file"]), "rb") as file:
            for rung, found in backtest.load(file, QUANTILES, manifest.horizon).items():
                total[rung] = total[rung] + found if rung in total else found
    return total, max(receipt["peak_bytes"] for receipt in receipts)


def scaled_mae(found: Measured) -> float:
    """Mean over metrics of MAE ÷ training standard deviation, pooled over the horizon."""
    return float(np.nanmean(metrics.scaled_mae(found.scores.pooled())))

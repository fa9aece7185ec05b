"""Evaluation of a trained model beside the naive rungs, as Ray Data tasks over windows.

The validation part calibrates the intervals and decides whether the model may be served; the test part is
looked at once, for the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetcast.evaluation import backtest, metrics
from fleetcast.evaluation.backtest import Measured
from fleetcast.models import saving
from fleetcast.runtime import spread
from fleetcast.schemas import QUANTILES
from fleetcast.store import Store
from fleetcast.windows import order
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest, Part

#: Windows that one task evaluates.
_WINDOWS_PER_TASK = 64
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
    items = [
        {"shard": index, "origins": origins.tolist(), "file": f"{work}/{part}-{number:05d}.npz"}
        for number, (index, origins) in enumerate(order.evaluation(manifest, part, _WINDOWS_PER_TASK))
    ]

    def work_on(item: dict[str, Any]) -> dict[str, Any]:
        if not store.exists(item["file"]):
            ladder = backtest.rungs(manifest, saving.load(store, folder), name)
            origins = np.asarray(item["origins"], np.int64)
            plan = [(item["shard"], origins[i : i + _BATCH]) for i in range(0, len(origins), _BATCH)]
            batches = Shards(store, manifest, most=1).batches(plan)
            measured = backtest.measure(batches, ladder, manifest.scaler, QUANTILES, manifest.horizon, shifts)
            with store.write(item["file"]) as file:
                backtest.save(measured, file)
        return {"windows": len(item["origins"])}

    receipts = spread(items, work_on, f"evaluation of the {part} part", "windows")
    total: dict[str, Measured] = {}
    for item in items:  # in the order of the items, so that sums do not depend on who was first
        with store.fs.open(store.path(item["file"]), "rb") as file:
            for rung, found in backtest.load(file, QUANTILES, manifest.horizon).items():
                total[rung] = total[rung] + found if rung in total else found
    return total, max(receipt["peak_bytes"] for receipt in receipts)


def scaled_mae(found: Measured) -> float:
    """Mean over metrics of MAE ÷ training standard deviation, pooled over the horizon."""
    return float(np.nanmean(metrics.scaled_mae(found.scores.pooled())))

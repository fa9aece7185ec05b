"""One trial: fits a model with one seed on one data set, and measures it on the validation and test parts.

Everything goes to the trial's folder in the store; `manifest.json`, written last, says what was run and is
enough to run it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast import models
from fleetcast.backtesting import fits
from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import NAIVE, Trial
from fleetcast.evaluation import backtest, levels
from fleetcast.evaluation.backtest import Measured
from fleetcast.evaluation.metrics import Scores
from fleetcast.models import saving
from fleetcast.models.base import Model, Output
from fleetcast.models.geometry import Geometry
from fleetcast.schemas import QUANTILES
from fleetcast.store import MANIFEST, Store
from fleetcast.training.loop import Progress
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Part

#: States of the test part, as `evaluation.backtest.save` writes them.
MEASURED = "measured.npz"
_BATCH = 16
#: Windows that are timed for the cost of a forecast.
_TIMED = 5


def search(data: Data, trial: Trial) -> float:
    """The validation loss of a model after a short fit. Raises DivergedError."""
    return fits.alone(data, trial, build(data, trial))[0].best_loss


def run(
    store: Store,
    data: Data,
    trial: Trial,
    thresholds: NDArray[np.float32] | None,
    folder: str,
    about: dict[str, Any],
    fit: fits.Fit = fits.alone,
) -> None:
    """Runs a trial into `folder`; `about` goes into its manifest. Without thresholds of high load no peaks
    are counted. Raises DivergedError."""
    cost: dict[str, Any] = {}
    ladder: dict[str, backtest.Rung]
    if trial.rung.model == NAIVE:
        ladder = backtest.rungs(data.manifest, None, "")
    else:
        model = build(data, trial)
        progress, best = fit(data, trial, model)
        model.load_state_dict(best)
        model.eval()
        ladder = {trial.rung.name: _on_cpu(model)}
        cost = _cost(data, model, progress)
        config = models.configure(trial.rung.model, trial.rung.options)
        saving.save(store, folder, trial.rung.model, config, model.geometry, best)
        store.write_json(f"{folder}/history.json", progress.history)
    validation = _measure(data, ladder, "val", None, None)
    shifts = {name: _shifts(found) for name, found in validation.items()}
    test = _measure(data, ladder, "test", shifts, thresholds)
    with store.write(f"{folder}/{MEASURED}") as file:
        backtest.save(test, file)
    found = {"trial": trial.model_dump(mode="json"), "cost": cost, **about}
    store.write_json(f"{folder}/{MANIFEST}", found)


def by_level(store: Store, data: Data, folder: str, kind: levels.Kind) -> list[Scores]:
    """The scores of a complete trial's model on the test part, for each of the levels of load.

    Raises InputError if the data have no request rate.
    """
    m = data.manifest
    rate = levels.cluster_rate(data.store, m)
    steps = levels.level_of(rate, levels.bounds(kind, rate[m.boundaries[1] :]))
    model = saving.load(store, folder)
    rung = _on_cpu(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    (validation,) = _measure(data, {"model": rung}, "val", None, None).values()
    batches = data.shards().batches(order.evaluation(m, "test", _BATCH))
    return levels.by_level(batches, rung, m.scaler, QUANTILES, m.horizon, _shifts(validation), steps)


def _shifts(found: Measured) -> NDArray[np.float64]:
    assert found.residuals is not None, "the validation part is measured without shifts"
    return found.residuals.shifts()


def build(data: Data, trial: Trial) -> Model:
    """The trial's model before its fit, on its device."""
    torch.manual_seed(trial.fit.seed)
    geometry = Geometry.of(data.manifest, QUANTILES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return models.build(trial.rung.model, trial.rung.options, geometry).to(device)


def _cost(data: Data, model: Model, progress: Progress) -> dict[str, Any]:
    """What the fit took and what a forecast takes: seconds, and milliseconds for one window of one group."""
    history = progress.history
    seconds = [epoch["seconds"] for epoch in history]
    index, origins = order.evaluation(data.manifest, "test", 1)[0]
    batch = data.shards()[index].batch(origins).to(model.device)
    times = []
    with torch.no_grad():
        for _ in range(_TIMED):
            started = time.perf_counter()
            model(batch).mean.cpu()
            times.append(time.perf_counter() - started)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "seconds_per_epoch": float(np.mean(seconds)),
        "fit_seconds": float(np.sum(seconds)),
        "forecast_ms": float(1000 * np.median(times)),
    }


def _on_cpu(model: Model) -> backtest.Rung:
    """The model as a rung of the ladder, whose forecasts are in this process's memory."""

    def forecast(batch: Batch) -> Output:
        output = model(batch.to(model.device))
        quantiles = None if output.quantiles is None else output.quantiles.cpu()
        return Output(output.mean.cpu(), quantiles)

    return forecast


def _measure(
    data: Data,
    ladder: dict[str, backtest.Rung],
    part: Part,
    shifts: dict[str, NDArray[np.float64]] | None,
    thresholds: NDArray[np.float32] | None,
) -> dict[str, Measured]:
    """Every window of a part, once."""
    manifest = data.manifest
    batches: Iterator[Batch] = data.shards().batches(order.evaluation(manifest, part, _BATCH))
    return backtest.measure(batches, ladder, manifest.scaler, QUANTILES, manifest.horizon, shifts, thresholds)

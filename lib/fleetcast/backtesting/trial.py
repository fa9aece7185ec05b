"""One trial: fits a model with one seed on one data set, and measures it on the validation and test parts.

Plain torch in one process. Everything goes to the trial's folder in the store; `manifest.json`, written last,
says what was run and is enough to run it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast import models
from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import NAIVE, Rung, Trial
from fleetcast.evaluation import backtest
from fleetcast.evaluation.backtest import Measured
from fleetcast.models import saving
from fleetcast.models.base import Model, Output
from fleetcast.models.geometry import Geometry
from fleetcast.schemas import QUANTILES
from fleetcast.store import MANIFEST, Store
from fleetcast.training.loop import Run, train
from fleetcast.training.options import FitOptions
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Part

#: States of the test part, as `evaluation.backtest.save` writes them.
MEASURED = "measured.npz"
_BATCH = 16
#: Windows that are timed for the cost of a forecast.
_TIMED = 5


def search(data: Data, rung: Rung, fit: FitOptions) -> float:
    """The validation loss of a model after a short fit. Raises DivergedError."""
    return _fit(data, rung, fit)[1].progress.best_loss


def run(
    store: Store,
    data: Data,
    trial: Trial,
    thresholds: NDArray[np.float32] | None,
    folder: str,
    about: dict[str, Any],
) -> None:
    """Runs a trial into `folder`; `about` goes into its manifest. Without thresholds of high load no peaks
    are counted. Raises DivergedError."""
    cost: dict[str, Any] = {}
    ladder: dict[str, backtest.Rung]
    if trial.rung.model == NAIVE:
        ladder = backtest.rungs(data.manifest, None, "")
    else:
        model, fitted = _fit(data, trial.rung, trial.fit)
        model.load_state_dict(fitted.best)
        model.eval()
        ladder = {trial.rung.name: _on_cpu(model)}
        cost = _cost(data, fitted)
        config = models.configure(trial.rung.model, trial.rung.options)
        saving.save(store, folder, trial.rung.model, config, model.geometry, fitted.best)
        store.write_json(f"{folder}/history.json", fitted.progress.history)
    validation = _measure(data, ladder, "val", None, None)
    shifts = {name: _shifts(found) for name, found in validation.items()}
    test = _measure(data, ladder, "test", shifts, thresholds)
    with store.write(f"{folder}/{MEASURED}") as file:
        backtest.save(test, file)
    found = {"trial": trial.model_dump(mode="json"), "cost": cost, **about}
    store.write_json(f"{folder}/{MANIFEST}", found)


def _shifts(found: Measured) -> NDArray[np.float64]:
    assert found.residuals is not None, "the validation part is measured without shifts"
    return found.residuals.shifts()


def _fit(data: Data, rung: Rung, fit: FitOptions) -> tuple[Model, Run]:
    """A model on its device with the weights of the last epoch, and the run that has the best ones."""
    torch.manual_seed(fit.seed)
    geometry = Geometry.of(data.manifest, QUANTILES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.build(rung.model, rung.options, geometry).to(device)
    fitted = Run.start(model, data.shards(), fit)
    train(fitted, lambda *_: None)
    return model, fitted


def _cost(data: Data, fitted: Run) -> dict[str, Any]:
    """What the fit took and what a forecast takes: seconds, and milliseconds for one window of one group."""
    history = fitted.progress.history
    seconds = [epoch["seconds"] for epoch in history]
    index, origins = order.evaluation(data.manifest, "test", 1)[0]
    batch = fitted.shards[index].batch(origins).to(fitted.device)
    times = []
    with torch.no_grad():
        for _ in range(_TIMED):
            started = time.perf_counter()
            fitted.model(batch).mean.cpu()
            times.append(time.perf_counter() - started)
    return {
        "parameters": sum(p.numel() for p in fitted.model.parameters()),
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

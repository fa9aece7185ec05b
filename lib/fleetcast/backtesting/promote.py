"""A backtest's winner, or any trial, becomes the model that forecasts: if it deserves to.

Which trial wins is a matter of the validation part alone: the test part has been looked at by whoever reads
the report, and stays what no choice was made on.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pydantic import Field

from fleetcast.backtesting.data import Data, find, home
from fleetcast.backtesting.plan import NAIVE, Trial
from fleetcast.backtesting.run import TRIALS
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.models import saving
from fleetcast.store import MANIFEST, Store
from fleetcast.training.loop import Progress
from fleetcast.training.register import Trained, register, rollback, select, verdict


class PromoteOptions(Options):
    """Which trial is promoted, and what it must be worth."""

    backtest: str = "default"
    """Backtest whose winner is promoted: of the model with the lowest validation loss, the mean over its
    seeds, the seed with the lowest."""
    data: str | None = None
    """Data set of the backtest, if it has several; with --rollback, the one whose selection goes back."""
    trial: str | None = None
    """A trial's folder, `trials/…` below `backtests/`, instead of a backtest's winner."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Share by which its validation error (MAE ÷ training std) must be below the best naive forecast's."""
    rollback: bool = False
    """Goes back to the selection before the present one instead."""


def promote(store: Store, options: PromoteOptions) -> dict[str, Any]:
    """Registers a trial's model where its windows are, and selects it. Raises InputError, and leaves the
    selection as it is, if the model is not better than every naive rung by the margin."""
    store = store.open_existing()
    if options.rollback:
        where = store if options.data is None else home(store, options.data).open_existing()
        return {"store": where.uri, "selected": rollback(where)}
    results = Store(f"{store.uri}/backtests")
    folder = options.trial or _winner(results, options)
    trial = _trial(results, folder)
    if trial.rung.model == NAIVE:
        raise InputError(f"--trial {folder}: is of naive forecasts, expected one of a model")
    data = find(store, trial.data, trial.data_fingerprint)
    if data is None:
        raise InputError(f"--trial {folder}: {store.uri} does not have its data set {trial.data} any more")
    model = _registered(results, folder, trial, data)
    chosen = verdict(data.store, model, options.margin)
    errors = data.store.read_json(f"{model}/metrics.json")["summary"]["validation_error"]
    if chosen["rung"] == chosen["naive"]:
        below = 1 - errors[trial.rung.model] / errors[chosen["naive"]]
        raise InputError(
            f"--margin {options.margin:g}: {trial.rung.name} is not selected: its {chosen['reason']} on the "
            f"validation part, {100 * below:.1f} % below, expected more than {100 * options.margin:g} %"
        )
    select(data.store, chosen)
    return {"store": data.store.uri, "trial": folder, "selected": chosen, "validation_error": errors}


def _winner(results: Store, options: PromoteOptions) -> str:
    """The folder of the backtest's best trial. Raises InputError if there is nothing to choose from."""
    folders = results.read_json(f"{options.backtest}/{TRIALS}")
    if folders is None:
        known = sorted({path.split("/")[0] for path in results.list("", TRIALS)})
        raise InputError(
            f"--backtest {options.backtest}: no such backtest in {results.uri}; there: "
            f"{', '.join(known) or 'none'}"
        )
    trials = {folder: _trial(results, folder) for folder in folders}
    names = sorted({trial.data for trial in trials.values()})
    if options.data not in (names if len(names) > 1 else [*names, None]):
        given = "not given" if options.data is None else options.data
        raise InputError(f"--data: {given}, expected one of {options.backtest}'s: {', '.join(names)}")
    losses: dict[str, dict[str, float]] = defaultdict(dict)
    for folder, trial in trials.items():
        if trial.rung.model != NAIVE and trial.data == (options.data or names[0]):
            losses[trial.rung.name][folder] = _progress(results, folder).best_loss
    if not losses:
        raise InputError(f"--backtest {options.backtest}: none of its trials has a model")
    _, best = min(losses.items(), key=lambda item: (np.mean(list(item[1].values())), item[0]))
    return min(best, key=lambda folder: (best[folder], folder))


def _trial(results: Store, folder: str) -> Trial:
    saved = results.read_json(f"{folder}/{MANIFEST}")
    if saved is None:
        raise InputError(f"--trial {folder}: no such trial in {results.uri}")
    return Trial(**saved["trial"])


def _progress(results: Store, folder: str) -> Progress:
    history = results.read_json(f"{folder}/history.json")
    losses = [epoch["val_loss"] for epoch in history]
    return Progress(len(history), min(losses), int(np.argmin(losses)), history)


def _registered(results: Store, folder: str, trial: Trial, data: Data) -> str:
    """The folder of the trial's model in the store of its windows, evaluated as every trained model is."""
    manifest, model = data.manifest, trial.rung.model
    end = datetime.fromtimestamp(manifest.start + manifest.step * manifest.steps, UTC)
    digest = folder.rsplit("-", 1)[-1]
    target, work = f"models/{model}/{end:%Y%m%dT%H%M%SZ}-{digest}", f"_work/models/{digest}"
    if not data.store.exists(f"{target}/{MANIFEST}"):
        for name in (saving.CONFIG, saving.WEIGHTS):
            with data.store.write(f"{work}/model/{name}") as file:
                file.write(results.read_bytes(f"{folder}/{name}"))
        options = trial.train_options(manifest.name).model_dump(mode="json")
        trained = Trained(model, _progress(results, folder), options)
        register(data.store, manifest, work, target, trained)
        data.store.remove(work)
    return target

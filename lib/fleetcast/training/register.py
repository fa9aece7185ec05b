"""From trained weights to a model in the store, and which model is served.

`register` evaluates and calibrates a saved model beside the naive rungs, and puts it with its figures below
`models/`. Its `verdict` says whether it may be served; `select` writes that to `models/selected.json`, where
earlier selections are kept, and `rollback` goes back to them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetcast.errors import InputError
from fleetcast.evaluation import metrics as figures_of
from fleetcast.provenance import provenance
from fleetcast.schemas import QUANTILES
from fleetcast.store import MANIFEST, Store
from fleetcast.training.evaluate import Evaluation, evaluate, scaled_mae
from fleetcast.training.loop import Progress
from fleetcast.windows.manifest import Manifest

log = logging.getLogger("fleetcast")

SELECTED = "models/selected.json"
#: Selections that are kept behind the present one.
_KEPT = 10


@dataclass(frozen=True)
class Trained:
    """How the weights of a model came about."""

    model: str
    """Its name in the registry."""
    progress: Progress
    options: dict[str, Any]
    """`TrainOptions` as JSON: what trains it anew."""
    peak_bytes: int = 0
    """Largest memory of a process that trained it; 0 if that is not known."""


def register(store: Store, manifest: Manifest, work: str, folder: str, trained: Trained) -> dict[str, Any]:
    """Evaluates the model saved in `<work>/model` and publishes it, whole, as `folder`.

    Returns its summary. `work` is kept, so that a repeated call goes on from what is evaluated.
    """
    evaluation = evaluate(store, manifest, f"{work}/model", trained.model, f"{work}/evaluation")
    summary = _summary(trained, evaluation)
    _describe(store, f"{work}/model", manifest, trained, evaluation, summary)
    store.publish(f"{work}/model", folder)
    return summary


def _summary(trained: Trained, evaluation: Evaluation) -> dict[str, Any]:
    """The figures that decide and that a run prints: errors as MAE ÷ training std, mean over metrics."""
    test = {rung: scaled_mae(found) for rung, found in evaluation.test.items()}
    pooled = evaluation.test[trained.model].scores.pooled()
    coverage = {
        f"{nominal:.0%}": round(float(np.nanmean(figures_of.coverage(pooled, nominal))), 4)
        for nominal in figures_of.INTERVALS
    }
    return {
        "rung": trained.model,
        "epochs": trained.progress.epoch,
        "best_epoch": trained.progress.best_epoch + 1,
        "validation_error": {r: scaled_mae(f) for r, f in evaluation.validation.items()},
        "test_error": test,
        "coverage": coverage,
        "wait_share": trained.progress.wait_share,
        "peak_bytes": max(trained.peak_bytes, evaluation.peak_bytes),
    }


def _describe(
    store: Store,
    folder: str,
    manifest: Manifest,
    trained: Trained,
    evaluation: Evaluation,
    summary: dict[str, Any],
) -> None:
    """Everything beside the weights: figures, score states, calibration, provenance."""
    store.write_json(f"{folder}/metrics.json", {"summary": summary, "history": trained.progress.history})
    scores = {rung: found.scores.to_json() for rung, found in evaluation.test.items()}
    store.write_json(f"{folder}/scores.json", scores)
    store.write_json(
        f"{folder}/calibration.json",
        {
            "levels": list(QUANTILES),
            "shifts": {rung: shifts.tolist() for rung, shifts in evaluation.shifts.items()},
            "total_shifts": {rung: shifts.tolist() for rung, shifts in evaluation.total_shifts.items()},
        },
    )
    store.write_json(
        f"{folder}/{MANIFEST}",
        {
            "data": manifest.fingerprint,
            "windows": manifest.name,
            "level": manifest.level,
            "step": manifest.step,
            "end": manifest.start + manifest.step * manifest.steps,
            "scaler": manifest.scaler.model_dump(mode="json"),
            "seasonal_error": list(manifest.seasonal_error),
            "options": trained.options,
            **provenance(),
        },
    )


def verdict(store: Store, folder: str, margin: float = 0.0) -> dict[str, str]:
    """What `selected.json` says of a registered model: it forecasts itself if its validation error is below
    the best naive rung's by more than the share `margin`, else that rung does in its place."""
    summary = store.read_json(f"{folder}/metrics.json")["summary"]
    name, errors = summary["rung"], summary["validation_error"]
    naive = min((rung for rung in errors if rung != name), key=errors.__getitem__)
    return {
        "model": folder,
        "rung": name if errors[name] < errors[naive] * (1 - margin) else naive,
        "naive": naive,
        "reason": f"validation error {errors[name]:.4f}, {naive} {errors[naive]:.4f}",
    }


def select(store: Store, chosen: dict[str, str]) -> None:
    """Makes a `verdict` the selection that is served; the ones before it are kept."""
    now = store.read_json(SELECTED) or {}
    before = now.pop("before", [])
    if now != chosen:
        before = ([now] if now else []) + before
        store.write_json(SELECTED, {**chosen, "before": before[:_KEPT]})
    log.info("selected: %s (%s)", chosen["rung"], chosen["reason"])


def rollback(store: Store) -> dict[str, str]:
    """Goes back to the selection before the present one, and returns it.

    Raises InputError if there is none, or its model is not in the store any more.
    """
    now = store.read_json(SELECTED)
    if now is None or not now.get("before"):
        raise InputError(f"--rollback: {store.uri} has no selection before the present one")
    chosen, *before = now["before"]
    if not store.exists(f"{chosen['model']}/{MANIFEST}"):
        raise InputError(f"--rollback: {store.uri} does not have {chosen['model']} any more")
    store.write_json(SELECTED, {**chosen, "before": before})
    log.info("selected again: %s (%s)", chosen["rung"], chosen["reason"])
    return dict(chosen)

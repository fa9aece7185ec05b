"""A store with windows and a selected model, for the tests of forecasts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fleetcast import models
from fleetcast.models.stgnn import StgnnConfig
from fleetcast.store import Store
from fleetcast.training import run
from fleetcast.training.loop import Progress
from fleetcast.training.options import TrainOptions
from fleetcast.training.register import SELECTED
from fleetcast.windows.manifest import Manifest

METRICS = ("cpu", "memory", "request_rate")
HISTORY, HORIZON, DAY = 8, 4, 96
STEPS = 200


@pytest.fixture
def at_once(monkeypatch) -> None:
    """The tasks of a job run one after the other in this process, not on Ray."""

    def spread(
        items: list[Any], work: Callable, what: str, measure: str = "rows", memory: int = 0
    ) -> list[dict[str, Any]]:
        sent = json.loads(json.dumps(items))
        return [json.loads(json.dumps({**work(item), "peak_bytes": 1})) for item in sent]

    monkeypatch.setattr("fleetcast.ingest.make.spread", spread)
    monkeypatch.setattr("fleetcast.training.evaluate.spread", spread)


@pytest.fixture
def values() -> np.ndarray:
    """[T, N, F] two days of five entities with a day's cycle: cpu near 1, memory near 0, and a rate."""
    random = np.random.default_rng(5)
    cycle = np.sin(2 * np.pi * np.arange(STEPS) / DAY)[:, None, None]
    noise = random.normal(size=(STEPS, 5, 3))
    values = [0.85, 0.05, 200] + cycle * [0.1, 0.02, 50] + noise * [0.05, 0.02, 20]
    return np.clip(values, 0, [1, 1, np.inf]).astype(np.float32)


@pytest.fixture
def serve(dataset, at_once, monkeypatch) -> Callable[..., tuple[Store, Manifest]]:
    """`serve(values, …)` → a store with these windows, an evaluated model, and a rung selected.

    The model is an stgnn with its initial weights; two entity groups.
    """

    def untrained(store, manifest, options, geometry, digest):
        torch.manual_seed(0)
        return Progress(epoch=1, best_epoch=0), models.build("stgnn", {"hidden": 4}, geometry).state_dict(), 1

    monkeypatch.setattr(run, "fit", untrained)

    def make(values: np.ndarray, rung: str = "stgnn", width: int | None = None) -> tuple[Store, Manifest]:
        groups = [[f"e{n}" for n in range(values.shape[1])][i : i + 3] for i in (0, 3)]
        store, data = dataset(
            values, groups=groups, width=width, history=HISTORY, horizon=HORIZON, lags=(DAY,), metrics=METRICS
        )
        run.train_model(store, TrainOptions(windows="test", stgnn=StgnnConfig(hidden=4)))
        store.write_json(SELECTED, {**store.read_json(SELECTED), "rung": rung})
        return store, data

    return make

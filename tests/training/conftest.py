"""A small training run, for the tests of the loop and of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fleetcast import models
from fleetcast.models.geometry import Geometry
from fleetcast.store import Store
from fleetcast.training.loop import Run
from fleetcast.training.options import TrainOptions
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest

LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture
def small(dataset) -> tuple[Store, Manifest]:
    """Two entities of a day's cycle with noise and gaps, 85 training windows in four shards."""
    random = np.random.default_rng(0)
    hours = np.arange(160)[:, None, None] / 4
    values = np.sin(2 * np.pi * hours / 24 + np.arange(2)[:, None]) + 0.1 * random.normal(size=(160, 2, 2))
    values[random.random(values.shape) < 0.1] = np.nan
    edges = [(1_514_764_800 + 3600 * hour, "e0", "e1", 1.0) for hour in range(40)]
    return dataset(values.astype(np.float32), edges, width=40, history=8)


@pytest.fixture
def new_run() -> Callable[..., Run]:
    """`new_run(store, manifest, epochs=…, …)` → a run at its start, as every rank builds it."""
    return build_run


def build_run(store: Store, manifest: Manifest, **options) -> Run:
    """A run of a small stgnn on the CPU; `options` are those of TrainOptions."""
    chosen = TrainOptions(
        **({"epochs": 4, "batch_size": 8, "stgnn": {"hidden": 8, "dropout": 0.1}} | options)
    )
    geometry = Geometry.of(manifest, LEVELS)
    torch.manual_seed(chosen.seed)
    net = models.build("stgnn", chosen.stgnn.model_dump(), geometry)
    return Run.start(net, Shards(store, manifest), chosen)

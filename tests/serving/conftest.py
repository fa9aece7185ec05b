"""A store with a night's forecast, and the server's application in front of it, without Ray Serve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest.synthesize import synthesize
from fleetcast.serving.api import application
from fleetcast.serving.local import Local
from fleetcast.serving.options import ServeOptions
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions
from night import MACHINES, METRICS, serve


@pytest.fixture(scope="session")
def night(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store after a night: 12 machines, cpu and memory, six hours ahead by quarters of an hour."""
    folder = tmp_path_factory.mktemp("served")
    trace = SynthesizeOptions(machines=MACHINES, services=4, days=5, seed=1, sample_interval=60)
    synthesize(trace, Store(str(folder / "raw")))
    store = Store(str(folder / "store"))
    options = NightlyOptions.model_validate(
        {
            "shard": {"step": "15min", "history": "4h", "horizon": "6h", "metrics": METRICS, "lags": ["1d"]},
            "train": {"epochs": 3, "batch_size": 8, "steps_per_epoch": 30, "stgnn": {"hidden": 16}},
        }
    )
    nightly(store, str(folder / "raw"), options)
    # Whatever so short a training gave, the model itself is what live forecasts are of.
    selected = store.read_json("models/selected.json")
    store.write_json("models/selected.json", {**selected, "rung": "stgnn"})
    return store


@pytest.fixture(scope="session")
def service(night: Store) -> Local:
    return Local(ServeOptions(store=night.uri, clock="trace"))


@pytest.fixture(scope="session")
def served(service: Local) -> Iterator[str]:
    """The address of the running server."""
    yield from serve(application(service))


@pytest.fixture(scope="session")
def client(served: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served, timeout=60) as found:
        yield found


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture
def store(night: Store, tmp_path: Path) -> Store:
    """A copy of the store that a test may change."""
    shutil.copytree(night.root, tmp_path / "store")
    return Store(str(tmp_path / "store"))

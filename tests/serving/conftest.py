"""A store with a night's forecast, and the server's application in front of it, without Ray Serve."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
import uvicorn
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest.synthesize import synthesize
from fleetcast.serving.api import NotReady, application
from fleetcast.serving.app import ModelHost
from fleetcast.serving.live import Answer, Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import Snapshot
from fleetcast.serving.source import Forecasts
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.synthesis import SynthesizeOptions

MACHINES, METRICS = 12, ("cpu", "memory")
DAY = 96
NIGHT = "forecasts/issued=20180106T000000Z"


class Local:
    """The service in this process."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.forecasts, self.host = Forecasts(options), ModelHost(options)
        self.refresh()

    def refresh(self) -> None:
        self.forecasts.refresh()
        self.host.models.refresh()

    @property
    def snapshot(self) -> Snapshot | None:
        return self.forecasts.snapshot

    @property
    def reason(self) -> str:
        return self.forecasts.reason

    async def live(self, asked: Asked) -> tuple[Answer, dict[str, Any]]:
        (found,) = await asyncio.to_thread(self.host.forecast, [asked])
        if isinstance(found, Exception):
            raise found
        return found

    async def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        found = self.host.add(points)
        if isinstance(found, NotReady):
            raise found
        return found


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


def serve(app: Any) -> Iterator[str]:
    """The address of an application in a thread of its own, on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run([listening]), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listening.close()


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


def republish(
    store: Store, days: int, change: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows
) -> str:
    """Publishes the store's forecast once more, as issued so many days later, with changed rows."""
    folder = NIGHT
    manifest = store.read_json(f"{folder}/{MANIFEST}")
    issued = datetime.fromisoformat(manifest["figures"]["issued"]) + timedelta(days=days)
    other = f"forecasts/issued={issued:%Y%m%dT%H%M%SZ}"
    for path in store.list(folder, ".parquet"):
        rows = pl.read_parquet(store.read_bytes(path)).with_columns(pl.col("time") + timedelta(days=days))
        store.write_table(path.replace(folder, other), change(rows).to_arrow())
    store.write_json(f"{other}/overview.json", store.read_json(f"{folder}/overview.json"))
    figures = manifest["figures"] | {"issued": f"{issued:%Y-%m-%dT%H:%M:%SZ}"}
    store.write_json(f"{other}/{MANIFEST}", {**manifest, "figures": figures, "fingerprint": other})
    return other


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])

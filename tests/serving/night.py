"""What the tests of the server share: the night that is served, another one, and a server in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import uvicorn
from fleetcast.store import MANIFEST, Store

MACHINES, METRICS = 12, ("cpu", "memory")
DAY = 96
NIGHT = "forecasts/issued=20180106T000000Z"


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

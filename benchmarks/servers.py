"""A store to serve, and servers on free ports of this machine, which end with the block that they are for."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import yaml
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import OVERVIEW, forecast
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import ray_session
from fleetcast.serving.snapshot import newest
from fleetcast.store import MANIFEST, Store
from fleetcast.traces import tabular
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.traces.synthesis.services import table_of
from fleetcast.training.options import TrainOptions
from fleetcast.training.register import SELECTED
from fleetcast.training.run import train_model
from fleetcast.windows.manifest import ShardOptions

from benchmarks.clients import HOST
from benchmarks.rivals import STORE, THREADS

_ROOT = Path(__file__).parents[1]
_DAYS = 3
_HOUR, _DAY = 3600, 86_400
#: Seconds until a server that does not start is a failure.
_PATIENCE = 180


# -- the store -----------------------------------------------------------------------------------------------


def make_store(folder: Path, services: int, num_cpus: int) -> Store:
    """Services and their calls, a model that was hardly trained, and its forecast of the next hour."""
    trace = SynthesizeOptions(trace="services", services=services, days=_DAYS, requests=25 * services)
    store = Store(str(folder / "store"))
    table = table_of(str(folder / "raw"))
    with ray_session(num_cpus):
        synthesize(trace, Store(str(folder / "raw")))
        tabular.load(store, table)
        shard(
            store,
            ShardOptions(
                level="service",
                metrics=table.metrics,
                step=300,
                history=_HOUR,
                horizon=_HOUR,
                lags=(_DAY,),
                scale="entity",
                group_size=100,
            ),
        )
        train_model(store, TrainOptions(model="stgnn", epochs=1, steps_per_epoch=10))
        # Whatever so short a training gave, the model itself is what is to be measured.
        store.write_json(SELECTED, {**store.read_json(SELECTED), "rung": "stgnn"})
        forecast(store, ForecastOptions())
    return store


@contextmanager
def newer_forecast(store: Store) -> Iterator[None]:
    """Publishes the newest forecast once more, as issued a day later, until the block ends."""
    old = str(newest(store))
    manifest = store.read_json(f"{old}/{MANIFEST}")
    issued = datetime.fromisoformat(manifest["figures"]["issued"]) + timedelta(days=1)
    work, folder = "_work/newer", f"forecasts/issued={issued:%Y%m%dT%H%M%SZ}"
    for path in store.list(old, ".parquet"):
        rows = pl.read_parquet(store.read_bytes(path)).with_columns(pl.col("time") + timedelta(days=1))
        store.write_table(path.replace(old, work), rows.to_arrow())
    store.write_json(f"{work}/{OVERVIEW}", store.read_json(f"{old}/{OVERVIEW}"))
    figures = manifest["figures"] | {"issued": f"{issued:%Y-%m-%dT%H:%M:%SZ}"}
    store.write_json(f"{work}/{MANIFEST}", {**manifest, "figures": figures, "fingerprint": folder})
    store.publish(work, folder)
    try:
        yield
    finally:
        store.remove(folder)


@contextmanager
def other_model(store: Store) -> Iterator[None]:
    """Selects a copy of the selected model, until the block ends; its quantiles are further apart, so that
    answers tell which one made them."""
    before = store.read_json(SELECTED)
    other = f"{before['model']}-other"
    for path in store.list(before["model"]):
        with store.write(path.replace(before["model"], other)) as file:
            file.write(store.read_bytes(path))
    calibration = store.read_json(f"{other}/calibration.json")
    wider = {rung: (2 * np.asarray(shifts) + 0.01).tolist() for rung, shifts in calibration["shifts"].items()}
    store.write_json(f"{other}/calibration.json", {**calibration, "shifts": wider})
    store.write_json(SELECTED, {**before, "model": other})
    try:
        yield
    finally:
        store.write_json(SELECTED, before)
        store.remove(other)


# -- servers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnServe:
    """fleetcast and the trivial application, at /trivial, on a Ray Serve of their own."""

    port: int
    dashboard: int
    cold_start: float
    """Seconds from `serve run` to the first /readyz that is 200."""

    def replicas(self) -> str:
        """`Api 1, Live 1`."""
        found = json.loads(get(self.dashboard, "/api/serve/applications/"))["applications"]["fleetcast"]
        return ", ".join(
            f"{name} {len(about['replicas'])}" for name, about in sorted(found["deployments"].items())
        )


@contextmanager
def on_serve(folder: Path, store: Store, num_cpus: int) -> Iterator[OnServe]:
    """Ray and Serve as users start them, but for the ports; `folder` is for their files."""
    web, dashboard, *others = free_ports(9)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        **_haproxy(folder, others[:3]),
    }
    config = yaml.safe_load((_ROOT / "serve_config.yaml").read_text())
    config["http_options"] |= {"host": HOST, "port": web}
    config["applications"][0]["args"]["store"] = store.uri
    with _ray(folder, env, num_cpus, dashboard, others[3:]) as address:
        env["RAY_ADDRESS"] = address
        seconds = _deploy(folder, config, env, web, "/readyz")
        trivial = {"name": "trivial", "route_prefix": "/trivial", "import_path": "benchmarks.rivals:on_serve"}
        config["applications"].append(trivial)
        _deploy(folder, config, env, web, "/trivial/x")
        yield OnServe(web, dashboard, seconds)


def _haproxy(folder: Path, ports: list[int]) -> dict[str, str]:
    """HAProxy on, with files and ports that no other one on this machine has."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports[2] + 100),
    }


@contextmanager
def _ray(
    folder: Path, env: Mapping[str, str], num_cpus: int, dashboard: int, others: list[int]
) -> Iterator[str]:
    """The address of a new Ray."""
    head, client, agent, metrics = others
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", f"--num-cpus={num_cpus}"),
        *(f"--node-ip-address={HOST}", f"--port={head}", f"--temp-dir={folder / 'ray'}"),
        *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
    ]
    log = folder / "ray.log"
    with log.open("w") as file:
        # What it starts outlives the command, but stays in its session.
        started = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        if started.wait(_PATIENCE):
            raise RuntimeError(f"ray start: {log.read_text()}")
        yield f"{HOST}:{head}"
    finally:
        _end_session(started.pid)


def _end_session(session: int) -> None:
    """Ends all processes of a session that was started here."""
    for signal in ("terminate", "kill", "kill"):
        found = [one for one in psutil.process_iter(["status"]) if _session(one.pid) == session]
        found = [one for one in found if one.info["status"] != psutil.STATUS_ZOMBIE]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                getattr(process, signal)()
        psutil.wait_procs(found, timeout=10)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _deploy(folder: Path, config: Any, env: Mapping[str, str], port: int, path: str) -> float:
    """Seconds from `serve run` to the first 200."""
    config_file, log = folder / "serve_config.yaml", folder / "serve.log"
    config_file.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", str(config_file)]
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, cwd=_ROOT, stdout=file, stderr=file)
    try:
        _wait(port, path, process, log)
        seconds = time.monotonic() - started
        process.wait(_PATIENCE)
    finally:
        process.kill()
    return seconds


@contextmanager
def on_uvicorn(folder: Path, app: str, store: Store, threads: int, path: str) -> Iterator[int]:
    """The port of an application of `rivals` under uvicorn, in a process of its own."""
    (port,) = free_ports(1)
    env = {**os.environ, STORE: store.uri, THREADS: str(threads)}
    command = ["-m", "uvicorn", "--factory", f"benchmarks.rivals:{app}", f"--port={port}"]
    log = folder / f"{app}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--log-level=warning"], env=env, cwd=_ROOT, stdout=file, stderr=file
        )
    try:
        _wait(port, path, process, log)
        yield port
    finally:
        process.kill()
        process.wait()


def _wait(port: int, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers 200. Raises RuntimeError with its log if it does not."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and not process.poll():
        try:
            get(port, path)
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{path} is not answered: {log.read_text()}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def get(port: int, path: str) -> bytes:
    """What a server answers. Raises OSError if it is not 200."""
    with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=30) as answer:
        found: bytes = answer.read()
    return found

"""A simulated cluster that is scaled over a stream: its telemetry goes to Redis, an application on Ray Serve
decides, and the cluster does as it is told. In the middle the application is killed.

    python examples/demo_control.py out/demo-control

Needs `redis-server` on PATH (Debian's package `redis-server`).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import torch
from fleetcast.control import traffic
from fleetcast.control.cluster import ClusterOptions, generate
from fleetcast.control.deployment.app import build
from fleetcast.control.deployment.broker import RedisStreams
from fleetcast.control.deployment.messages import Description, Entry
from fleetcast.control.deployment.options import CLUSTER
from fleetcast.control.deployment.simulated import play
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import run, total
from fleetcast.control.policies.kubernetes import KubernetesPolicy
from fleetcast.control.traffic import TrafficOptions
from fleetcast.runtime import ray_session
from fleetcast.store import Store
from ray import serve

PORT = 8001
#: Decisions before and after the application is killed.
HALF = 60


def main(folder: Path) -> int:
    """Runs the demo in a folder that is made anew; 1 if an action was lost or given twice."""
    if shutil.which("redis-server") is None:
        print("redis-server is not on PATH (Debian: apt-get install redis-server)", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        redis_port = free.getsockname()[1]
    server = ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(folder)]
    running = subprocess.Popen([*server, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
    os.environ["FLEETCAST_REDIS"] = f"redis://127.0.0.1:{redis_port}/0"
    try:
        with ray_session(2):
            return _play(Store(str(folder / "store")).open_or_create())
    finally:
        running.terminate()
        running.wait()


def _play(store: Store) -> int:
    cluster = generate(ClusterOptions(services=25))
    about = Description.of(cluster)
    store.write_json(CLUSTER, about.model_dump(mode="json"))
    rates = traffic.generate(TrafficOptions(hours=2, patterns=("bursts",)), cluster, 1)
    broker = _until(lambda: RedisStreams(os.environ["FLEETCAST_REDIS"]))
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    args = {"store": store.uri, "clock": "trace", "decide": {"mode": "act"}}
    serve.run(build(args), name="control", route_prefix="/")
    engine = FluidEngine(cluster, rates, step=5)
    print(f"{HALF} decisions …", flush=True)
    outcomes = play(broker, engine, about, HALF, wait=60)
    pid = _get("status")["pid"]
    print(f"kill -9 {pid}, and {HALF} more …", flush=True)
    os.kill(pid, signal.SIGKILL)
    outcomes += play(broker, engine, about, HALF, wait=120)

    status = _until(lambda: _get("status"))
    service = about.services[0]
    print(f"GET /v1/control/keda/{service}: {_get(f'keda/{service}')}")
    print(f"GET /v1/control/status: {status}")
    offsets = [offset for offset, _ in broker.actions()]
    entries = [Entry.model_validate_json(body) for _, body in broker.actions()]
    inside = total(run(FluidEngine(cluster, rates, step=5), KubernetesPolicy(), 2 * HALF))
    told = total(outcomes)
    for name, one in (("told over the stream", told), ("the same rule inside", inside)):
        print(
            f"{name}: {float(one.good / one.offered):.2%} of the requests in time, "
            f"{float(one.replica_seconds) / 3600:.2f} replica-hours"
        )
    right = len(set(offsets)) == len(offsets) == 2 * HALF and [one.id for one in entries] == offsets
    restarted = status["pid"] != pid
    print(f"{len(offsets)} actions for {2 * HALF} scrapes, each once: {'yes' if right else 'NO'}")
    print(f"restarted in between: {'yes' if restarted else 'NO'}")
    return 0 if right and restarted else 1


def _get(path: str) -> Any:
    return httpx.get(f"http://127.0.0.1:{PORT}/v1/control/{path}").raise_for_status().json()


def _until(work: Callable[[], Any], seconds: float = 60) -> Any:
    """Tries again until it works."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

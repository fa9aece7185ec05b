"""How long a decision takes in the running deployment: from a scrape's arrival in Redis to its action there.

    python -m benchmarks.deployment

The application runs on Ray Serve with an agent of the usual size (its weights do not matter), telemetry comes
from a simulated cluster of each size at a fixed pace. Needs `redis-server`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fleetcast import plots
from fleetcast.config import Options
from fleetcast.control import traffic
from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.deployment.app import build
from fleetcast.control.deployment.broker import BEGINNING, RedisStreams
from fleetcast.control.deployment.messages import Description, Scrape
from fleetcast.control.deployment.options import CLUSTER
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import Action, Observation
from fleetcast.control.interface import run as run_engine
from fleetcast.control.policies.kubernetes import KubernetesPolicy
from fleetcast.control.traffic import TrafficOptions
from fleetcast.errors import InputError
from fleetcast.runtime import ray_session
from fleetcast.store import Store
from pydantic import Field
from ray import serve

from benchmarks.report import BenchConfig, machine, run, table

#: The paper's bound at 100 services [ms].
_GOAL = 60


class DeploymentBenchOptions(Options):
    """What is measured."""

    sizes: tuple[int, ...] = (25, 50, 100, 200, 500)
    """Services."""
    scrapes: int = Field(300, ge=20)
    """Scrapes of each size; the first tenth is not counted."""
    pause: float = Field(0.1, ge=0)
    """Between two scrapes [s]."""
    picture: str | None = None
    """Where the curve is drawn (a PNG), if anywhere."""


class Config(DeploymentBenchOptions, BenchConfig):
    __doc__ = __doc__


def main(config: Config) -> None:
    """Prints the curve."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as aside, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        server = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", aside]
        running = subprocess.Popen([*server, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
        os.environ["FLEETCAST_REDIS"] = f"redis://127.0.0.1:{port}/0"
        try:
            with ray_session(config.num_cpus):
                found = {size: _delays(config, Path(aside), size) for size in config.sizes}
        finally:
            running.terminate()
            running.wait()
    rows = []
    for size, (delays, bytes_) in found.items():
        p50, p99 = (f"{np.percentile(delays, q):.1f}" for q in (50, 99))
        rows.append([f"{size}", p50, p99, f"{delays.max():.1f}", f"{bytes_ / 1000:.0f} kB"])
    table(
        "From a scrape to its action",
        ["services", "p50 [ms]", "p99 [ms]", "longest [ms]", "a scrape"],
        rows,
        f"{config.scrapes} scrapes, one each {1000 * config.pause:.0f} ms; goal: p99 below {_GOAL} ms at 100 "
        f"services. {machine()}.",
    )
    if config.picture:
        Path(config.picture).write_bytes(_picture(found))


def _delays(config: Config, aside: Path, size: int) -> tuple[np.ndarray, float]:
    """[ms] of each scrape that counts, and the bytes of one."""
    store = Store(str(aside / f"store-{size}")).open_or_create()
    cluster = generate(ClusterOptions(services=size))
    about = Description.of(cluster)
    store.write_json(CLUSTER, about.model_dump(mode="json"))
    torch.manual_seed(0)
    BidrlPolicy(Agent(AgentOptions(zones=len(about.zones))), about.scales).save(store, "v1")
    bodies = _scrapes(config, cluster, about)
    decide = {"policy": "bidrl", "agent": "v1", "mode": "act", "wait": None}
    prefix = f"bench-{size}"
    args = {"store": store.uri, "clock": "trace", "prefix": prefix, "decide": decide}
    serve.run(build(args), name="control", route_prefix="/")
    broker, delays, last = RedisStreams(os.environ["FLEETCAST_REDIS"], prefix), [], BEGINNING
    for body in bodies:
        started = time.perf_counter()
        offset = broker.send(body)
        action = broker.next_action(last, 30)
        delays.append(1000 * (time.perf_counter() - started))
        if action is None or action[0] != offset:
            raise InputError(f"scrape {offset} has the action {action and action[0]}, expected its own")
        last = offset
        time.sleep(config.pause)
    serve.delete("control")
    return np.array(delays[len(delays) // 10 :]), float(np.mean([len(body) for body in bodies]))


def _scrapes(config: Config, cluster: Cluster, about: Description) -> list[bytes]:
    seen: list[bytes] = []

    class Recorded(KubernetesPolicy):
        def act(self, observation: Observation) -> Action:
            seen.append(Scrape.of(observation, about).model_dump_json().encode())
            return super().act(observation)

    rates = traffic.generate(TrafficOptions(hours=config.scrapes * 15 / 3600 + 0.1), cluster, 1)
    run_engine(FluidEngine(cluster, rates, step=5), Recorded(), config.scrapes)
    return seen


def _picture(found: dict[int, tuple[np.ndarray, float]]) -> bytes:
    figure, (axes,) = plots.subplots("From a scrape to its action, ms", width=5)
    sizes = list(found)
    for place, q in enumerate((50, 99)):
        values = [np.percentile(delays, q) for delays, _ in found.values()]
        axes.plot(sizes, values, label=f"p{q}", marker="os"[place], color=plots.PALETTE[place])
    axes.axhline(_GOAL, color=plots.QUIET, linestyle=":", label="the paper's 60 ms, at 100 services")
    axes.set_xlabel("services")
    axes.set_ylim(bottom=0)
    plots.legend(figure, axes, 3)
    return plots.png(figure)


if __name__ == "__main__":
    run(main, Config)

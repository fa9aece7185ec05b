"""A real Redis, and a cluster whose telemetry goes through it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator

import pytest
import redis
from fleetcast.control import traffic
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.deployment.broker import RedisStreams
from fleetcast.control.deployment.messages import Description, Scrape
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import run
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.control.traffic import TrafficOptions


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis that writes its log."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on PATH (Debian: apt-get install redis-server)")
    folder = tmp_path_factory.mktemp("redis")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = subprocess.Popen([*command, "--appendonly", "yes", "--save", ""], stdout=subprocess.DEVNULL)
    client = redis.Redis(
        port=port, socket_connect_timeout=1, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
    )
    client.ping()
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(10)


@pytest.fixture
def broker(redis_url: str) -> RedisStreams:
    """Streams of its own."""
    return RedisStreams(redis_url, f"test-{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return generate(ClusterOptions(services=6, rate=200, max_replicas=8))


@pytest.fixture(scope="session")
def about(cluster: Cluster) -> Description:
    return Description.of(cluster)


@pytest.fixture(scope="session")
def engine(cluster: Cluster) -> Callable[[], FluidEngine]:
    """`engine()`: the cluster at the beginning of bursts of traffic."""

    def make() -> FluidEngine:
        rates = traffic.generate(TrafficOptions(hours=1, patterns=("bursts",)), cluster, 1)
        return FluidEngine(cluster, rates, step=5, seed=0)

    return make


@pytest.fixture(scope="session")
def scrapes(engine: Callable[[], FluidEngine], about: Description) -> list[bytes]:
    """An hour's telemetry of the cluster under the rule."""
    seen: list[bytes] = []

    class Recorded(KubernetesPolicy):
        def act(self, observation):
            seen.append(Scrape.of(observation, about).model_dump_json().encode())
            return super().act(observation)

    run(engine(), Recorded(KubernetesOptions(target=50)), 120)
    return seen

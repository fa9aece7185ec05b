"""What the server answers in a second, and how long it takes, beside FastAPI alone and itself without Ray.

    python -m benchmarks.serving                                      minutes
    python -m benchmarks.serving --sizes 100 --parts live             one table
    python -m benchmarks.serving --sizes 100 --sizes 5000 --seconds 10

Ray and Serve are started as users of serve_config.yaml start them, behind HAProxy, on free ports. Requests
come from the same machine, so they share its processors with the server. Contenders run in turn.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fleetcast.errors import InputError
from fleetcast.runtime import scratch
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import MEAN, Snapshot, newest
from fleetcast.store import Store
from fleetcast.windows import manifest as manifests
from pydantic import Field

from benchmarks.clients import HOST, Load, ask, finish, hammer, has_wrk, load_of, pace, start_hammer, together
from benchmarks.report import BenchConfig, interleave, machine, run, spread_of, table
from benchmarks.servers import OnServe, get, make_store, newer_forecast, on_serve, on_uvicorn, other_model

Part = Literal["stored", "live", "reload"]
#: What is to be fast, and how many of it are to be answered in a second.
_OURS, _RATE = "**forecast of one entity**", 1000
#: Most entities that one live request may name.
_MOST = 5000
#: Requests that a client sends at least, where each takes long.
_LEAST = 3
#: Seconds of requests before a reload and after it.
_AROUND = 2


class Config(BenchConfig):
    __doc__ = __doc__

    sizes: tuple[int, ...] = Field((25, 100, 1000), min_length=1)
    """Services whose newest values a live request brings; the store has as many as the largest."""
    parts: tuple[Part, ...] = ("stored", "live", "reload")
    """What is measured: stored forecasts, live ones, a newer forecast and another model under load."""
    seconds: float = Field(2, ge=1)
    """How long each contender has each time."""
    connections: int = Field(32, ge=1)
    """Requests for stored forecasts at once."""
    clients: int = Field(4, ge=2)
    """Live requests at once."""
    folder: str | None = None
    """Where the store is kept for the next run; a scratch folder that goes away if not given."""


@dataclass(frozen=True)
class Servers:
    """What answers, and of which store."""

    serve: OnServe
    bare: int
    """Port of fleetcast without Ray."""
    trivial: int
    """Port of the trivial application without Ray."""
    store: Store
    snapshot: Snapshot
    folder: Path
    """For files of requests."""

    def paths(self, name: str, paths: Sequence[str]) -> Path:
        """A file of paths."""
        file = self.folder / f"{name}.paths"
        file.write_text("\n".join(paths))
        return file

    def stored(self) -> Path:
        """The forecast of one metric of every service."""
        return self.paths("stored", [f"/v1/forecasts/{name}?metric=cpu" for name in self.snapshot.entities])


def main(config: Config) -> None:
    """Makes the store, starts the servers, prints the tables."""
    if not has_wrk():
        raise InputError("wrk: not found, expected the load generator; `apt-get install wrk` installs it")
    for size in config.sizes:
        if not 1 <= size <= _MOST:
            raise InputError(f"--sizes {size}: expected 1 to {_MOST}, the most that a request may name")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(scratch()))
        home = Path(config.folder).absolute() if config.folder else folder
        services = max(config.sizes)
        store = make_store(home / f"{services}-services", services, config.num_cpus)
        # What is started from here on is ended then as well. Ray itself has reset the handler until now.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        servers = Servers(
            stack.enter_context(on_serve(folder, store, config.num_cpus)),
            stack.enter_context(on_uvicorn(folder, "bare", store, config.num_cpus, "/readyz")),
            stack.enter_context(on_uvicorn(folder, "trivial", store, config.num_cpus, "/x")),
            store,
            Snapshot.load(store, str(newest(store))),
            folder,
        )
        for part, measure in {"stored": _stored, "live": _live, "reload": _reload}.items():
            if part in config.parts:
                measure(config, servers)


# -- stored forecasts ----------------------------------------------------------------------------------------


def _stored(config: Config, servers: Servers) -> None:
    serve, names = servers.serve, servers.snapshot.entities
    stored = servers.stored()
    scaling = servers.paths("scaling", [f"/v1/scaling/{name}?metric=cpu&replicas=4" for name in names])
    routed = servers.paths("routed", [f"/trivial/{name}" for name in names])
    trivial = servers.paths("trivial", [f"/{name}" for name in names])
    for path in stored.read_text().split()[:10]:
        if get(serve.port, path) != get(servers.bare, path):
            raise InputError(f"{path}: the server and the one without Ray answer differently")
    contenders = {
        _OURS: _hammering(config, serve.port, stored),
        "replicas for an autoscaler": _hammering(config, serve.port, scaling),
        "trivial FastAPI route": _hammering(config, serve.port, routed),
        "forecast, uvicorn without Ray": _hammering(config, servers.bare, stored),
        "trivial, uvicorn without Ray": _hammering(config, servers.trivial, trivial),
    }
    found = interleave(contenders, config.repetitions)
    half = statistics.median(load.rate for load in found[_OURS]) / 2
    paced = {
        f"{_OURS}, at half its rate": _pacing(config, serve.port, stored, half),
        f"{_OURS}, at half the goal's": _pacing(config, serve.port, stored, _RATE / 2),
    }
    goals = {_OURS: f"≥ {_RATE:,}/s; p99 < 50 ms"} | dict.fromkeys(paced, "p99 < 25 ms")
    found |= interleave(paced, config.repetitions)
    rows = [[name, *_figures(loads), goals.get(name, "")] for name, loads in found.items()]
    table(
        f"Stored forecasts, {config.connections} connections",
        ["", "requests/s, median (min–max)", "p50 ms", "p99 ms", "failed", "goal"],
        rows,
        f"{len(names):,} services, each asked in turn; wrk with one thread, {config.repetitions} × "
        f"{config.seconds:g} s in turn, all on the same processors. At a given rate: requests at fixed "
        "times, by a client of our own; waiting counts. From `serve run` to the first answer: "
        f"{serve.cold_start:.1f} s, Ray running. Replicas at the end: {serve.replicas()}. {machine()}.",
    )


def _pacing(config: Config, port: int, paths: Path, rate: float) -> Callable[[int], Load]:
    return lambda _: pace(port, paths, config.connections, config.seconds, rate)


def _hammering(config: Config, port: int, paths: Path) -> Callable[[int], Load]:
    return lambda _: hammer(port, paths, config.connections, config.seconds)


def _figures(loads: Sequence[Load]) -> list[str]:
    """Of a row: rate, p50, p99, failures."""
    return [
        spread_of([load.rate for load in loads], 0),
        spread_of([load.p50 for load in loads], 1),
        spread_of([load.p99 for load in loads], 1),
        str(sum(load.failed for load in loads)),
    ]


# -- live forecasts ------------------------------------------------------------------------------------------


def _live(config: Config, servers: Servers) -> None:
    members = manifests.load(servers.store, servers.snapshot.manifest["windows"]).groups
    group = {name: number for number, names in enumerate(members) for name in names}
    ports = {"serve": servers.serve.port, "bare": servers.bare}
    rows = []
    for size in sorted(config.sizes):
        body = _newest_values(servers, size)
        answers = [_post(port, body) for port in ports.values()]
        if not _alike(*map(json.loads, answers)):
            raise InputError(f"{size} services: the server and the one without Ray answer differently")
        groups = len({group[name] for name in servers.snapshot.entities[:size]})
        for clients in (1, config.clients):
            contenders = {name: _asking(config, port, body, clients) for name, port in ports.items()}
            found = interleave(contenders, config.repetitions)
            ours, bare = (together(loads) for loads in found.values())
            rows.append(
                [
                    f"{size:,} services, {clients} client{'s' if clients > 1 else ''}",
                    *(f"{value:,.0f}" for value in (ours.p50, ours.p99, bare.p50, bare.p99)),
                    f"{ours.p50 / bare.p50:.2f}",
                    f"{ours.rate:,.1f}",
                    f"{ours.requests} + {bare.requests}",
                    f"{ours.failed + bare.failed}",
                    f"{groups}",
                    f"{len(answers[0]) / 1e6:.1f}",
                    "p99 < 60 ms" if (size, clients) == (100, 1) else "",
                ]
            )
    table(
        "Live forecasts",
        [
            *("newest values of", "p50 ms", "p99 ms", "p50 without Ray", "p99 without Ray", "× p50"),
            *("answers/s", "requests", "failed", "groups", "MB", "goal"),
        ],
        rows,
        "POST /v1/live, all metrics, steps and quantiles; a client waits for its answer before it goes on. "
        f"Percentiles of all requests of {config.repetitions} × {config.seconds:g} s in turn; of fewer than "
        "100, p99 is the longest. Without Ray: the same application in one uvicorn, which calls the model "
        f"itself, with {config.num_cpus} threads. An stgnn; groups of at most 100 of "
        f"{len(servers.snapshot.entities):,} services; look-back and horizon of 12 steps. "
        f"{machine()}.",
    )


def _asking(config: Config, port: int, body: Path, clients: int) -> Callable[[int], Load]:
    return lambda _: ask(port, "/v1/live", body, clients, config.seconds, _LEAST)


def _newest_values(servers: Servers, size: int) -> Path:
    """A request with the next value of each metric of so many services: what was forecast of it."""
    s = servers.snapshot
    telemetry = [
        {
            "entity": name,
            "times": [s.issued.isoformat()],
            "values": {metric: [float(value)] for metric, value in zip(s.metrics, values, strict=True)},
        }
        for name, values in zip(s.entities[:size], s.values[:size, :, 0, MEAN], strict=True)
    ]
    file = servers.folder / f"live-{size}.json"
    file.write_text(json.dumps({"telemetry": telemetry}))
    return file


def _alike(one: Any, other: Any) -> bool:
    """Whether two answers are the same but for the last digits, which depend on threads and batches."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float | int):
        return bool(np.isclose(one, other, rtol=1e-3, atol=1e-5))
    return bool(one == other)


# -- a newer forecast and another model ----------------------------------------------------------------------


def _reload(config: Config, servers: Servers) -> None:
    port, body = servers.serve.port, _newest_values(servers, min(config.sizes))
    path = f"/v1/forecasts/{servers.snapshot.entities[0]}?metric=cpu"
    stop = threading.Event()
    looks = ServeOptions(store=servers.store.uri).refresh_seconds
    seconds = 2 * _AROUND + 3 * looks
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        stack.callback(stop.set)  # also where something fails
        wrk = start_hammer(port, servers.stored(), config.connections, seconds)
        issued = pool.submit(_watch, lambda: json.loads(get(port, path))["issued"], stop)
        quantiles = pool.submit(_watch, lambda: json.loads(_post(port, body))["forecasts"], stop)
        time.sleep(_AROUND)
        published = time.monotonic()
        stack.enter_context(newer_forecast(servers.store))
        selected = time.monotonic()
        stack.enter_context(other_model(servers.store))
        load = finish(wrk)
        stop.set()
        stored, live = issued.result(), quantiles.result()
    rows = [
        [
            "newer forecast: all answers are of it",
            f"{stored.changed - published:.1f}",
            *_whole(load, stored.failed),
        ],
        [
            "another model: all live answers are its own",
            f"{live.changed - selected:.1f}",
            *_whole(load_of(live.milliseconds, live.failed, seconds)),
        ],
    ]
    table(
        "Reload under load",
        ["", "seconds until", "requests", "p50 ms", "p99 ms", "longest ms", "failed", "goal"],
        [[*row, "none fails"] for row in rows],
        f"{len(servers.snapshot.entities):,} services. The server looks for new ones every {looks:g} s. "
        f"Stored forecasts by wrk, {config.connections} connections; beside them one client that asks for "
        f"live forecasts of {min(config.sizes)} services. "
        f"Replicas at the end: {servers.serve.replicas()}. {machine()}.",
    )


def _whole(load: Load, failed: int = 0) -> list[str]:
    times = [f"{value:,.0f}" for value in (load.p50, load.p99, load.longest)]
    return [f"{load.requests:,}", *times, f"{load.failed + failed}"]


@dataclass(frozen=True)
class _Watched:
    """What one request was answered again and again."""

    changed: float
    """When the first one was sent from which on all answers were new."""
    milliseconds: list[float]
    failed: int


def _watch(request: Callable[[], Any], stop: threading.Event) -> _Watched:
    """Sends a request until it is told to stop. Raises RuntimeError if the answer did not change."""
    sent, answers, times, failed = [], [], [], 0
    while not stop.wait(0.02):
        began = time.monotonic()
        try:
            answers.append(request())
        except OSError:
            failed += 1
        else:
            sent.append(began)
            times.append(1e3 * (time.monotonic() - began))
    old = [answer == answers[0] for answer in answers]
    if old[-1]:
        raise RuntimeError("the answer did not change")
    last = len(old) - 1 - old[::-1].index(True)
    return _Watched(sent[last + 1], times, failed)


def _post(port: int, body: Path) -> bytes:
    request = urllib.request.Request(
        f"http://{HOST}:{port}/v1/live", body.read_bytes(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: bytes = answer.read()
    return found


if __name__ == "__main__":
    run(main, Config)

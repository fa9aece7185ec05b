"""What the server is measured against: the least that FastAPI can do, and the server without Ray.

uvicorn --factory benchmarks.rivals:trivial
FLEETCAST_STORE=store uvicorn --factory benchmarks.rivals:bare
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import FastAPI
from fleetcast.errors import InputError
from fleetcast.serving.api import NotReady, application
from fleetcast.serving.live import Answer, Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import Snapshot
from fleetcast.serving.source import Forecasts, Models
from ray import serve

#: Where `bare` finds the store, and how many threads torch may use.
STORE, THREADS = "FLEETCAST_STORE", "FLEETCAST_THREADS"


def trivial() -> FastAPI:
    """One route, which says back what it was told."""
    api = FastAPI()

    @api.get("/{name}")
    async def told(name: str) -> dict[str, str]:
        return {"name": name}

    return api


def on_serve(_: dict[str, Any]) -> serve.Application:
    """`trivial` on Ray Serve, in as many requests at once as serve_config.yaml lets Api have."""

    @serve.ingress(trivial())
    class Trivial:
        pass

    about = {"max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(name="Trivial", **about)(Trivial).bind()


class Bare:
    """The application's forecasts in its own process; each live request is a call of the model."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self._forecasts, self._models = Forecasts(options), Models(options)
        self._forecasts.refresh()
        self._models.refresh()

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest forecast."""
        return self._forecasts.snapshot

    @property
    def reason(self) -> str:
        """Why there is none."""
        return self._forecasts.reason

    async def live(self, asked: Asked) -> tuple[Answer, dict[str, Any]]:
        """A live forecast."""
        live = self._models.live
        if live is None:
            raise NotReady(self._models.reason)
        (found,) = await asyncio.to_thread(live.forecast, [asked])
        if isinstance(found, InputError):
            raise found
        return found, {"metrics": live.data.metrics, "step": live.data.step, "model": live.selected.rung}

    async def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        """Telemetry is not measured."""
        raise NotReady("telemetry is not kept")


def bare() -> FastAPI:
    """The whole application, without Ray."""
    torch.set_num_threads(int(os.environ.get(THREADS, 1)))
    return application(Bare(ServeOptions(store=os.environ[STORE], clock="trace")))

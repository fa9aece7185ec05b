"""What the server is measured against: the least that FastAPI can do, and the server without Ray.

uvicorn --factory benchmarks.rivals:trivial
FLEETCAST_STORE=store uvicorn --factory benchmarks.rivals:bare
"""

from __future__ import annotations

import os
from typing import Any

import torch
from fastapi import FastAPI
from fleetcast.serving.api import application
from fleetcast.serving.local import Local
from fleetcast.serving.options import ServeOptions
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


def bare() -> FastAPI:
    """The whole application, without Ray."""
    torch.set_num_threads(int(os.environ.get(THREADS, 1)))
    return application(Local(ServeOptions(store=os.environ[STORE], clock="trace")))

"""The deployments on Ray Serve.

    Api    stateless replicas, each with the newest forecast in memory; grows and shrinks with the requests
    Live   one replica with the served model and the state of all entities, which no two replicas could share;
           requests that come together share runs of the model

`build` is what serve_config.yaml names.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from fleetcast.errors import InputError
from fleetcast.runtime import set_up_logging
from fleetcast.serving.api import application
from fleetcast.serving.live import Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.source import Forecasts, Found, Models, NotReady, Overloaded, watch

log = logging.getLogger("fleetcast")

#: Live requests that share runs of the model, and how long the first of them waits for others [s].
_TOGETHER, _WAIT = 32, 0.002

#: Live requests that may wait, and requests of any kind that a replica of Api works on at once, where
#: serve_config.yaml does not say.
_WAITING, _ONGOING = 64, 64


class Live:
    """Live forecasts and the state cache; the model runs in a thread beside the event loop."""

    def __init__(self, options: dict[str, Any]) -> None:
        set_up_logging("INFO")
        torch.set_num_threads(1)
        given = ServeOptions(**options)
        self.models = Models(given)
        self.models.refresh()
        self._stop = watch(self.models.refresh, given.refresh_seconds)

    @serve.batch(max_batch_size=_TOGETHER, batch_wait_timeout_s=_WAIT)
    async def ask(self, asked: list[Asked]) -> list[Found | InputError | NotReady]:
        """One request among those that came together."""
        return await asyncio.to_thread(self.models.forecast, asked)

    async def tell(self, points: Sequence[Points]) -> tuple[int, dict[str, int]] | NotReady:
        """Keeps telemetry."""
        return await asyncio.to_thread(self.models.add, points)


@serve.ingress()
class Api(Forecasts):
    """Answers HTTP."""

    def __init__(self, options: dict[str, Any], live: DeploymentHandle) -> None:
        set_up_logging("INFO")
        super().__init__(ServeOptions(**options))
        self._live = live
        self.refresh()
        self._stop = watch(self.refresh, self.options.refresh_seconds)

    def __serve_build_asgi_app__(self) -> Any:
        return application(self)

    async def live(self, asked: Asked) -> Found:
        """A live forecast."""
        found: Found = await self._ask(self._live.ask.remote(asked))
        return found

    async def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        """Keeps telemetry."""
        found: tuple[int, dict[str, int]] = await self._ask(self._live.tell.remote(points))
        return found

    async def _ask(self, response: Any) -> Any:
        try:
            found = await response
        except BackPressureError as error:
            raise Overloaded("too many live requests wait, try again in a second") from error
        if isinstance(found, InputError | NotReady):
            raise found
        return found


def build(args: dict[str, Any]) -> serve.Application:
    """The application of serve_config.yaml's `args`. Raises InputError naming a wrong one."""
    options = checked(args)
    given = options.model_dump(mode="json")
    half = {"num_cpus": 0.5}
    live = serve.deployment(
        name="Live",
        max_ongoing_requests=_TOGETHER,
        max_queued_requests=_WAITING,
        ray_actor_options=half,
    )(Live).bind(given)
    api = serve.deployment(name="Api", max_ongoing_requests=_ONGOING, ray_actor_options=half)(Api)
    return api.bind(given, live)


def checked(args: dict[str, Any]) -> ServeOptions:
    """Options from `args`. Raises InputError naming each wrong one."""
    try:
        return ServeOptions(**args)
    except ValidationError as error:
        wrong = (
            f"args.{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}"
            for one in error.errors()
        )
        raise InputError("; ".join(wrong)) from error

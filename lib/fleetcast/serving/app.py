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
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from fleetcast.errors import InputError
from fleetcast.runtime import set_up_logging
from fleetcast.serving.api import NotReady, Overloaded, application
from fleetcast.serving.live import Answer, Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import Snapshot
from fleetcast.serving.source import Forecasts, Models, watch

log = logging.getLogger("fleetcast")

#: Live requests that share runs of the model, and how long the first of them waits for others [s].
_TOGETHER, _WAIT = 32, 0.002

Found = tuple[Answer, dict[str, Any]] | InputError | NotReady


class ModelHost:
    """The served model and the state; everything runs in one thread beside the event loop."""

    def __init__(self, options: ServeOptions) -> None:
        torch.set_num_threads(1)
        self.models = Models(options)

    def forecast(self, asked: Sequence[Asked]) -> list[Found]:
        """An answer, or what is wrong, for each request."""
        live = self.models.live
        if live is None:
            return [NotReady(self.models.reason)] * len(asked)
        data = live.data
        about = {"metrics": data.metrics, "step": data.step, "model": live.selected.rung}
        found = live.forecast(asked)
        return [one if isinstance(one, InputError) else (one, about) for one in found]

    def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]] | NotReady:
        """Keeps telemetry."""
        live = self.models.live
        return NotReady(self.models.reason) if live is None else live.add(points)


class Live(ModelHost):
    """Live forecasts and the state cache."""

    def __init__(self, options: dict[str, Any]) -> None:
        set_up_logging("INFO")
        given = ServeOptions(**options)
        super().__init__(given)
        self.models.refresh()
        self._stop = watch(self.models.refresh, given.refresh_seconds)

    @serve.batch(max_batch_size=_TOGETHER, batch_wait_timeout_s=_WAIT)
    async def ask(self, asked: list[Asked]) -> list[Found]:
        """One request among those that came together."""
        return await asyncio.to_thread(self.forecast, asked)

    async def tell(self, points: Sequence[Points]) -> tuple[int, dict[str, int]] | NotReady:
        """Keeps telemetry."""
        return await asyncio.to_thread(self.add, points)

    def reason(self) -> str:
        """Why there is no model, or another one was refused."""
        return self.models.reason


@serve.ingress()
class Api:
    """Answers HTTP."""

    def __init__(self, options: dict[str, Any], live: DeploymentHandle) -> None:
        set_up_logging("INFO")
        self.options = ServeOptions(**options)
        self._live = live
        self._forecasts = Forecasts(self.options)
        self._forecasts.refresh()
        self._stop = watch(self._forecasts.refresh, self.options.refresh_seconds)

    def __serve_build_asgi_app__(self) -> Any:
        return application(self)

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest forecast."""
        return self._forecasts.snapshot

    @property
    def reason(self) -> str:
        """Why there is none, or why a newer one was refused."""
        return self._forecasts.reason

    async def live(self, asked: Asked) -> tuple[Answer, dict[str, Any]]:
        """A live forecast."""
        found = await self._ask(self._live.ask.remote(asked))
        if isinstance(found, InputError | NotReady):
            raise found
        return found

    async def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        """Keeps telemetry."""
        found = await self._ask(self._live.tell.remote(points))
        if isinstance(found, NotReady):
            raise found
        return found

    async def _ask(self, response: Any) -> Any:
        try:
            return await response
        except BackPressureError as error:
            raise Overloaded("too many live requests wait, try again in a second") from error


def build(args: dict[str, Any]) -> serve.Application:
    """The application of serve_config.yaml's `args`. Raises InputError naming a wrong one."""
    options = checked(args)
    given = options.model_dump(mode="json")
    live = serve.deployment(
        name="Live",
        max_ongoing_requests=_TOGETHER,
        max_queued_requests=options.max_concurrent,
        ray_actor_options={"num_cpus": options.live_cpus},
    )(Live).bind(given)
    return serve.deployment(
        name="Api",
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": options.api_cpus},
    )(Api).bind(given, live)


#: Requests that a replica of Api works on at once: most only read memory.
_ONGOING = 64


def checked(args: dict[str, Any]) -> ServeOptions:
    """Options from `args`. Raises InputError naming a wrong one."""
    from pydantic import ValidationError

    try:
        return ServeOptions(**args)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InputError(f"args.{name}: {first['msg']}, got {first.get('input')!r}") from error

"""The HTTP application: actions, what KEDA and a router take of them, the kill switch, metrics."""

from __future__ import annotations

import logging
import os
import time
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from redis import RedisError
from starlette.exceptions import HTTPException

from fleetcast import __version__
from fleetcast.config import Options
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.manifests import route
from fleetcast.control.deployment.messages import Entry, ServiceAction
from fleetcast.control.deployment.options import DeployOptions
from fleetcast.serving.api import Guard
from fleetcast.serving.service import problem, reply

log = logging.getLogger("fleetcast")

#: Of a request's body [bytes].
_LARGEST = 10_000


class Turn(Options):
    """The kill switch."""

    on: bool
    """On: the reactive rule decides alone, until it is turned off."""


def application(consumer: Consumer, options: DeployOptions) -> FastAPI:
    """The application of one consumer."""
    api = FastAPI(title="fleetcast control", version=__version__, docs_url=None, redoc_url=None)
    broker, about, mode = consumer.broker, consumer.decider.about, options.decide.mode
    token = options.token()

    def newest() -> Entry:
        """The newest action. Raises HTTPException where there is none, or it is too old."""
        entry = consumer.last
        if entry is None:
            raise HTTPException(503, "no telemetry has come yet", {"Retry-After": "15"})
        return entry

    def fresh() -> Entry:
        entry = newest()
        if mode != "act":
            raise HTTPException(409, f"mode {mode}, expected act: nothing is given to autoscalers or routers")
        old = _age(consumer, options)
        if old > options.stale:
            raise HTTPException(
                503,
                f"telemetry is {old:.0f} s old, expected at most {options.stale:.0f} s",
                {"Retry-After": "15"},
            )
        return entry

    def one(entry: Entry, service: str) -> ServiceAction:
        for action in entry.actions:
            if action.service == service:
                return action
        raise HTTPException(404, f"service: {service!r} is not in the telemetry")

    @api.get("/healthz")
    async def alive() -> Response:
        """Whether the server is there."""
        return reply({"status": "ok"})

    @api.get("/readyz")
    async def ready() -> Response:
        """Whether telemetry is read."""
        if consumer.failure is not None:
            return problem(503, consumer.failure)
        return reply({"status": "ok"})

    @api.get("/v1/control/status")
    def status() -> Response:
        """What is decided by whom, on what, and how it goes."""
        return reply(_status(consumer, options))

    @api.get("/v1/control/actions")
    async def actions() -> Response:
        """The newest action of every service; none in mode observe, in which they are recorded alone."""
        entry = newest()
        return reply(entry.model_dump() | ({"actions": []} if mode == "observe" else {}))

    @api.get("/v1/control/actions/{service}")
    async def action(service: str) -> Response:
        """The newest action of a service."""
        entry = newest()
        if mode == "observe":
            raise HTTPException(409, "mode observe: actions are recorded and given to nobody")
        return reply({**entry.model_dump(exclude={"actions"}), "action": one(entry, service).model_dump()})

    @api.get("/v1/control/keda/{service}")
    async def keda(service: str) -> Response:
        """Replicas, as KEDA's metrics-api scaler reads them with a target of 1."""
        return reply({"service": service, "replicas": one(fresh(), service).replicas})

    @api.get("/v1/control/routes")
    async def routes() -> Response:
        """HTTPRoutes of the Gateway API, as a list that `kubectl apply` takes."""
        found = [route(one, about.zones, options.port, options.gateway) for one in fresh().actions]
        return reply({"apiVersion": "v1", "kind": "List", "items": found})

    @api.post("/v1/control/kill")
    def kill(turn: Turn) -> Response:
        """Turns the kill switch; it stays where it is through restarts."""
        if not token:
            raise HTTPException(
                403, f"{options.token_variable} is not set: nobody may turn the switch over HTTP"
            )
        broker.kill(turn.on)
        log.warning("control: the kill switch is turned %s", "on" if turn.on else "off")
        return reply({"killed": turn.on})

    @api.get("/metrics")
    def metrics(accept: Annotated[str, Header()] = "") -> Response:
        """Gauges and counters, as text or OpenMetrics."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Gauges(consumer, options))
        encode, kind = choose_encoder(accept)
        return Response(encode(registry), headers={"Content-Type": kind})

    @api.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), None, dict(error.headers or {}))

    @api.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(422, first["msg"], ".".join(map(str, first["loc"][1:])) or str(first["loc"][0]))

    @api.exception_handler(RedisError)
    async def _(_: Request, error: RedisError) -> Response:
        log.error("control: %s: %s", type(error).__name__, error)
        return problem(
            503, f"the stream cannot be reached: {type(error).__name__}", None, {"Retry-After": "10"}
        )

    api.add_middleware(Guard, most=_LARGEST, token=token)
    return api


def _age(consumer: Consumer, options: DeployOptions) -> float:
    """Of the newest telemetry [s]."""
    if consumer.last is None:
        return np.inf
    since = consumer.last.time if options.clock == "wall" else consumer.heard
    return max(0.0, time.time() - since)


def _status(consumer: Consumer, options: DeployOptions) -> dict[str, Any]:
    decider, broker = consumer.decider, consumer.broker
    delays = np.array(consumer.delays) * 1000
    entry = consumer.last
    age = _age(consumer, options)
    return {
        "mode": options.decide.mode,
        "policy": options.decide.policy,
        "agent": options.decide.agent,
        "killed": broker.killed(),
        "offset": consumer.offset,
        "telemetry_age_s": age if np.isfinite(age) else None,
        "latent_age_s": None if entry is None else entry.latent_age,
        "fallback": None if entry is None else entry.fallback,
        "services": len(decider.about.services),
        "strangers": dict(decider.strangers.most_common(20)),
        "actions": consumer.given,
        "messages": broker.counts(),
        "delay_ms": {f"p{q}": float(np.percentile(delays, q)) for q in (50, 99)} if len(delays) else None,
        "failure": consumer.failure,
        "pid": os.getpid(),
    }


class _Gauges(Collector):
    """What Prometheus scrapes."""

    def __init__(self, consumer: Consumer, options: DeployOptions) -> None:
        self._consumer, self._options = consumer, options

    def collect(self) -> Any:
        found = _status(self._consumer, self._options)
        entry = self._consumer.last
        mode = found["mode"]
        replicas = GaugeMetricFamily(
            "fleetcast_control_replicas", "Replicas that are asked for.", labels=["service", "mode"]
        )
        proposed = GaugeMetricFamily(
            "fleetcast_control_proposed_replicas",
            "What the policy alone would have.",
            labels=["service", "mode"],
        )
        for action in () if entry is None else entry.actions:
            replicas.add_metric([action.service, mode], action.replicas)
            proposed.add_metric([action.service, mode], action.proposed)
        yield replicas
        yield proposed
        yield GaugeMetricFamily("fleetcast_control_killed", "Whether the kill switch is on.", found["killed"])
        age = found["telemetry_age_s"]
        yield GaugeMetricFamily(
            "fleetcast_control_telemetry_age_seconds",
            "Of the newest telemetry.",
            np.nan if age is None else age,
        )
        yield GaugeMetricFamily(
            "fleetcast_control_fallback",
            "Whether the reactive rule decides alone.",
            found["fallback"] is not None,
        )
        yield CounterMetricFamily("fleetcast_control_actions", "Actions since the start.", found["actions"])
        yield CounterMetricFamily(
            "fleetcast_control_rejected", "Messages that were kept aside.", found["messages"]["rejected"]
        )
        if found["delay_ms"] is not None:
            delay = GaugeMetricFamily(
                "fleetcast_control_delay_seconds", "From telemetry to its action.", labels=["quantile"]
            )
            for name, value in found["delay_ms"].items():
                delay.add_metric([f"0.{name[1:]}"], value / 1000)
            yield delay

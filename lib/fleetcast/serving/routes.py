"""The routes of people and autoscalers: forecasts, totals, peaks, limits, live forecasts, replicas."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from fastapi import Depends, FastAPI, Header, Path, Query
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from fleetcast.errors import InputError
from fleetcast.schemas import QUANTILES
from fleetcast.serving import answers, schemas
from fleetcast.serving.live import Asked, Points
from fleetcast.serving.schemas import MOST_LISTED, Level, Name
from fleetcast.serving.service import Service, problem, reply
from fleetcast.serving.snapshot import Snapshot, now
from fleetcast.serving.source import NotReady

ARROW = "application/vnd.apache.arrow.stream"


def add_routes(api: FastAPI, service: Service) -> None:
    """Everything under /v1, and the health checks."""
    clock = service.options.clock

    async def snapshot() -> Snapshot:  # a plain function would go through a pool of threads
        found = service.snapshot
        if found is None:
            raise NotReady(service.reason or "no forecast is there yet")
        return found

    Now = Annotated[Snapshot, Depends(snapshot)]
    Entity = Annotated[str, Path(min_length=1, max_length=253, examples=["m_1"])]
    Metric = Annotated[str, Query(min_length=1, max_length=253, examples=["cpu"])]
    Quantile = Annotated[Level, Query(examples=[0.95])]
    Most = Annotated[int, Query(ge=1, le=MOST_LISTED)]

    def place(s: Snapshot, entity: str) -> int:
        if entity not in s.places:
            raise HTTPException(404, f"{entity}: no such {s.manifest['level']}")
        return s.place(entity)

    def chosen(s: Snapshot, metrics: Sequence[str] | None) -> list[int]:
        return [s.metric(name) for name in (metrics or s.metrics)]

    @api.get("/healthz", response_model=schemas.Health, tags=["health"])
    async def alive() -> Response:
        """Whether the process works."""
        return reply({"status": "ok", "reason": service.reason or None, "forecast": None, "model": None})

    @api.get("/readyz", response_model=schemas.Health, tags=["health"])
    async def ready() -> Response:
        """Whether there is a forecast to serve."""
        s = service.snapshot
        if s is None:
            return problem(503, service.reason)
        return reply(
            {
                "status": "ok",
                "reason": service.reason or None,
                "forecast": s.folder,
                "model": s.manifest["model"],
            }
        )

    @api.get("/v1/cluster", response_model=schemas.Cluster, tags=["forecasts"])
    async def cluster(s: Now) -> Response:
        """What there is to ask for, and of which forecast."""
        return reply(answers.cluster(s, clock))

    @api.get("/v1/entities", response_model=schemas.Entities, tags=["forecasts"])
    async def entities(
        s: Now,
        search: Annotated[str, Query(max_length=253)] = "",
        limit: Most = 100,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> Response:
        """Entities whose name holds a text, page by page."""
        return reply(answers.entities(s, search, limit, offset))

    @api.get("/v1/entities/{entity:path}", response_model=schemas.Entity, tags=["forecasts"])
    async def entity(s: Now, entity: Entity) -> Response:
        """What is known of an entity."""
        place(s, entity)
        return reply(answers.detail(s, entity))

    arrow: dict[int | str, dict[str, Any]] = {200: {"content": {ARROW: {}}}}

    @api.get(
        "/v1/forecasts/{entity:path}",
        response_model=schemas.Forecasts,
        responses=arrow,
        tags=["forecasts"],
    )
    async def forecast(
        s: Now,
        entity: Entity,
        metric: Annotated[list[Name] | None, Query(max_length=64)] = None,
        hours: Annotated[schemas.Hours | None, Query()] = None,
        quantile: Annotated[list[Level] | None, Query(max_length=16)] = None,
        accept: Annotated[str, Header()] = "",
    ) -> Response:
        """The forecast of one entity, as JSON or, if asked for, as an Arrow stream of the store's rows."""
        return _forecasts(s, clock, [place(s, entity)], chosen(s, metric), hours, quantile, accept)

    @api.post("/v1/forecasts", response_model=schemas.Forecasts, responses=arrow, tags=["forecasts"])
    async def many(
        s: Now, request: schemas.ForecastRequest, accept: Annotated[str, Header()] = ""
    ) -> Response:
        """The forecasts of many entities."""
        places = [place(s, name) for name in request.entities]
        metrics = chosen(s, request.metrics)
        return _forecasts(s, clock, places, metrics, request.hours, request.quantiles, accept)

    @api.get("/v1/history/{entity:path}", response_model=schemas.History, tags=["forecasts"])
    async def history(s: Now, entity: Entity) -> Response:
        """What was observed before the forecast."""
        place(s, entity)
        return reply(answers.history(s, entity))

    @api.get("/v1/totals", response_model=schemas.Total, tags=["cluster"])
    async def total(
        s: Now,
        metric: Metric,
        service: Annotated[Name | None, Query()] = None,
        parent: Annotated[Name | None, Query()] = None,
    ) -> Response:
        """The sum over all entities, with its own interval, and before it what was observed; or over those of
        a service, or on a parent such as a machine."""
        s.metric(metric)
        if service is None and parent is None:
            return reply(answers.total(s, clock, metric, None))
        places = s.members(service, parent)
        if not places:
            asked = {"service": service, "parent": parent}
            words = " and ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
            raise HTTPException(404, f"{words}: there is no such {s.manifest['level']}")
        return reply(answers.total(s, clock, metric, places))

    @api.post("/v1/totals", response_model=schemas.Total, tags=["cluster"])
    async def some(s: Now, request: schemas.TotalRequest) -> Response:
        """The sum over some entities, each counted once."""
        places = sorted({place(s, name) for name in request.entities})
        return reply(answers.total(s, clock, request.metric, places))

    @api.get("/v1/peaks", response_model=schemas.Peaks, tags=["cluster"])
    async def peaks(s: Now, metric: Metric, quantile: Quantile = 0.95, limit: Most = 10) -> Response:
        """The entities whose quantile rises highest until the horizon's end."""
        return reply(answers.peaks(s, clock, metric, quantile, limit))

    Bound = Annotated[float, Query(ge=0, le=1e12, examples=[0.8])]

    @api.get("/v1/limits", response_model=schemas.Limits, tags=["cluster"])
    async def limits(
        s: Now,
        metric: Metric,
        limit: Bound = 0.8,
        quantile: Quantile = 0.95,
        most: Most = 100,
    ) -> Response:
        """Who is expected to pass a limit, soonest first."""
        return reply(answers.limits(s, clock, metric, limit, quantile, most))

    @api.get("/v1/limits/{entity:path}", response_model=schemas.Limits, tags=["cluster"])
    async def limit_of(
        s: Now, entity: Entity, metric: Metric, limit: Bound = 0.8, quantile: Quantile = 0.95
    ) -> Response:
        """Hours until one entity passes a limit."""
        return reply(answers.limits(s, clock, metric, limit, quantile, 1, place(s, entity)))

    @api.get("/v1/neighbours/{entity:path}", response_model=schemas.Neighbours, tags=["forecasts"])
    async def neighbours(s: Now, entity: Entity) -> Response:
        """The graph around an entity."""
        place(s, entity)
        return reply(answers.neighbours(s, entity))

    @api.get("/v1/accuracy/{entity:path}", response_model=schemas.Accuracy, tags=["forecasts"])
    async def accuracy(s: Now, entity: Entity) -> Response:
        """What an earlier forecast of an entity was worth."""
        place(s, entity)
        return reply(answers.accuracy(s, entity))

    @api.get("/v1/model", response_model=schemas.Card, tags=["forecasts"])
    async def card(s: Now) -> Response:
        """What is known of the model that forecasts."""
        return reply(s.card())

    @api.get("/v1/scaling/{workload:path}", response_model=schemas.Scaling, tags=["autoscaling"])
    async def scaling(
        s: Now,
        workload: Entity,
        metric: Metric = "cpu",
        quantile: Quantile = 0.95,
        lead_minutes: Annotated[float, Query(gt=0, le=60 * 24 * 31)] = 15,
        replicas: Annotated[int | None, Query(ge=1, le=100_000)] = None,
        per_replica: Annotated[float | None, Query(gt=1e-6, le=1e12)] = None,
        target: Annotated[float, Query(ge=0.01, le=1)] = service.options.target_utilisation,
        least: Annotated[int, Query(ge=0, le=100_000)] = 1,
    ) -> Response:
        """How many replicas a workload needs until the lead time is over: for KEDA's metrics-api scaler.

        Of a fraction of a replica's capacity such as cpu: replicas · load / target. Of a rate: load /
        per_replica. Without a valid forecast the answer is 503, never a small number.
        """
        at = place(s, workload)
        if now(clock, s) >= s.valid_until:
            raise NotReady(f"the forecast is stale: it was valid until {s.valid_until:%Y-%m-%dT%H:%M:%SZ}")
        return reply(
            answers.scaling(
                s, clock, at, metric, quantile, lead_minutes, replicas, per_replica, target, least
            )
        )

    @api.post("/v1/live", response_model=schemas.LiveForecasts, tags=["live"])
    async def live(request: schemas.LiveRequest) -> Response:
        """A forecast from now on, of what the server was sent and of the telemetry in the request.

        Any number of points, gaps allowed. An entity that the model does not know is forecast from its
        telemetry alone, with a wide interval and the reason.
        """
        names = request.entities or list(dict.fromkeys(one.entity for one in request.telemetry))
        if not names:
            raise InputError("entities: expected some, or telemetry")
        origin = None if request.origin is None else _unix(request.origin)
        asked = Asked(tuple(names), tuple(_points(one) for one in request.telemetry), origin)
        found = await service.live(asked)
        levels = QUANTILES if request.quantiles is None else request.quantiles
        return reply(answers.live(found, names, request.hours, levels))

    @api.post("/v1/telemetry", response_model=schemas.TelemetryAnswer, tags=["live"])
    async def telemetry(request: schemas.TelemetryRequest) -> Response:
        """Keeps new observations, so that a live forecast needs only the newest ones."""
        kept, rejected = await service.add([_points(one) for one in request.telemetry])
        return reply({"accepted": kept, "rejected": rejected})


def _forecasts(
    s: Snapshot,
    clock: str,
    places: Sequence[int],
    metrics: Sequence[int],
    hours: float | None,
    quantiles: Sequence[float] | None,
    accept: str,
) -> Response:
    levels = QUANTILES if quantiles is None else quantiles
    points = len(places) * len(metrics) * s.horizon * (1 + len(levels))
    if points > schemas.MOST_POINTS:
        raise InputError(
            f"entities: {points:,} values, expected at most {schemas.MOST_POINTS:,} in an answer"
        )
    if ARROW in accept:
        table = s.table(places, metrics, answers.steps_of(hours, s.step, s.horizon))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return Response(sink.getvalue().to_pybytes(), media_type=ARROW)
    return reply(answers.forecasts(s, clock, places, metrics, hours, levels))


def _unix(moment: datetime) -> int:
    """A naive time is UTC."""
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _points(one: schemas.Telemetry) -> Points:
    """Raises InputError if a metric does not have a value for each time."""
    for name, values in one.values.items():
        if len(values) != len(one.times):
            raise InputError(
                f"telemetry.{one.entity}.values.{name}: {len(values)} values, expected {len(one.times)}, "
                "one for each time"
            )
    times = np.array([_unix(moment) for moment in one.times], np.int64)
    found = {
        name: np.array([np.nan if value is None else value for value in of], np.float64)
        for name, of in one.values.items()
    }
    return Points(one.entity, times, found)

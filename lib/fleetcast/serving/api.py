"""The HTTP application: routes, limits, errors in one form, the page.

It knows forecasts by a `Service`, so it runs on Ray Serve and, in tests, in any ASGI server.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Annotated, Any, Protocol
from urllib.parse import parse_qsl

import numpy as np
import orjson
import pyarrow as pa
from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetcast import __version__
from fleetcast.errors import InputError
from fleetcast.schemas import QUANTILES
from fleetcast.serving import answers, prometheus, schemas
from fleetcast.serving.live import Answer, Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.schemas import MOST_LISTED, Level, Name
from fleetcast.serving.snapshot import Snapshot, now

ARROW = "application/vnd.apache.arrow.stream"
_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z
#: What may be asked without a token: whether the server is there.
_OPEN = frozenset({"/healthz", "/readyz"})
_PAGE = {"index.html": "text/html; charset=utf-8", "app.js": "text/javascript", "style.css": "text/css"}
_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'self'"
)


class Overloaded(Exception):
    """More live requests than may wait."""


class NotReady(Exception):
    """There is no valid forecast, or no model; the message says why."""


class Service(Protocol):
    """What the application asks for forecasts."""

    options: ServeOptions

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest forecast that can be used."""

    @property
    def reason(self) -> str:
        """Why there is none, or why a newer one was refused; empty if all is well."""

    async def live(self, asked: Asked) -> tuple[Answer, dict[str, Any]]:
        """A live forecast, and the `metrics`, `step` [s] and `model` that it is of. Raises InputError,
        NotReady and Overloaded."""

    async def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        """Keeps telemetry: how many values, and why others are not. Raises NotReady and Overloaded."""


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON; arrays are written as they are, times in UTC, what is not a number as null."""
    return Response(orjson.dumps(value, option=_JSON), status, headers, "application/json")


def problem(
    status: int, error: str, field: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """An error in the one form that all have."""
    return reply({"error": error, "field": field}, status, headers)


def application(service: Service) -> FastAPI:
    """The application of one service."""
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": schemas.Problem, "description": words}
        for code, words in {
            401: "A token is expected",
            404: "No such entity",
            413: "The body is too large",
            422: "What is asked for cannot be",
            429: "Too many requests wait",
            503: "There is no valid forecast",
        }.items()
    }
    api = FastAPI(
        title="fleetcast",
        version=__version__,
        summary="Load forecasts of machines and services, with quantiles.",
        responses=errors,
        docs_url=None,
        redoc_url=None,
    )
    _handle_errors(api)
    _routes(api, service)
    _prometheus_routes(api, service)
    _page_routes(api)
    api.add_middleware(_Guard, most=int(service.options.max_body_mb * 1e6), token=service.options.token())
    return api


class _Guard:
    """Before anything is read: the token, and the size of the body."""

    def __init__(self, app: ASGIApp, most: int, token: bytes) -> None:
        self.app, self.most, self.token = app, most, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.token and scope["path"] not in _OPEN and not _is_page(scope["path"]):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not secrets.compare_digest(given, self.token):
                again = {"WWW-Authenticate": "Bearer"}
                await problem(401, "expected Authorization: Bearer and the token", None, again)(
                    scope, receive, send
                )
                return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            await self._too_large()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self._words)
            return message

        await self.app(scope, counted, send)

    @property
    def _words(self) -> str:
        return f"the body is larger than {self.most:,} bytes"

    def _too_large(self) -> Response:
        return problem(413, self._words)


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/page/")


def _handle_errors(api: FastAPI) -> None:
    @api.exception_handler(InputError)
    async def _(_: Request, error: InputError) -> Response:
        words = str(error)
        field, found, rest = words.partition(": ")
        named = found and " " not in field
        return problem(422, rest if named else words, field if named else None)

    @api.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        words = first["msg"].removeprefix("Value error, ")
        return problem(422, words, ".".join(place[1:]) or place[0])

    @api.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), None, dict(error.headers or {}))

    @api.exception_handler(NotReady)
    async def _(_: Request, error: NotReady) -> Response:
        return problem(503, str(error), None, {"Retry-After": "10"})

    @api.exception_handler(Overloaded)
    async def _(_: Request, error: Overloaded) -> Response:
        return problem(429, str(error), None, {"Retry-After": "1"})


def _routes(api: FastAPI, service: Service) -> None:
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
            raise HTTPException(404, f"service {service}, parent {parent}: there is no entity of it")
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
        answer, about = await service.live(asked)
        return reply(
            answers.live(
                answer,
                names,
                about["metrics"],
                about["step"],
                about["model"],
                request.hours,
                QUANTILES if request.quantiles is None else request.quantiles,
            )
        )

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


def _prometheus_routes(api: FastAPI, service: Service) -> None:
    clock = service.options.clock
    tags: list[Any] = ["prometheus"]
    Answering = Callable[[Snapshot], Any]

    def answered(work: Answering) -> Response:
        """In Prometheus's envelope, errors as well."""
        s = service.snapshot
        if s is None:
            return _prometheus_error(503, "unavailable", service.reason)
        try:
            return reply({"status": "success", "data": work(s)})
        except InputError as error:
            return _prometheus_error(422, "execution", str(error))

    def instant(query: str, time: str | None) -> Response:
        def work(s: Snapshot) -> Any:
            at = None if time is None else prometheus.seconds(time, "time")
            return prometheus.query(s, query, at, clock)

        return answered(work)

    def ranged(query: str, start: str, end: str, step: str) -> Response:
        def work(s: Snapshot) -> Any:
            first, last = prometheus.seconds(start, "start"), prometheus.seconds(end, "end")
            return prometheus.query_range(s, query, first, last, prometheus.duration(step, "step"))

        return answered(work)

    Text = Annotated[str, Query(max_length=10_000, examples=["fleetcast_total"])]

    @api.get("/metrics", tags=tags, response_class=Response)
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        """Gauges of now, as text or OpenMetrics."""
        registry = CollectorRegistry(auto_describe=False)
        refused = bool(service.reason) and service.snapshot is not None
        registry.register(prometheus.Gauges(service.snapshot, refused, clock))
        encode, kind = choose_encoder(accept)
        return Response(encode(registry), headers={"Content-Type": kind})

    @api.get("/api/v1/query", tags=tags)
    async def query(query: Text, time: str | None = None) -> Response:
        """An instant query."""
        return instant(query, time)

    @api.post("/api/v1/query", tags=tags, openapi_extra=_form("query"))
    async def query_form(request: Request) -> Response:
        """The same as a form."""
        form = await _read_form(request, "query")
        return instant(form["query"], form.get("time"))

    @api.get("/api/v1/query_range", tags=tags)
    async def query_range(query: Text, start: str, end: str, step: str) -> Response:
        """A range query, which may reach into the future."""
        return ranged(query, start, end, step)

    needed = ("query", "start", "end", "step")

    @api.post("/api/v1/query_range", tags=tags, openapi_extra=_form(*needed))
    async def query_range_form(request: Request) -> Response:
        """The same as a form."""
        form = await _read_form(request, *needed)
        return ranged(form["query"], form["start"], form["end"], form["step"])

    @api.get("/api/v1/labels", tags=tags)
    @api.post("/api/v1/labels", tags=tags)
    async def labels() -> Response:
        """The names of labels."""
        return answered(lambda _: list(prometheus.LABELS))

    @api.get("/api/v1/label/{name}/values", tags=tags)
    async def label(name: str) -> Response:
        """The values of a label."""
        return answered(lambda s: prometheus.label_values(s, name))

    @api.get("/api/v1/series", tags=tags)
    async def series(match: Annotated[list[str], Query(alias="match[]", max_length=10)]) -> Response:
        """The labels of the series that selectors choose."""

        def work(s: Snapshot) -> Any:
            found = [prometheus.parse(one) for one in match]
            return [
                dict(line.labels)
                for one in found
                if isinstance(one, tuple)
                for line in prometheus.lines(s, one)
            ]

        return answered(work)

    @api.get("/api/v1/metadata", tags=tags)
    async def metadata() -> Response:
        """What the series are."""
        words = {"type": "gauge", "help": "load, in the metric's own unit", "unit": ""}
        return answered(lambda _: {name: [words] for name in prometheus.NAMES})

    @api.get("/api/v1/status/buildinfo", tags=tags)
    async def build_info() -> Response:
        """What answers."""
        return answered(lambda _: {"version": __version__, "application": "fleetcast"})


def _form(*needed: str) -> dict[str, Any]:
    """OpenAPI of a form with these fields."""
    fields = {name: {"type": "string", "maxLength": 10_000} for name in needed}
    schema = {"type": "object", "properties": fields, "required": list(needed)}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": schema}},
        }
    }


async def _read_form(request: Request, *needed: str) -> dict[str, str]:
    """The last value of each field. Raises InputError for one that is missing, or a body that is no form."""
    try:
        pairs = parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=100)
    except ValueError as error:
        raise InputError("body: expected a form, application/x-www-form-urlencoded, of UTF-8") from error
    form = dict(pairs)
    for name in needed:
        if name not in form:
            raise InputError(f"{name}: is required")
    return form


def _prometheus_error(status: int, kind: str, error: str) -> Response:
    return reply({"status": "error", "errorType": kind, "error": error}, status)


def _page_routes(api: FastAPI) -> None:
    folder = resources.files("fleetcast.serving") / "page"
    files = {name: ((folder / name).read_bytes(), kind) for name, kind in _PAGE.items()}
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    def route(path: str, name: str) -> Callable[[], Awaitable[Response]]:
        content, kind = files[name]

        async def page() -> Response:
            return Response(content, headers={**headers, "Content-Type": kind})

        api.get(path, include_in_schema=False)(page)
        return page

    route("/", "index.html")
    route("/page/app.js", "app.js")
    route("/page/style.css", "style.css")

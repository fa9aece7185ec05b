"""The routes of Prometheus and Grafana."""

from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from fleetcast import __version__
from fleetcast.errors import InputError
from fleetcast.serving import prometheus
from fleetcast.serving.service import Service, reply
from fleetcast.serving.snapshot import Snapshot


def add_routes(api: FastAPI, service: Service) -> None:
    """/metrics, and a Prometheus's HTTP API under /api/v1."""
    clock = service.options.clock
    tags: list[Any] = ["prometheus"]

    def answered(work: Callable[[Snapshot], Any]) -> Response:
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

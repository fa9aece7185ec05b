"""The HTTP application: who may ask and how much, errors in one form, the page; the routes are beside it.

It knows forecasts by a `Service`, so it runs on Ray Serve and in any ASGI server.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleetcast import __version__
from fleetcast.errors import InputError
from fleetcast.serving import prometheus_routes, routes, schemas
from fleetcast.serving.service import Service, problem
from fleetcast.serving.source import NotReady, Overloaded

log = logging.getLogger("fleetcast")

#: Characters of a wrong value that an error repeats.
_REPEATED = 80
#: What may be asked without a token: whether the server is there.
_OPEN = frozenset({"/healthz", "/readyz"})
_PAGE = {"index.html": "text/html; charset=utf-8", "app.js": "text/javascript", "style.css": "text/css"}
_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'self'"
)


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
    routes.add_routes(api, service)
    prometheus_routes.add_routes(api, service)
    _page_routes(api)
    api.add_middleware(Guard, most=int(service.options.max_body_mb * 1e6), token=service.options.token())
    return api


class Guard:
    """Before anything is read: the token, if there is one, and the size of the body."""

    def __init__(self, app: ASGIApp, most: int, token: bytes) -> None:
        self.app, self.most, self.token = app, most, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.token and scope["path"] not in _OPEN and not _is_page(scope["path"]):
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, b"Bearer " + self.token):
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
        if first["type"] != "missing":
            words += f", got {_short(first['input'])}"
        return problem(422, words, ".".join(place[1:]) or place[0])

    @api.exception_handler(OSError)
    async def _(_: Request, error: OSError) -> Response:
        log.error("serve: %s: %s", type(error).__name__, error)
        again = {"Retry-After": "10"}
        return problem(503, f"the store cannot be read now: {type(error).__name__}", None, again)

    @api.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), None, dict(error.headers or {}))

    @api.exception_handler(NotReady)
    async def _(_: Request, error: NotReady) -> Response:
        return problem(503, str(error), None, {"Retry-After": "10"})

    @api.exception_handler(Overloaded)
    async def _(_: Request, error: Overloaded) -> Response:
        return problem(429, str(error), None, {"Retry-After": "1"})


def _short(value: Any) -> str:
    """What was given, as an error repeats it."""
    text = repr(value)
    return text if len(text) <= _REPEATED else f"{text[:_REPEATED]}…"


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

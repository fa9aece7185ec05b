"""What the routes ask for forecasts, and how they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import orjson
from fastapi.responses import Response

from fleetcast.serving.live import Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import Snapshot
from fleetcast.serving.source import Found

_JSON = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z


class Service(Protocol):
    """What the application asks for forecasts."""

    options: ServeOptions

    snapshot: Snapshot | None
    """The newest forecast that can be used."""
    reason: str
    """Why there is none, or why a newer one was refused; empty if all is well."""

    async def live(self, asked: Asked) -> Found:
        """A live forecast. Raises InputError, NotReady and Overloaded."""

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

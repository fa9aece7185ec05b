"""Scrapes into a stream."""

from __future__ import annotations

from fleetcast.control.deployment.broker import RedisStreams


def fill(broker: RedisStreams, bodies: list[bytes]) -> list[str]:
    """The offsets of these scrapes in the stream."""
    return [broker.send(body) for body in bodies]

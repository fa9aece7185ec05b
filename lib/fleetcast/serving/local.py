"""The server in one process, without Ray: for tests, and to measure what Ray costs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fleetcast.serving.live import Asked, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.source import Forecasts, Found, Models


class Local(Forecasts):
    """A service whose model runs in a thread of its own process."""

    def __init__(self, options: ServeOptions) -> None:
        super().__init__(options)
        self.models = Models(options)
        self.refresh()

    def refresh(self) -> None:
        """Takes up a newer forecast and another model."""
        super().refresh()
        self.models.refresh()

    async def live(self, asked: Asked) -> Found:
        """A live forecast."""
        (found,) = await asyncio.to_thread(self.models.forecast, [asked])
        if isinstance(found, Exception):
            raise found
        return found

    async def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]]:
        """Keeps telemetry."""
        found = await asyncio.to_thread(self.models.add, points)
        if isinstance(found, Exception):
            raise found
        return found

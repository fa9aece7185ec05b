"""What the server can be told: `args` of serve_config.yaml."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from fleetcast.config import Options, S3Options
from fleetcast.errors import InputError
from fleetcast.store import Store, use_s3


class ServeOptions(Options):
    """From a store to answers over HTTP."""

    store: str
    """The store whose newest forecast and selected model are served: a folder or `s3://bucket/prefix`."""
    reconciled: bool = False
    """Serve the forecasts that agree with the level below (of a store of a level, `…/levels/machine`)."""
    s3: S3Options = S3Options()
    """How `s3://` is reached."""
    clock: Literal["wall", "trace"] = "wall"
    """What "now" is. wall: the server's clock; past its horizon a forecast is stale. trace: the newest
    forecast's beginning, for traces of the past."""
    refresh_seconds: float = Field(5, gt=0)
    """How often the server looks for a newer forecast or another selected model [s]."""
    token_variable: str | None = None
    """Environment variable that holds a bearer token; with it every request but health checks needs
    `Authorization: Bearer …`."""
    max_body_mb: float = Field(32, gt=0)
    """Largest body of a request [MB]; beyond it the answer is 413."""
    target_utilisation: float = Field(0.7, gt=0, le=1)
    """Share of a replica's capacity that required replicas leave it with, where a request does not say."""
    unknown_entities: int = Field(10_000, ge=0)
    """Most entities that the model was not trained on whose telemetry is kept."""

    def open(self) -> Store:
        """The store, reached as the options say."""
        use_s3(self.s3)
        return Store(self.store)

    def token(self) -> bytes:
        """The token of `token_variable`, empty if none is asked for. Raises InputError if it is not set: a
        server that should ask for a token must not answer without one."""
        if self.token_variable is None:
            return b""
        found = os.environ.get(self.token_variable, "")
        if not found:
            raise InputError(f"token_variable: {self.token_variable} is not set or empty")
        return found.encode()

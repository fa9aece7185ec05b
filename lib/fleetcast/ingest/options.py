"""What ingest can be told."""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import Field, field_validator, model_validator

from fleetcast.config import Options, Seconds
from fleetcast.traces import TRACES
from fleetcast.traces.prometheus import PrometheusOptions

_DAY = 86_400


class IngestOptions(Options):
    """From raw rows to telemetry, entities and dependencies."""

    trace: str = "alibaba-2018"
    """The format of the raw tables: alibaba-2018, microservices-v2021, microservices-v2022; or prometheus, of
    a server that is asked for them."""
    start: datetime = datetime(2018, 1, 1, tzinfo=UTC)
    """UTC time of the trace's second 0, at midnight. The publisher does not say it; a Monday is assumed."""
    step: Seconds = 300
    """Width of a telemetry bin [s, or 5min, 1h]; must divide a day."""
    slice: Seconds = 3600
    """Width of a dependency slice [s, or 1h]; must divide a day."""
    neighbours: int = Field(8, ge=1)
    """Strongest sources kept for each entity, slice and kind of dependency."""
    max_rejected_share: float = Field(0.05, ge=0, le=1)
    """A table with a larger share of unusable rows [0-1] fails the job, and nothing is published."""
    chunk_mb: int = Field(128, ge=1)
    """Bytes of csv that one task reads [MB]. An archive that is larger itself is indexed first, and then read
    in such pieces too; a smaller one is one task."""
    buckets: int | None = Field(None, ge=1, le=100)
    """Parts of each day by entity; more parts need less memory each. If not given, those that the store has;
    a new store gets one for each 5 GB of the raw rows that it is made of."""
    prometheus: PrometheusOptions = PrometheusOptions()
    """What a Prometheus server is asked, if the source is one."""

    @field_validator("trace")
    @classmethod
    def _known_trace(cls, name: str) -> str:
        if name not in TRACES:
            raise ValueError(f"unknown trace; known: {', '.join(TRACES)}")
        return name

    @field_validator("start")
    @classmethod
    def _midnight(cls, start: datetime) -> datetime:
        start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
        if start.timestamp() % _DAY:
            raise ValueError("expected midnight UTC")
        return start

    @field_validator("step", "slice")
    @classmethod
    def _divides_a_day(cls, width: int) -> int:
        if width < 1 or _DAY % width:
            raise ValueError("expected a width that divides a day")
        return width

    @model_validator(mode="after")
    def _slice_of_steps(self) -> IngestOptions:
        if self.slice % self.step:
            raise ValueError(f"slice ({self.slice} s) must be a multiple of step ({self.step} s)")
        finer = self.prometheus.resolution
        if finer and self.step % finer:
            raise ValueError(f"prometheus.resolution ({finer} s) must divide step ({self.step} s)")
        return self

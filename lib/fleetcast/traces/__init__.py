"""The sources: one file per trace says what its raw tables hold and how their rows become canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fleetcast.traces import alibaba_2018, prometheus
from fleetcast.traces.raw import Table


@dataclass(frozen=True)
class Trace:
    """One source format."""

    tables: Mapping[str, Table]
    metrics: Mapping[str, float]
    """Every metric of its telemetry, in the order of the columns, and how many raw units are one of ours."""
    telemetry: tuple[str, ...]
    """The tables that telemetry is made of: without any row of them there is nothing to forecast."""


TRACES: dict[str, Trace] = {
    "alibaba-2018": Trace(alibaba_2018.TABLES, alibaba_2018.METRICS, alibaba_2018.TELEMETRY),
    prometheus.TRACE: Trace(prometheus.TABLES, prometheus.METRICS, tuple(prometheus.LABELS)),
}

"""The sources: one file per trace says what its raw tables hold and how their rows become canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetcast.traces import alibaba_2018, microservices, microservices_2021, microservices_2022, prometheus
from fleetcast.traces.raw import Table


@dataclass(frozen=True)
class Trace:
    """One source format."""

    tables: Mapping[str, Table]
    metrics: Mapping[str, float]
    """Every metric of its telemetry, in the order of the columns, and how many raw units are one of ours."""
    telemetry: tuple[str, ...]
    """The tables that telemetry is made of: without any row of them there is nothing to forecast."""
    default_metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Level → the metrics that are forecast of it where nobody says which; the shard job's if not given."""
    normalised: frozenset[str] = frozenset()
    """Metrics that the publisher has scaled to [0, 1] over the trace, so that their unit is not known."""


TRACES: dict[str, Trace] = {
    "alibaba-2018": Trace(alibaba_2018.TABLES, alibaba_2018.METRICS, alibaba_2018.TELEMETRY),
    "microservices-v2021": Trace(
        microservices_2021.TABLES,
        microservices_2021.METRICS,
        microservices_2021.TELEMETRY,
        microservices.DEFAULT_METRICS,
    ),
    "microservices-v2022": Trace(
        microservices_2022.TABLES,
        microservices_2022.METRICS,
        microservices_2022.TELEMETRY,
        microservices.DEFAULT_METRICS,
        microservices_2022.NORMALISED,
    ),
    prometheus.TRACE: Trace(prometheus.TABLES, prometheus.METRICS, tuple(prometheus.LABELS)),
}

"""Alibaba cluster-trace-microservices-v2022: as v2021, over 13 days, of a cluster twice as large.

Utilisations and rates are min-max normalised over the trace, so they are neither fractions nor rates: they
can be compared with one another, but with no capacity. Latencies are in milliseconds.
"""

from __future__ import annotations

import polars as pl

from fleetcast.traces import microservices
from fleetcast.traces.microservices import (
    MADE,
    MILLISECONDS,
    RECEIVED,
    STORES,
    latency,
    rate,
    unnamed,
)
from fleetcast.traces.raw import Binning, Table
from fleetcast.traces.usage import clock, missing, negative

_FLOWS = RECEIVED | MADE | STORES
_USAGE = {"cpu": "cpu_utilization", "memory": "memory_utilization"}
_RATES = {rate(ending): f"{flow}_mcr" for ending, flow in _FLOWS.items()}
_LATENCIES = {latency(ending): f"{flow}_rt" for ending, flow in _FLOWS.items()}
#: Every metric that this source has, in the order of the telemetry's columns, and what to divide it by.
METRICS = dict.fromkeys([*_USAGE, *_RATES], 1.0) | dict.fromkeys(_LATENCIES, 1e3)
#: Metrics whose unit the publisher has taken away.
NORMALISED = frozenset({*_USAGE, *_RATES})
#: The tables that telemetry is made of.
TELEMETRY = ("NodeMetrics", "MSMetrics", "MSRTMCR")

_text, _integer, _real = pl.String, pl.Int64, pl.Float32
_CLOCK = clock("timestamp", MILLISECONDS)
_WHOSE = {"timestamp": _integer, "msname": _text, "msinstanceid": _text, "nodeid": _text}
_NAMED = _CLOCK | missing("msinstanceid") | missing("msname")


def _nodes(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    return microservices.machine(frame, binning, _USAGE)


def _resources(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    return microservices.container(frame, binning, _USAGE)


def _rates(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    return microservices.container(frame, binning, _RATES | _LATENCIES)


def _calls(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    return microservices.calls(frame, binning, "rpc_id")


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "NodeMetrics",
            {"timestamp": _integer, "nodeid": _text, **dict.fromkeys(_USAGE.values(), _real)},
            _CLOCK | missing("nodeid"),
            negative(*_USAGE.values()),
            _nodes,
            header=True,
        ),
        Table(
            "MSMetrics",
            {**_WHOSE, **dict.fromkeys(_USAGE.values(), _real)},
            _NAMED,
            negative(*_USAGE.values()),
            _resources,
            header=True,
        ),
        Table(
            "MSRTMCR",
            {**_WHOSE, **dict.fromkeys([*_RATES.values(), *_LATENCIES.values()], _real)},
            _NAMED,
            negative(*_RATES.values(), *_LATENCIES.values()),
            _rates,
            header=True,
        ),
        Table(
            "CallGraph",
            {"timestamp": _integer, "traceid": _text, "rpc_id": _text, "um": _text, "dm": _text},
            _CLOCK | missing("traceid"),
            unnamed("um", "dm"),
            _calls,
            header=True,
        ),
    )
}

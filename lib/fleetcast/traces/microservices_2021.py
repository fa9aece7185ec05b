"""Alibaba cluster-trace-microservices-v2021: machines, containers, their calls by type, and a log of calls.

cpu and memory are fractions of capacity. HTTP_RT has the values of HTTP_MCR, an error of the trace, so there
is no latency of http. Of caches and databases there is the log alone.
"""

from __future__ import annotations

import polars as pl

from fleetcast.traces import microservices
from fleetcast.traces.microservices import MADE, MILLISECONDS, RECEIVED, latency, rate, unnamed
from fleetcast.traces.raw import Binning, Table
from fleetcast.traces.usage import clock, missing, negative

#: What a row of MSRTQps is about → our metric, and what to divide by to reach our unit.
_NAMES = {"providerrpc": "providerRPC", "consumerrpc": "consumerRPC", "http": "HTTP"} | {
    "providermq": "providerMQ",
    "consumermq": "consumerMQ",
}
_RATES = {f"{_NAMES[flow]}_MCR": rate(ending) for ending, flow in (RECEIVED | MADE).items()}
_LATENCIES = {
    f"{_NAMES[flow]}_RT": latency(ending) for ending, flow in (RECEIVED | MADE).items() if flow != "http"
}
#: Every metric that this source has, in the order of the telemetry's columns, and what to divide it by.
METRICS = dict.fromkeys(["cpu", "memory", *_RATES.values()], 1.0) | dict.fromkeys(_LATENCIES.values(), 1e3)
#: The tables that telemetry is made of.
TELEMETRY = ("Node", "MSResource", "MSRTQps")

_text, _integer, _real = pl.String, pl.Int64, pl.Float32
_CLOCK = clock("timestamp", MILLISECONDS)


def _node(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    usage = {"cpu": "node_cpu_usage", "memory": "node_memory_usage"}
    return microservices.machine(frame, binning, usage)


def _resource(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    usage = {"cpu": "instance_cpu_usage", "memory": "instance_memory_usage"}
    return microservices.container(frame, binning, usage)


def _rates(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    """A row has one metric; HTTP_RT is known and left out."""
    known = _RATES | _LATENCIES
    wide = frame.filter(pl.col("metric").is_in(list(known))).with_columns(
        pl.when(pl.col("metric") == raw).then("value").alias(metric) for raw, metric in known.items()
    )
    return microservices.container(wide, binning, {metric: metric for metric in known.values()})


def _calls(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    return microservices.calls(frame, binning, "rpcid")


TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "Node",
            {
                "timestamp": _integer,
                "nodeid": _text,
                "node_cpu_usage": _real,
                "node_memory_usage": _real,
            },
            _CLOCK | missing("nodeid"),
            negative("node_cpu_usage", "node_memory_usage"),
            _node,
            header=True,
        ),
        Table(
            "MSResource",
            {
                "msname": _text,
                "msinstanceid": _text,
                "nodeid": _text,
                "instance_cpu_usage": _real,
                "instance_memory_usage": _real,
                "timestamp": _integer,
            },
            _CLOCK | missing("msinstanceid") | missing("msname"),
            negative("instance_cpu_usage", "instance_memory_usage"),
            _resource,
            header=True,
        ),
        Table(
            "MSRTQps",
            {
                "timestamp": _integer,
                "msname": _text,
                "msinstanceid": _text,
                "metric": _text,
                "value": _real,
            },
            _CLOCK
            | missing("msinstanceid")
            | missing("msname")
            | {
                "metric is not known": ~pl.col("metric").is_in(
                    [f"{flow}_{what}" for flow in _NAMES.values() for what in ("MCR", "RT")]
                )
            },
            negative("value"),
            _rates,
            header=True,
        ),
        Table(
            "MSCallGraph",
            {"traceid": _text, "timestamp": _integer, "rpcid": _text, "um": _text, "dm": _text},
            _CLOCK | missing("traceid"),
            unnamed("um", "dm"),
            _calls,
            header=True,
        ),
    )
}

"""What the microservice traces share: telemetry of machines and containers, rates by type, a log of calls.

Times are milliseconds from the trace's start. Files begin with a header, and columns are known by it.
Services have no telemetry of their own: theirs is that of their containers, whose rates add up. A log holds
single calls of a sample of all requests, each on up to two lines, so who calls whom is a number of distinct
calls.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import polars as pl

from fleetcast.traces.raw import Binning
from fleetcast.traces.usage import bins, entities, unix

#: A second in the unit of the stamps.
MILLISECONDS = 1000
_SECOND = pl.col("timestamp") // MILLISECONDS
#: How a name says that it is not known, or that the call came from outside the cluster.
_NOBODY = ("(?)", "UNKNOWN", "UNAVAILABLE", "USER")

#: Type of call, as metrics end → what it is called in both traces: what a container receives, then what it
#: makes. The plain `request_rate` and `latency` are of remote procedure calls received.
RECEIVED = {"": "providerrpc", "_http": "http", "_mq": "consumermq"}
MADE = {"_out": "consumerrpc", "_mq_out": "providermq"}
STORES = {"_cache_read": "readmc", "_cache_write": "writemc", "_db_read": "readdb", "_db_write": "writedb"}
#: What is forecast of each level where nobody says it: machines have no calls.
_CONTAINERS = ("cpu", "memory", "request_rate", "latency")
DEFAULT_METRICS = {"machine": ("cpu", "memory"), "container": _CONTAINERS, "service": _CONTAINERS}


def rate(ending: str) -> str:
    """Calls of a type per second."""
    return f"request_rate{ending}"


def latency(ending: str) -> str:
    """How long they took."""
    return f"latency{ending}"


def unnamed(*columns: str) -> dict[str, pl.Expr]:
    """Ends of calls of which nobody knows the name, empty ones among them."""
    return {column: pl.col(column).is_null() | pl.col(column).is_in(_NOBODY) for column in columns}


def machine(frame: pl.DataFrame, binning: Binning, usage: Mapping[str, str]) -> dict[str, pl.DataFrame]:
    """Rows of `timestamp`, `nodeid` and usage → telemetry of machines."""
    seen = frame.group_by("nodeid").agg(_SECOND.max().alias("seen"))
    described = entities(
        seen, pl.col("seen"), entity=pl.col("nodeid"), kind=pl.lit("machine"), measured=pl.lit(True)
    )
    return {"machine": bins(frame, "nodeid", _SECOND, usage, binning), "entities": described}


def container(frame: pl.DataFrame, binning: Binning, usage: Mapping[str, str]) -> dict[str, pl.DataFrame]:
    """Rows of `timestamp`, `msname`, `msinstanceid` and usage → telemetry of containers; where they ran, if
    there is a `nodeid`."""
    whose = [name for name in ("msinstanceid", "msname", "nodeid") if name in frame.columns]
    seen = frame.group_by(whose).agg(_SECOND.max().alias("seen"))
    described = entities(
        seen,
        pl.col("seen"),
        entity=pl.col("msinstanceid"),
        kind=pl.lit("container"),
        parent=pl.col("nodeid") if "nodeid" in whose else pl.lit(None),
        service=pl.col("msname"),
        measured=pl.lit(True),
    )
    products = {"container": bins(frame, "msinstanceid", _SECOND, usage, binning), "entities": described}
    if "nodeid" in whose:
        # A row a slice says it: where a container is changes once in days.
        products["hosted"] = (
            frame.drop_nulls(["nodeid", "msname"])
            .select(
                container="msinstanceid",
                machine="nodeid",
                service="msname",
                start=unix(_SECOND, binning, binning.slice),
                running=pl.lit(True),
            )
            .unique()
        )
    return products


def calls(frame: pl.DataFrame, binning: Binning, call: str) -> dict[str, pl.DataFrame]:
    """A log's lines of `timestamp`, `traceid`, `um`, `dm` and the `call` within its trace → its calls between
    two services that are both known.

    Caller and callee log a call under one id, some lines come twice, and some calls carry the id of the one
    before; a call is told by its trace, its id and its two ends.
    """
    known = frame.filter(pl.col("um") != pl.col("dm")).drop_nulls(["um", "dm"])
    ids = known.select(pl.concat_str("traceid", call, separator="/", ignore_nulls=True)).to_series()
    hashed = pd.util.hash_array(ids.to_numpy(), categorize=False)  # of which every version gives the same
    spans = known.select(
        source="um",
        target="dm",
        call=pl.Series(hashed, dtype=pl.UInt64),
        time=(pl.col("timestamp") + binning.start * MILLISECONDS).cast(pl.Datetime("ms", "UTC")),
    )
    return {"spans": spans}

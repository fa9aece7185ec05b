"""The canonical tables: their columns, units and Arrow types, fixed once for every source."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

#: What each metric means. A source that has no capacity to divide by says so in its own file.
METRICS: dict[str, str] = {
    "cpu": "CPU time, fraction of capacity",
    "memory": "memory in use, fraction of capacity",
    "disk_io": "disk activity, fraction of capacity",
    "net_in": "incoming traffic, fraction of capacity",
    "net_out": "outgoing traffic, fraction of capacity",
    "memory_bandwidth": "memory bandwidth, fraction of capacity",
    "mpki": "cache misses per 1000 instructions",
    "cpi": "cycles per instruction",
    "request_rate": "requests, 1/s",
    "latency": "response time, s",
}
#: Calls of other types, as the names of their rates and latencies end.
METRICS |= {
    name: words
    for ending, calls in {
        "_http": "http requests",
        "_mq": "messages received",
        "_out": "calls made",
        "_mq_out": "messages sent",
        "_cache_read": "reads of caches",
        "_cache_write": "writes to caches",
        "_db_read": "reads of databases",
        "_db_write": "writes to databases",
    }.items()
    for name, words in {
        f"request_rate{ending}": f"{calls}, 1/s",
        f"latency{ending}": f"response time of {calls}, s",
    }.items()
}
#: Metrics that lie in [0, 1] where the source divides by capacity.
FRACTIONS = frozenset({"cpu", "memory", "disk_io", "net_in", "net_out", "memory_bandwidth"})


def adds_up(metric: str) -> bool:
    """Whether a service's is the sum of its containers', not their mean; a sum of maxima is a bound."""
    return metric.startswith("request_rate")


def has_total(metric: str) -> bool:
    """Whether a sum over entities means anything: of times and of ratios it does not."""
    return not metric.startswith(("latency", "cpi", "mpki"))


def describe(metric: str, normalised: Collection[str] = ()) -> str:
    """A metric in words with its unit, which a `normalised` one has not; `cpu_max` as the maximum within the
    bin."""
    name = metric.removesuffix("_max")
    words = METRICS.get(name, name)
    if name in normalised:
        words = f"{words.rsplit(', ', 1)[0]}, normalised over the trace"
    return f"highest {words}" if metric.endswith("_max") else words


def describe_total(metric: str, normalised: Collection[str] = ()) -> str:
    """The sum of a metric over entities: fractions of a capacity add up to whole capacities."""
    words = describe(metric, normalised)
    return "total " + words.replace("fraction of capacity", "1 = one entity's capacity")


DEPENDENCY_KINDS = ("call", "batch", "colocation", "correlation")

# Parquet has no unit coarser than milliseconds, so whole seconds are stored as such.
TIME = pa.timestamp("ms", tz="UTC")
NAME = pa.dictionary(pa.int32(), pa.string())


def telemetry(metrics: list[str]) -> pa.Schema:
    """Bins of one day: `entity`, `time` (start of the bin), per metric its mean and maximum, `samples`."""
    fields = [pa.field("entity", NAME), pa.field("time", TIME)]
    for metric in metrics:
        fields += [pa.field(metric, pa.float32()), pa.field(f"{metric}_max", pa.float32())]
    return pa.schema([*fields, pa.field("samples", pa.uint32())])


#: `parent` is a container's machine, `service` its application; capacities in cores and normalised memory;
#: `measured` says whether there is telemetry of it, `last_measured` until when.
ENTITIES = pa.schema(
    [
        ("entity", pa.string()),
        ("kind", pa.string()),
        ("parent", pa.string()),
        ("service", pa.string()),
        ("cpu_capacity", pa.float32()),
        ("memory_capacity", pa.float32()),
        ("measured", pa.bool_()),
        ("last_measured", TIME),
    ]
)

#: Load propagates from `source` to `target`; `time` is the start of the slice.
DEPENDENCIES = pa.schema(
    [
        ("time", TIME),
        ("source", NAME),
        ("target", NAME),
        ("kind", NAME),
        ("weight", pa.float32()),
    ]
)

#: Rows that could not be used; `offset` is the row's first byte in the (decompressed) file, or the row's
#: number where a file's columns have names.
REJECTED = pa.schema(
    [
        ("table", NAME),
        ("file", NAME),
        ("offset", pa.int64()),
        ("reason", NAME),
        ("line", pa.string()),
    ]
)

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def quantile_name(q: float) -> str:
    """`0.05` → `q05`."""
    return f"q{round(q * 100):02d}"


#: `fallback` is null, or why the model's forecast of this entity was replaced by the naive one.
FORECASTS = pa.schema(
    [
        ("entity", NAME),
        ("metric", NAME),
        ("time", TIME),
        ("mean", pa.float32()),
        *((quantile_name(q), pa.float32()) for q in QUANTILES),
        ("model", NAME),
        ("fallback", NAME),
    ]
)

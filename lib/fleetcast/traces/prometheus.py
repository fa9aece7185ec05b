"""A Prometheus server as a source: what it is asked by default, and how its answers become rows.

`ingest/pull.py` asks and writes the answers as raw tables, headerless CSV with Unix times in seconds:

    machine, container, service    time, entity, every metric of METRICS; a row per entity and sample
    placement                      time, pod, machine, service; where pods ran, and whose they were
    calls                          time (start of the slice), source, target, calls per second

Entities are called by the labels of the series: machines by `nodename`, `node` or `instance`, containers,
which are pods, `namespace/pod`, and services, which are Deployments and the like, `namespace/workload`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

import polars as pl
from pydantic import Field, field_validator, model_validator

from fleetcast.config import Options, Seconds
from fleetcast.traces.raw import Binning, Table
from fleetcast.traces.usage import bins, entities, missing, negative, unix

TRACE = "prometheus"
#: Every metric that can be asked for, in the order of the columns. They are asked for in our units.
METRICS = dict.fromkeys(("cpu", "memory", "disk_io", "net_in", "net_out", "request_rate", "latency"), 1.0)
#: The tables that are telemetry: kind of entities → alternatives of the labels that name one, best first.
LABELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "machine": (("nodename",), ("node",), ("instance",)),
    "container": (("namespace", "pod"),),
    "service": (
        ("namespace", "workload"),
        ("destination_workload_namespace", "destination_workload"),
        ("server",),
    ),
}
#: Likewise the two ends of a call.
SOURCE: tuple[tuple[str, ...], ...] = (
    ("source_workload_namespace", "source_workload"),
    ("client",),
    ("source",),
)
TARGET: tuple[tuple[str, ...], ...] = (
    ("destination_workload_namespace", "destination_workload"),
    ("server",),
    ("target",),
)

#: Traffic is a fraction of this where no capacity is known, as of pods and most virtual machines [bytes/s].
LINE_RATE = 1.25e9


# -- what is asked by default ------------------------------------------------------------------------------


def _of_node(value: str) -> str:
    """By `instance` → by the node's name, so that machines are called as pods call them."""
    names = "topk by (instance) (1, max by (instance, nodename) (last_over_time(node_uname_info[$window])))"
    return f"({value}) * on (instance) group_left (nodename) {names}"


def _node_traffic(direction: str) -> str:
    real = 'device!~"lo|veth.*|cali.*|cilium.*|lxc.*|cni.*|docker.*|flannel.*|br-.*|tunl.*|kube-ipvs.*"'
    traffic = f"sum by (instance) (rate(node_network_{direction}_bytes_total{{{real}}}[$window]))"
    speed = f"sum by (instance) (last_over_time(node_network_speed_bytes{{{real}}}[$window]) > 0)"
    return _of_node(f"{traffic} / ({speed} or {traffic} * 0 + {LINE_RATE:g})")


def _of_capacity(value: str, resource: str) -> str:
    """A pod's use as a fraction of its limit if all its containers have one, else of its node's capacity."""
    limits = f'last_over_time(kube_pod_container_resource_limits{{resource="{resource}"}}[$window])'
    containers = "last_over_time(kube_pod_container_info[$window])"
    nodes = f'last_over_time(kube_node_status_capacity{{resource="{resource}"}}[$window])'
    limit = (
        f"(sum by (namespace, pod) ({limits}) and "
        f"count by (namespace, pod) ({limits}) >= count by (namespace, pod) ({containers}))"
    )
    node = (
        "max by (namespace, pod) (max by (namespace, pod, node) (last_over_time(kube_pod_info[$window])) "
        f"* on (node) group_left () max by (node) ({nodes}))"
    )
    return f"{value} / ({limit} or {node})"


def _pod_traffic(direction: str) -> str:
    total = f"container_network_{direction}_bytes_total"
    return f'sum by (namespace, pod) (rate({total}{{pod!=""}}[$window])) / {LINE_RATE:g}'


_IDLE = 'rate(node_cpu_seconds_total{mode=~"idle|iowait|steal"}[$window])'
_AVAILABLE = "avg by (instance) (avg_over_time(node_memory_MemAvailable_bytes[$window]))"
_MEMORY = "avg by (instance) (avg_over_time(node_memory_MemTotal_bytes[$window]))"
_DISKS = 'rate(node_disk_io_time_seconds_total{device!~"dm-.*|loop.*|ram.*|sr.*"}[$window])'

MACHINE = {
    "cpu": _of_node(f"clamp_min(1 - avg by (instance) (sum by (instance, cpu) ({_IDLE})), 0)"),
    "memory": _of_node(f"1 - {_AVAILABLE} / {_MEMORY}"),
    "disk_io": _of_node(f"max by (instance) ({_DISKS})"),
    "net_in": _node_traffic("receive"),
    "net_out": _node_traffic("transmit"),
}
CONTAINER = {
    "cpu": _of_capacity(
        'sum by (namespace, pod) (rate(container_cpu_usage_seconds_total{container!=""}[$window]))', "cpu"
    ),
    "memory": _of_capacity(
        'sum by (namespace, pod) (avg_over_time(container_memory_working_set_bytes{container!=""}[$window]))',
        "memory",
    ),
    "net_in": _pod_traffic("receive"),
    "net_out": _pod_traffic("transmit"),
}
PODS = 'max by (namespace, pod, node) (last_over_time(kube_pod_info{node!=""}[$window]))'
OWNERS = """max by (namespace, pod, workload) (
  label_replace(last_over_time(kube_pod_owner{owner_kind="ReplicaSet"}[$window]),
    "replicaset", "$1", "owner_name", "(.+)")
  * on (namespace, replicaset) group_left (workload) max by (namespace, replicaset, workload) (
    label_replace(last_over_time(kube_replicaset_owner{owner_kind!~"<none>|"}[$window]),
      "workload", "$1", "owner_name", "(.+)")))
or on (namespace, pod) max by (namespace, pod, workload) (
  label_replace(last_over_time(kube_pod_owner{owner_kind!~"Job|Node|<none>|"}[$window]),
    "workload", "$1", "owner_name", "(.+)"))"""


class Graph(Options):
    """One way in which a cluster may know who calls whom."""

    series: str
    """A cluster that has it has any of these."""
    service: dict[str, str]
    """Metric → query, by the service that is called."""
    calls: str
    """Calls per second by both ends."""


def graphs(prefix: str) -> dict[str, Graph]:
    """The service graphs that are known, in the order in which they are looked for."""
    seconds = f"{prefix}_request_server_seconds"
    istio = '{reporter="destination"}'  # both sides report each request
    called = "destination_workload_namespace, destination_workload"
    caller = "source_workload_namespace, source_workload"
    milliseconds = "istio_request_duration_milliseconds"
    return {
        "otel": Graph(
            series=f"{prefix}_request_total",
            service={
                "request_rate": f"sum by (server) (rate({prefix}_request_total[$window]))",
                "latency": f"sum by (server) (rate({seconds}_sum[$window])) "
                f"/ (sum by (server) (rate({seconds}_count[$window])) > 0)",
            },
            calls=f"sum by (client, server) (rate({prefix}_request_total[$window]))",
        ),
        "istio": Graph(
            series=f"istio_requests_total{istio}",
            service={
                "request_rate": f"sum by ({called}) (rate(istio_requests_total{istio}[$window]))",
                "latency": f"sum by ({called}) (rate({milliseconds}_sum{istio}[$window])) "
                f"/ (sum by ({called}) (rate({milliseconds}_count{istio}[$window])) > 0) / 1000",
            },
            calls=f"sum by ({caller}, {called}) (rate(istio_requests_total{istio}[$window]))",
        ),
    }


Queries = dict[str, str | None]


class PrometheusOptions(Options):
    """What a Prometheus server is asked, and how. In a query, `$window` stands for the time that a sample is
    about; it must give one series for each entity.

    Keys are never given here: FLEETCAST_PROMETHEUS_TOKEN, or FLEETCAST_PROMETHEUS_USERNAME and _PASSWORD, are
    read from the environment of every node.
    """

    back: Seconds = Field(15 * 86_400, ge=1)
    """How far back a night asks for what it does not have [s, or 15d, as long as Prometheus keeps samples by
    default]. What has been pulled once is kept."""
    since: datetime | None = None
    """UTC time before which nothing is asked; if given, instead of `back`."""
    until: datetime | None = None
    """UTC time after which nothing is asked; now if not given."""
    delay: Seconds = Field(120, ge=0)
    """Samples younger than this [s] are left for the next time: some may not have arrived."""
    stretch: Seconds = Field(6 * 3600, ge=1)
    """How much time one raw file holds at most [s, or 6h], rounded up to whole slices."""
    resolution: Seconds | None = Field(None, ge=1)
    """How far apart the samples are that are asked for [s]; must divide the step, which it is if not given.
    Finer ones cost the server as many times more, and give maxima within the bin: of one sample it is the
    sample."""
    window: Seconds = Field(120, ge=1)
    """`$window` in queries is the resolution, or this if it is longer [s]: a rate needs two scrapes at least,
    better four."""
    machine: Queries = Field(default_factory=dict)
    """Metric → PromQL, in place of the default for machines; null leaves the metric out."""
    container: Queries = Field(default_factory=dict)
    """Metric → PromQL, in place of the default for pods."""
    service: Queries = Field(default_factory=dict)
    """Metric → PromQL, in place of what the service graph gives for services."""
    pods: str = PODS
    """PromQL whose series have `namespace`, `pod` and `node`."""
    owners: str = OWNERS
    """PromQL whose series have `namespace`, `pod` and `workload`."""
    graph: Literal["auto", "otel", "istio", "none"] = "auto"
    """Who calls whom: OpenTelemetry's service graph, Istio's, none, or the first that there is."""
    graph_prefix: str = Field("traces_service_graph", pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")
    """How the names of OpenTelemetry's series begin."""
    calls: str | None = None
    """PromQL of calls per second whose series have `source` and `target` (or the labels of a known graph), in
    place of the service graph's."""
    jaeger: str | None = Field(None, pattern=r"^https?://[^@\s]+$")
    """Address of a Jaeger query server, whose dependencies are taken in place of the service graph's. It is
    asked without keys."""
    timeout: float = Field(60, gt=0)
    """How long the server may take for an answer [s]."""
    attempts: int = Field(4, ge=1)
    """How often a request is tried that meets a broken connection, a time-out, 429 or 5xx, with growing
    pauses in between."""
    parallel: int = Field(2, ge=1)
    """How many requests are under way at once."""
    values: int = Field(500_000, ge=1)
    """About how many values one answer may have; longer ones are asked for in pieces of time, as are those of
    more than 11,000 per series, which Prometheus refuses."""

    @field_validator("since", "until")
    @classmethod
    def _utc(cls, time: datetime | None) -> datetime | None:
        if time is None:
            return None
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)

    @field_validator("machine", "container", "service")
    @classmethod
    def _known(cls, queries: Queries) -> Queries:
        for metric in queries:
            if metric not in METRICS:
                raise ValueError(f"unknown metric {metric}, expected some of {', '.join(METRICS)}")
        return queries

    @model_validator(mode="after")
    def _in_order(self) -> PrometheusOptions:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ValueError(f"since ({self.since}) must be before until ({self.until})")
        return self

    def queries(self, kind: str, graph: Graph | None) -> dict[str, str]:
        """Metric → query of a kind of entities."""
        defaults: dict[str, dict[str, str]] = {
            "machine": MACHINE,
            "container": CONTAINER,
            "service": graph.service if graph else {},
        }
        asked = {**defaults[kind], **getattr(self, kind)}
        return {metric: query for metric in METRICS if (query := asked.get(metric)) is not None}


# -- names -------------------------------------------------------------------------------------------------


def name_of(labels: Mapping[str, str], alternatives: Iterable[tuple[str, ...]]) -> str | None:
    """What a series is about, or None if it has none of the labels that say so."""
    for names in alternatives:
        if all(labels.get(name) for name in names):
            # A raw row ends its fields by commas, and has no quotes.
            return "/".join(labels[name] for name in names).translate(_PLAIN)
    return None


_PLAIN = str.maketrans(dict.fromkeys(',"\r\n', "_"))


def full_names(services: Iterable[str]) -> dict[str, str]:
    """Workload → `namespace/workload`, of workloads that only one namespace has: tracing knows services by
    their own names alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for service in sorted(set(services)):
        found[service.rsplit("/", 1)[-1]].append(service)
    return {short: names[0] for short, names in found.items() if len(names) == 1}


# -- raw tables --------------------------------------------------------------------------------------------

_TELEMETRY = {"time": pl.Int64, "entity": pl.String, **dict.fromkeys(METRICS, pl.Float32)}
_SECOND = pl.col("time")


def _since(binning: Binning) -> pl.Expr:
    """Seconds of the trace's clock; times here are Unix."""
    return _SECOND - binning.start


def _usage(kind: str, frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    found = bins(frame, "entity", _since(binning), {metric: metric for metric in METRICS}, binning)
    seen = frame.group_by("entity").agg(_SECOND.max())
    # A service is its own only container of the metrics that only services have.
    service = pl.col("entity") if kind == "service" else pl.lit(None)
    kind = "machine" if kind == "machine" else "container"
    described = entities(
        seen,
        _since(binning),
        entity=pl.col("entity"),
        kind=pl.lit(kind),
        measured=pl.lit(True),
        service=service,
    )
    return {kind: found, "entities": described}


def _placement(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    described = entities(
        frame,
        _since(binning),
        entity=pl.col("entity"),
        kind=pl.lit("container"),
        parent=pl.col("machine"),
        service=pl.col("service"),
    )
    return {"entities": described}


def _calls(frame: pl.DataFrame, binning: Binning) -> dict[str, pl.DataFrame]:
    start = unix(_since(binning), binning, binning.slice).alias("time")
    return {"calls": frame.select(start, "source", "target", "weight").drop_nulls("weight")}


def _telemetry(kind: str) -> Table:
    return Table(
        kind,
        _TELEMETRY,
        missing("time") | missing("entity"),
        negative(*METRICS),
        lambda frame, binning: _usage(kind, frame, binning),
    )


TABLES: dict[str, Table] = {
    **{kind: _telemetry(kind) for kind in LABELS},
    "placement": Table(
        "placement",
        {"time": pl.Int64, "entity": pl.String, "machine": pl.String, "service": pl.String},
        missing("time") | missing("entity"),
        {},
        _placement,
    ),
    "calls": Table(
        "calls",
        {"time": pl.Int64, "source": pl.String, "target": pl.String, "weight": pl.Float32},
        missing("time") | missing("source") | missing("target"),
        negative("weight"),
        _calls,
    ),
}

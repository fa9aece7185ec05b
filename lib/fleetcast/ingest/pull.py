"""From a Prometheus server to raw files, which ingest then reads like any others.

    raw/prometheus/container-20261101T000000-20261101T060000.csv.gz

A file holds the rows of one table from one time to another, and is written whole or not at all. What files
cover is never asked for again, so telemetry outlives the server's retention; what they do not cover is, night
after night, as far back as is wanted. Only bins, and of calls only slices, that are over are asked for.
"""

from __future__ import annotations

import gzip
import logging
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl

from fleetcast.errors import InputError
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.prometheus import Series, Server
from fleetcast.runtime import spread
from fleetcast.store import Store
from fleetcast.traces import prometheus
from fleetcast.traces.prometheus import LABELS, SOURCE, TABLES, TARGET, Graph, full_names, name_of

log = logging.getLogger("fleetcast")

#: Where the raw files are.
FOLDER = "raw/prometheus"
_STAMP = "%Y%m%dT%H%M%S"
_FILE = re.compile(r"/([a-z]+)-(\d{8}T\d{6})-(\d{8}T\d{6})\.csv\.gz$")
_DAY = 86_400


def is_server(source: str) -> bool:
    """Whether a source is asked, not read."""
    return source.startswith(("http://", "https://"))


def pull(store: Store, source: str, options: IngestOptions) -> str:
    """Asks the server for what the raw files do not have yet; returns their folder.

    Raises InputError if the server cannot be reached, refuses a query, or knows nothing that is asked for.
    """
    if options.trace != prometheus.TRACE:
        raise InputError(f"--source {source}: is a server, expected --trace {prometheus.TRACE}")
    asked = options.prometheus
    with Server(source, asked) as server:
        until = server.now() - asked.delay
        if asked.until is not None:
            until = min(until, int(asked.until.timestamp()))
        since = until - asked.back if asked.since is None else int(asked.since.timestamp())
        if since >= until:
            raise InputError(
                f"--prometheus.since {asked.since}: is not over yet by the clock of {source}, expected a "
                f"time before {datetime.fromtimestamp(until, UTC)}"
            )
        graph = _graph(server, since, until, options)
        found = _check(server, until, options, graph)
    tables = [kind for kind in LABELS if asked.queries(kind, _of(graph, options))]
    tables.append("placement")
    if _calls(_of(graph, options), options) or asked.jaeger:
        tables.append("calls")
    items = [
        {"table": table, "first": first, "last": last}
        for table in tables
        for first, last in _missing(store, table, since, until, options)
    ]

    def work(item: dict[str, Any]) -> dict[str, Any]:
        with Server(source, asked) as server:
            return _Pull(server, options, _of(graph, options)).write(store, **item)

    receipts = spread(items, work, "pull: stretches", most=asked.parallel)
    for newest in [receipt for receipt in receipts if receipt.get("edges")][-1:]:
        log.info(
            "pull: of the last stretch's %d pairs of services with calls, %d have an end without pods",
            newest["edges"],
            newest["unknown"],
        )
    if not any(map(_FILE.search, store.list(FOLDER))):
        raise InputError(
            f"--source {source}: has no samples for any query of the last {(until - since) / _DAY:.3g} days "
            f"({', '.join(f'{name}: {count} series' for name, count in found.items())}); expected those of "
            "node-exporter, cAdvisor and kube-state-metrics, or other queries in --prometheus"
        )
    return f"{store.uri}/{FOLDER}"


def _of(name: str | None, options: IngestOptions) -> Graph | None:
    return None if name is None else prometheus.graphs(options.prometheus.graph_prefix)[name]


def _calls(graph: Graph | None, options: IngestOptions) -> str | None:
    return options.prometheus.calls or (graph.calls if graph else None)


def _graph(server: Server, since: int, until: int, options: IngestOptions) -> str | None:
    """The name of the service graph that is taken."""
    wanted, known = options.prometheus.graph, prometheus.graphs(options.prometheus.graph_prefix)
    if wanted != "auto":
        return wanted if wanted in known else None
    for name, graph in known.items():
        if server.has(graph.series, since, until):
            log.info("pull: calls from %s", graph.series)
            return name
    log.info("pull: no service graph (%s)", ", ".join(graph.series for graph in known.values()))
    return None


def _check(server: Server, now: int, options: IngestOptions, graph: str | None) -> dict[str, int]:
    """How many series each query has now: one that the server refuses is known before any work."""
    found = {}
    for kind in LABELS:
        for metric, query in options.prometheus.queries(kind, _of(graph, options)).items():
            found[f"{kind} {metric}"] = server.count(_within(query, _window(options)), now)
    others = {
        "pods": options.prometheus.pods,
        "owners": options.prometheus.owners,
        "calls": _calls(_of(graph, options), options),
    }
    for name, asked in others.items():
        if asked is not None:
            found[name] = server.count(_within(asked, options.slice), now)
    log.info("pull: series now: %s", ", ".join(f"{name} {count}" for name, count in found.items()))
    return found


def _missing(
    store: Store, table: str, since: int, until: int, options: IngestOptions
) -> Iterator[tuple[int, int]]:
    """Stretches of time that a table's files do not cover, on a grid, and cut where it is wanted."""
    width = options.slice if table == "calls" else options.step
    stretch = -(-options.prometheus.stretch // options.slice) * options.slice
    covered = sorted(
        (_seconds(match[2]), _seconds(match[3]))
        for match in map(_FILE.search, store.list(FOLDER))
        if match and match[1] == table
    )
    first, end = -(-since // width) * width, until // width * width
    for begin, stop in [*covered, (end, end)]:
        while first < min(begin, end):
            last = min((first // stretch + 1) * stretch, begin, end)
            yield first, last
            first = last
        first = max(first, stop)


def _seconds(stamp: str) -> int:
    return int(datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).timestamp())


def _stamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime(_STAMP)


def _window(options: IngestOptions) -> int:
    return max(_resolution(options), options.prometheus.window)


def _resolution(options: IngestOptions) -> int:
    return options.prometheus.resolution or options.step


def _within(query: str, seconds: int) -> str:
    return query.replace("$window", f"{seconds}s")


class _Pull:
    """One stretch of one table."""

    def __init__(self, server: Server, options: IngestOptions, graph: Graph | None) -> None:
        self.server = server
        self.options = options
        self.graph = graph
        self.counts: dict[str, int] = {}

    def write(self, store: Store, table: str, first: int, last: int) -> dict[str, Any]:
        """Writes the rows of [first, last), if there are any; returns how many."""
        if table in LABELS:
            rows = self.telemetry(table, first, last)
        else:
            rows = self.placement(first, last) if table == "placement" else self.calls(first, last)
        if len(rows):
            columns = TABLES[table].columns
            text = rows.select(pl.col(name).cast(dtype) for name, dtype in columns.items()).sort(
                list(columns)[:3]
            )
            name = f"{FOLDER}/{table}-{_stamp(first)}-{_stamp(last)}.csv.gz"
            with store.write(name) as file:
                # Without a time in its header: the same rows are the same file.
                with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                    packed.write(text.write_csv(include_header=False, quote_style="never").encode())
        return {"rows": len(rows), **self.counts}

    def telemetry(self, kind: str, first: int, last: int) -> pl.DataFrame:
        """`time`, `entity`, metrics: a sample is about the time before it, and is stamped with its start."""
        every = _resolution(self.options)
        names = full_names(self.services(first, last)) if kind == "service" else {}
        rows = pl.DataFrame(schema=_KEY)
        for metric, query in self.options.prometheus.queries(kind, self.graph).items():
            asked = _within(query, _window(self.options))
            pieces = self.server.query_range(asked, first + every, last, every)
            found = pl.concat(_frame(f"{kind}.{metric}", piece, LABELS[kind], metric) for piece in pieces)
            found = found.with_columns(pl.col("time") - every, pl.col("entity").replace(names))
            rows = rows.join(found, on=list(_KEY), how="full", coalesce=True)
        others = [metric for metric in prometheus.METRICS if metric not in rows.columns]
        return rows.with_columns(pl.lit(None, pl.Float64).alias(metric) for metric in others)

    def placement(self, first: int, last: int) -> pl.DataFrame:
        """`time`, `entity`, `machine`, `service` of every pod that there was in the stretch."""
        pods = self.server.query(_within(self.options.prometheus.pods, last - first), last)
        nodes = [(name_of(pod.labels, LABELS["container"]), pod.labels.get("node")) for pod in pods]
        owners = self.owners(first, last)
        rows = _names(nodes, "machine").join(
            _names(owners, "service"), on="entity", how="full", coalesce=True
        )
        return rows.drop_nulls("entity").with_columns(time=pl.lit(last - _resolution(self.options)))

    def owners(self, first: int, last: int) -> list[tuple[str | None, str | None]]:
        """Every pod of the stretch that belongs to a service, and which."""
        pods = self.server.query(_within(self.options.prometheus.owners, last - first), last)
        return [
            (name_of(pod.labels, LABELS["container"]), name_of(pod.labels, LABELS["service"])) for pod in pods
        ]

    def services(self, first: int, last: int) -> list[str]:
        """Every service that has pods in the stretch."""
        return [service for _, service in self.owners(first, last) if service]

    def calls(self, first: int, last: int) -> pl.DataFrame:
        """`time`, `source`, `target`, `weight` in calls per second, of every slice."""
        width = self.options.slice
        services = self.services(first, last)
        names = full_names(services)
        rows: list[tuple[int, str, str, float]] = []
        if self.options.prometheus.jaeger:
            with Server(self.options.prometheus.jaeger, self.options.prometheus, keys=False) as jaeger:
                for begin in range(first, last, width):
                    edges = jaeger.dependencies(begin, begin + width)
                    rows += [(begin, parent, child, count / width) for parent, child, count in edges]
        elif query := _calls(self.graph, self.options):
            for piece in self.server.query_range(_within(query, width), first + width, last, width):
                for labels, times, values in piece:
                    source, target = name_of(labels, SOURCE), name_of(labels, TARGET)
                    if not (source and target):
                        raise InputError(f"--prometheus.calls: {labels} does not say who calls whom")
                    rows += [
                        (at - width, source, target, value)
                        for at, value in zip(times, values, strict=True)
                        if value
                    ]
        schema = {"time": pl.Int64, "source": pl.String, "target": pl.String, "weight": pl.Float64}
        frame = pl.DataFrame(rows, schema, orient="row").with_columns(
            pl.col("source", "target").replace(names)
        )
        ends = frame.unique(["source", "target"]).select(pl.col("source", "target").is_in(services))
        self.counts = {
            "edges": len(ends),
            "unknown": len(ends) - ends.select(pl.all_horizontal("*").sum()).item(),
        }
        return frame


_KEY = {"time": pl.Int64, "entity": pl.String}


def _names(pairs: list[tuple[str | None, str | None]], what: str) -> pl.DataFrame:
    return pl.DataFrame(pairs, {"entity": pl.String, what: pl.String}, orient="row").unique()


def _frame(
    option: str, found: list[Series], alternatives: Iterable[tuple[str, ...]], metric: str
) -> pl.DataFrame:
    """Series → `time`, `entity`, the metric. Raises InputError if one is about nothing, or two about one."""
    about: dict[str, Series] = {}
    for series in found:
        name = name_of(series.labels, alternatives)
        if name is None:
            wanted = " or ".join(", ".join(labels) for labels in alternatives)
            raise InputError(
                f"--prometheus.{option}: a series has the labels {series.labels}, expected {wanted}"
            )
        if name in about:
            raise InputError(
                f"--prometheus.{option}: {about[name].labels} and {series.labels} are both about {name}, "
                "expected one series for each entity; add them up with sum by (…)"
            )
        about[name] = series
    lengths = [len(series.times) for series in about.values()]
    return pl.DataFrame(
        {
            "time": np.concatenate([np.empty(0, np.int64), *(series.times for series in about.values())]),
            "entity": pl.Series(list(about), dtype=pl.String).gather(
                np.repeat(np.arange(len(about)), lengths)
            ),
            metric: np.concatenate([np.empty(0), *(series.values for series in about.values())]),
        },
    )

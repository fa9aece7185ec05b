"""Figures of raw microservice traces, counted by DuckDB straight from the csv files: an independent opinion
on what fleetcast reads, or writes, that shares no code with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

#: How each trace names what it does not know.
_NOBODY = "('(?)', 'UNKNOWN', 'USER', 'UNAVAILABLE')"


@dataclass(frozen=True)
class Columns:
    """What the tables and columns of a trace are called."""

    log: str
    call: str
    usage: str
    cpu: str
    nodes: str
    rates: str
    requests: str
    """The requests that a row of the rates says a container receives, summed over its rows of a stamp."""


COLUMNS = {
    "microservices-v2021": Columns(
        log="MSCallGraph",
        call="rpcid",
        usage="MSResource",
        cpu="instance_cpu_usage",
        nodes="Node",
        rates="MSRTQps",
        requests="if(metric IN ('HTTP_MCR', 'providerRPC_MCR', 'consumerMQ_MCR'), value, 0)",
    ),
    "microservices-v2022": Columns(
        log="CallGraph",
        call="rpc_id",
        usage="MSMetrics",
        cpu="cpu_utilization",
        nodes="NodeMetrics",
        rates="MSRTMCR",
        requests="coalesce(http_mcr, 0) + coalesce(providerrpc_mcr, 0) + coalesce(consumermq_mcr, 0)",
    ),
}

Key = tuple[int, str, str]


class RawCounts:
    """The files of a trace in a folder, as csv or csv.gz. Times are seconds of the trace's own clock."""

    def __init__(self, folder: Path, trace: str) -> None:
        self.folder = folder
        self.columns = COLUMNS[trace]
        self.database = duckdb.connect()

    def _table(self, name: str) -> str:
        # Neither "Node" nor "CallGraph" must match the files of another table.
        return f"read_csv('{self.folder}/{name}_*.csv*', header = true, quote = '', sample_size = -1)"

    def _rows(self, query: str) -> list[tuple[object, ...]]:
        return self.database.execute(query).fetchall()

    def rows(self) -> dict[str, int]:
        """Table → rows of all its files, headers aside."""
        c = self.columns
        return {
            name: self._rows(f"SELECT count(*) FROM {self._table(name)}")[0][0]
            for name in (c.log, c.usage, c.nodes, c.rates)
        }

    def entities(self) -> dict[str, int]:
        """How many machines, containers and services there is telemetry of."""
        c = self.columns
        usage = f"SELECT count(DISTINCT msinstanceid), count(DISTINCT msname) FROM {self._table(c.usage)}"
        ((containers, services),) = self._rows(usage)
        ((machines,),) = self._rows(f"SELECT count(DISTINCT nodeid) FROM {self._table(c.nodes)}")
        return {"machine": machines, "container": containers, "service": services}

    def calls(self, slice: int) -> dict[Key, int]:
        """(start of a slice, caller, callee) → distinct calls of which a line names both ends.

        A call is told by its trace, its id and its ends, and happened at the earliest of its lines; calls
        within a service do not count.
        """
        return {
            (start, caller, callee): number
            for start, caller, callee, number in self._rows(
                f"""
                SELECT CAST(time // 1000 // {slice} * {slice} AS BIGINT), um, dm, count(*)
                FROM (
                    SELECT traceid, {self.columns.call}, um, dm, min(timestamp) AS time
                    FROM {self._table(self.columns.log)}
                    WHERE um <> dm AND um NOT IN {_NOBODY} AND dm NOT IN {_NOBODY} AND um <> ''
                    GROUP BY ALL
                )
                GROUP BY ALL
                """
            )
        }

    def cpu(self, step: int) -> dict[tuple[int, str], float]:
        """(start of a bin, service) → mean cpu over the means of its containers."""
        c = self.columns
        return self._of_service(c.usage, c.cpu, "avg", step)

    def requests(self, step: int) -> dict[tuple[int, str], float]:
        """(start of a bin, service) → requests that its containers receive together, in the trace's unit."""
        c = self.columns
        return self._of_service(c.rates, c.requests, "sum", step)

    def _of_service(self, table: str, value: str, over: str, step: int) -> dict[tuple[int, str], float]:
        rows = self._rows(
            f"""
            WITH stamps AS (
                SELECT timestamp, msname, msinstanceid, sum({value}) AS value
                FROM {self._table(table)} GROUP BY ALL
            ), containers AS (
                SELECT CAST(timestamp // 1000 // {step} * {step} AS BIGINT) AS bin, msname, msinstanceid,
                    avg(value) AS value
                FROM stamps GROUP BY ALL
            )
            SELECT bin, msname, {over}(value) FROM containers GROUP BY ALL
            """
        )
        return {(start, service): value for start, service, value in rows}

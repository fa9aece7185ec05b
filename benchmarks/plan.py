"""How long a whole trace takes on how many nodes, what it costs, what saturates first: arithmetic on rates.

    python -m benchmarks.plan
    python -m benchmarks.plan --nodes 4 --nodes 32 --price 0.9

Sizes are the publishers'. The rates of one core are those that `make bench-scale` measured on the machine of
docs/scale.md (tables of calls have none yet: theirs is an estimate); give others as `--rates.index`, … The
plan counts ingest, which is nearly all of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleetcast.config import Options
from pydantic import Field

from benchmarks.report import BenchConfig, run, table


class Rates(Options):
    """Of one core [MB of csv a second], and what else was measured."""

    gunzip: float = Field(670, gt=0)
    """Decompressing an archive, whole or by its index, without looking at the rows."""
    index: float = Field(690, gt=0)
    """Building the index of an archive, one thread: serial for each archive."""
    reduce: float = Field(0.5, ge=0)
    """Merging parts and deriving dependencies, as a share of the time of reading."""
    overhead: float = Field(1.1, ge=1)
    """Ray Data over the bare tasks, where none was measured, and the end of a stage, when cores idle."""


class PlanOptions(Options):
    """The cluster."""

    nodes: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of nodes."""
    cores: int = Field(16, ge=1)
    """Cores of a node, as the price list counts them."""
    price: float = Field(0.8064, ge=0)
    """Of a node and hour [US$]; m7i.4xlarge on demand in us-west-2. Spot is about 40 % of it."""
    put_price: float = Field(5e-6, ge=0)
    """Of an object written [US$]."""
    get_price: float = Field(4e-7, ge=0)
    """Of a range read [US$]."""
    network: float = Field(600, gt=0)
    """What a node reads from S3 in the long run [MB/s]."""
    gets: float = Field(5_500, gt=0)
    """Ranges that S3 gives a second below one prefix."""
    rates: Rates = Rates()
    """Of one core."""


class Config(PlanOptions, BenchConfig):
    __doc__ = __doc__


@dataclass(frozen=True)
class Table:
    """One table of a trace."""

    name: str
    packed_gb: float
    """As it is published."""
    csv_gb: float
    """Decompressed."""
    archives: int
    """Files that it comes in; one that is all of its table is split by an index."""
    parse: float
    """What one core parses and bins of it [MB of csv a second]."""


@dataclass(frozen=True)
class Trace:
    """A published trace."""

    name: str
    days: int
    """That a chunk has rows of."""
    tables: tuple[Table, ...]


#: Rows × bytes a row of our own synthesis where only the sum is published (280 GB in all).
ALIBABA_2018 = Trace(
    "cluster-trace-v2018",
    8,
    (
        Table("machine_usage", 1.7, 9, 1, 101),
        Table("container_usage", 28, 152, 1, 37),
        Table("batch_task", 0.125, 0.765, 1, 27),
        Table("batch_instance", 20, 118, 1, 66),
    ),
)
#: Of a table that was not measured: as slow as the usual ones are [MB/s].
_ESTIMATE = 40
#: Per hour: 4 GiB in 20 files, 3 GiB in 20, 700 MiB in 2; 312 hours. Of csv five times as much: a guess.
MICROSERVICES_2022 = Trace(
    "cluster-trace-microservices-v2022",
    1,
    (
        Table("CallGraph", 1_340, 6_700, 6_240, _ESTIMATE),
        Table("MSRTMCR", 1_005, 5_025, 6_240, _ESTIMATE),
        Table("MSMetrics", 229, 1_145, 624, _ESTIMATE),
        Table("NodeMetrics", 3.4, 17, 26, _ESTIMATE),
    ),
)
_CHUNK_MB, _BUCKET_GB, _MOST_BUCKETS = 128, 5, 100
#: Files that a chunk writes: parts of two products and a receipt. Requests for a row group of one: its size,
#: its footer, where that is, the group's head and its columns.
_FILES, _REQUESTS = 3, 5


def main(config: Config) -> None:
    """Prints a table for each trace."""
    for trace in (ALIBABA_2018, MICROSERVICES_2022):
        plan(config, trace)


def plan(config: Config, trace: Trace) -> None:
    """Prints hours, cost and the first limit for each number of nodes."""
    rates = config.rates
    read = sum(1e3 * t.csv_gb / t.parse for t in trace.tables)
    unpacked = sum(1e3 * t.csv_gb / rates.gunzip for t in trace.tables)
    longest = max(1e3 * t.csv_gb / t.archives / rates.index for t in trace.tables)
    indexed = sum(1e3 * t.csv_gb / rates.index for t in trace.tables if t.archives == 1)
    core_seconds = (read + unpacked) * (1 + rates.reduce) * rates.overhead + indexed
    packed = sum(t.packed_gb for t in trace.tables)
    csv = sum(t.csv_gb for t in trace.tables)
    buckets = max(1, min(_MOST_BUCKETS, round(csv / _BUCKET_GB)))
    chunks = sum(1e3 * t.csv_gb / _CHUNK_MB if t.archives == 1 else t.archives for t in trace.tables)
    objects = _FILES * chunks
    requests = _REQUESTS * chunks * trace.days * buckets
    rows = []
    for nodes in config.nodes:
        serial, parallel = longest if indexed else 0, (core_seconds - indexed) / (nodes * config.cores)
        limits = {
            "cores" if parallel > serial else "index of the longest archive": serial + parallel,
            "network of the nodes": 1e3 * packed * (2 if indexed else 1) / (nodes * config.network),
            "ranges of parts that S3 gives": requests / config.gets,
        }
        what, seconds = max(limits.items(), key=lambda item: item[1])
        asked = objects * config.put_price + requests * config.get_price
        cost = nodes * config.price * seconds / 3600 + asked
        rows.append([str(nodes), str(nodes * config.cores), f"{seconds / 3600:.2f}", f"{cost:,.0f} $", what])
    table(
        f"{trace.name}: {packed:,.0f} GB packed, {csv:,.0f} GB of csv",
        ["nodes", "cores", "hours", "cost", "limit"],
        rows,
        f"{core_seconds / 3600:,.0f} core hours; {longest / 60:,.0f} min to index the longest archive on one "
        f"core; {buckets} buckets, {objects:,.0f} files of parts and receipts, at most {requests:,.0f} "
        "requests for parts.",
    )


if __name__ == "__main__":
    run(main, Config)

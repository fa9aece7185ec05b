"""A night over a store of many days asks for what is new, and leaves what a store made at once would have."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import recorded
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.store import Store
from fleetcast.windows.manifest import ShardOptions

MACHINES, HOUR, DAY = 3, 3600, 86_400
INGEST = IngestOptions(step=HOUR, slice=HOUR)
SPAN_DAYS = 6
WINDOWS = ShardOptions(
    metrics=("cpu", "memory"),
    step=HOUR,
    history=4 * HOUR,
    horizon=2 * HOUR,
    lags=(DAY,),
    group_size=2,
    span=SPAN_DAYS * DAY,
)
_numbers = itertools.count()


def rows_of(day: int) -> dict[str, list[str]]:
    """A sample an hour of each machine and of a container that moves; a job that joins two machines."""
    random = np.random.default_rng(day)
    tables: dict[str, list[str]] = {
        name: []
        for name in ("machine_usage", "container_usage", "container_meta", "batch_task", "batch_instance")
    }
    for at in range(day * DAY, (day + 1) * DAY, HOUR):
        for machine in range(MACHINES):
            cpu, memory = random.uniform(0, 100, 2).round(1)
            tables["machine_usage"].append(f"m_{machine},{at},{cpu},{memory},,,,,")
        tables["container_usage"].append(f"c_0,m_0,{at},{random.integers(100)},50,,,,,,")
        for task, machine in (("M1", "m_0"), ("R2_1", "m_1")):
            tables["batch_task"].append(f"{task},9,j_{at},1,Terminated,{at + 5},{at + 60},100,1")
            tables["batch_instance"].append(
                f"i,{task},j_{at},1,Terminated,{at + 5},{at + 60},{machine},1,1,,,,"
            )
    for container, machine in (("c_0", day % MACHINES), ("c_1", (day + 1) % MACHINES)):
        tables["container_meta"].append(f"{container},m_{machine},{day * DAY + 60},web,started,1,1,1")
    return tables


class Cluster:
    """Raw files of one day after the other, and a store that takes them in."""

    def __init__(self) -> None:
        self.place = f"recorded://{next(_numbers)}"
        self.raw, self.days = Store(f"{self.place}/raw"), 0
        self.store = Store(f"{self.place}/store")

    def pass_days(self, count: int) -> Cluster:
        """More days become raw files, one for each table."""
        for day in range(self.days, self.days + count):
            for table, rows in rows_of(day).items():
                with self.raw.write(f"{table}-{day:03d}.csv") as file:
                    file.write("".join(f"{row}\n" for row in rows).encode())
        self.days += count
        return self

    def night(self, store: Store | None = None) -> dict[str, Any]:
        """Ingest and shard; `recorded.requests` are those of this night alone. Returns ingest's figures."""
        recorded.requests.clear()
        figures = ingest(store or self.store, self.raw.uri, INGEST)
        shard(store or self.store, WINDOWS)
        return figures

    def read(self) -> set[str]:
        """What the last night has read: `raw/…` and `store/…`."""
        return {re.sub(r"^(recorded:/*)?/?\d+/", "", path) for path in recorded.read()}

    def shares_read(self) -> set[tuple[str, str]]:
        """The product, and the raw file that it came of, of the parts that the last night has read."""
        state = self.store.read_json("ingested/manifest.json")
        names = {file["key"]: file["uri"].rsplit("/", 1)[-1] for file in state["files"]}
        raw = {f"store/{part}": names[key] for key, read in state["read"].items() for part in read["parts"]}
        return {(path.split("/")[3], raw[path]) for path in self.read() if part(path)}


def contents(store: Store) -> dict[str, bytes]:
    """Every file that others read: telemetry, entities, dependencies, windows and their manifests."""
    return {path: store.read_bytes(path) for path in store.list("") if not path.startswith("ingested/")}


def date(day: int) -> str:
    """The folder of the days' files."""
    return f"date={np.datetime64('2018-01-01') + day}"


def part(path: str) -> bool:
    """Whether a file is some raw file's share of a product."""
    return path.startswith("store/ingested/parts/")


@pytest.fixture
def cluster(tasks) -> Cluster:
    """A store of 12 days, the last of which came as one more night."""
    cluster = Cluster().pass_days(11)
    cluster.night()
    cluster.pass_days(1).night()
    return cluster


def test_a_night_opens_no_raw_file_again(cluster):
    opened = {path for path in cluster.read() if path.startswith("raw/")}
    assert opened == {f"raw/{table}-011.csv" for table in rows_of(0)}


def test_a_night_reads_the_parts_of_the_days_that_it_adds_to(cluster):
    """A job may run past midnight, so of the day before its jobs are read too."""
    new, before = "-011.csv", "-010.csv"
    assert cluster.shares_read() == {
        ("machine", f"machine_usage{new}"),
        ("container", f"container_usage{new}"),
        ("hosted", f"container_meta{new}"),
        *(("tasks", f"batch_task{day}") for day in (before, new)),
        *(("instances", f"batch_instance{day}") for day in (before, new)),
        *(("entities", f"{table}{new}") for table in ("machine_usage", "container_usage", "container_meta")),
    }


def test_a_raw_file_leaves_as_many_files_as_it_has_products_however_many_days_it_is_of(tasks):
    """So what a row costs does not grow with the length of the trace."""
    cluster = Cluster().pass_days(9)
    with cluster.raw.write("machine_usage-all.csv") as file:
        file.write("".join(f"m_7,{day * DAY},50,50,,,,,\n" for day in range(9)).encode())
    cluster.night()
    state = cluster.store.read_json("ingested/manifest.json")
    key = next(file["key"] for file in state["files"] if file["uri"].endswith("-all.csv"))
    assert sorted(path.split("/")[2] for path in state["read"][key]["parts"]) == ["entities", "machine"]
    days = {str(np.datetime64("2018-01-01") + day) for day in range(9)}
    assert {place.split("/")[1] for place in state["read"][key]["places"]} == days | {"all"}


def test_a_night_reads_one_receipt_of_everything_that_was_there(cluster):
    state = {path for path in cluster.read() if path.startswith("store/ingested/") and not part(path)}
    known = {re.sub("[0-9a-f]{16}", "…", path) for path in state if "/chunks/" not in path}
    assert known == {
        "store/ingested/manifest.json",
        "store/ingested/entities/….arrow",
        "store/ingested/outputs/telemetry.json",
        "store/ingested/outputs/entities.json",
        "store/ingested/outputs/dependencies.json",
        "store/ingested/placements.json",
        f"store/ingested/placements/{date(10)}.parquet",
        f"store/ingested/placements/{date(11)}.parquet",
    }
    assert len([path for path in state if "/chunks/" in path]) == 5, "whether a new file was read before"


def test_windows_of_a_span_are_made_of_its_days(cluster):
    """And of the edges of the slices that had ended when it began."""
    read = {path for path in cluster.read() if re.match("store/(telemetry|dependencies)/date", path)}
    days = {(path.split("/")[1], path.split("/")[2]) for path in read}
    span = range(12 - SPAN_DAYS, 12)
    assert days == {
        *(("telemetry", date(day)) for day in span),
        *(("dependencies", date(day)) for day in (span[0] - 1, *span)),
    }


def test_day_after_day_gives_what_all_days_at_once_give_to_the_bit(cluster):
    at_once = Store(f"{cluster.place}/at-once")
    cluster.night(at_once)
    ours, theirs = contents(cluster.store), contents(at_once)
    assert sorted(ours) == sorted(theirs)
    assert [path for path in ours if ours[path] != theirs[path]] == []


def test_what_is_asked_of_the_store_does_not_grow_with_its_days(tasks):
    asked = {}
    for days in (10, 40):
        cluster = Cluster().pass_days(days)
        cluster.night()
        cluster.pass_days(1).night()
        asked[days] = len(recorded.requests)
    assert asked[40] == asked[10]


@pytest.mark.slow
def test_a_year_asks_for_no_more_than_a_fortnight(tasks):
    asked = {}
    for days in (14, 364):
        cluster = Cluster().pass_days(days)
        cluster.night()
        cluster.pass_days(1).night()
        asked[days] = len(recorded.requests)
    assert asked[364] == asked[14]


def test_a_file_that_is_gone_stays_and_one_that_is_replaced_takes_its_rows_along(cluster):
    """The first is not asked for any more; the second is found by what the listing says of it."""
    cluster.raw.remove("machine_usage-002.csv")
    with cluster.raw.write("machine_usage-005.csv") as file:
        file.write(b"m_0,432000,50,50,,,,,\n")
    figures = cluster.night()
    assert figures["rows_read"]["machine_usage"] == 11 * 24 * MACHINES + 1
    machines = {raw for product, raw in cluster.shares_read() if product == "machine"}
    assert machines == {"machine_usage-005.csv"}

    fresh = Cluster().pass_days(12)
    with fresh.raw.write("machine_usage-005.csv") as file:
        file.write(b"m_0,432000,50,50,,,,,\n")
    fresh.night()
    for folder in ("telemetry", "dependencies", "entities"):
        ours, theirs = contents(cluster.store), contents(fresh.store)
        tables = [path for path in ours if path.startswith(folder) and path.endswith(".parquet")]
        assert tables == [path for path in theirs if path.startswith(folder) and path.endswith(".parquet")]
        assert [path for path in tables if ours[path] != theirs[path]] == []
    assert len(cluster.store.list("ingested/parts")) == len(fresh.store.list("ingested/parts"))


def test_what_a_run_that_never_ended_has_left_does_not_count(tasks):
    """It died over a file that is another by now."""
    cluster = Cluster().pass_days(3)
    with cluster.raw.write("machine_usage-003.csv") as file:
        file.write(b"m_9,1000,50,50,,,,,\n")
    tasks.dies_after = 16
    with pytest.raises(KeyboardInterrupt):
        cluster.night()
    tasks.dies_after = None
    cluster.pass_days(9).night()

    fresh = Cluster().pass_days(12)
    fresh.night()
    assert contents(cluster.store) == contents(fresh.store)
    assert cluster.store.list("ingested") == [
        path.replace(fresh.place, cluster.place) for path in fresh.store.list("ingested")
    ]


def test_new_rows_of_old_days_reach_the_days_that_they_matter_to(cluster):
    """A container that is said to have moved on the fifth day is elsewhere until the sixth."""
    with cluster.raw.write("container_meta-late.csv") as file:
        file.write(f"c_0,m_2,{4 * DAY + 7 * HOUR},web,started,1,1,1\n".encode())
    cluster.night()
    at_once = Store(f"{cluster.place}/at-once")
    written = {path for name, path in recorded.requests if name == "put_file" and "/dependencies/" in path}
    assert {path.split("/")[-2] for path in written if "/store/dependencies/" in path} == {date(4), date(5)}
    cluster.night(at_once)
    assert contents(cluster.store) == contents(at_once)

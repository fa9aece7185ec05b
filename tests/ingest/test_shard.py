"""The shard job: telemetry and dependencies → a windows dataset, every entity exactly once."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.ingest.shards import shard
from fleetcast.store import MANIFEST, Store
from fleetcast.windows import manifest
from fleetcast.windows.manifest import Manifest, ShardOptions

DAYS, STEP = 4, 1800
ZERO = int(datetime(2018, 1, 1, tzinfo=UTC).timestamp())
SMALL: dict[str, Any] = {
    "metrics": ("cpu", "memory_max"),
    "step": STEP,
    "history": 4 * STEP,
    "horizon": 2 * STEP,
    "lags": (86_400,),
}
#: The pairs of machines that jobs join.
PAIRS = [("m_0", "m_3"), ("m_1", "m_4"), ("m_2", "m_5")]


def trace() -> dict[str, bytes]:
    """Six machines, a sample every 10 minutes, jobs that join them in pairs, containers of two services."""
    rng = np.random.default_rng(0)
    tables: dict[str, list[str]] = {
        name: [] for name in ("machine_usage", "container_usage", "container_meta")
    }
    tables |= {"batch_task": [], "batch_instance": []}
    for stamp in range(0, DAYS * 86_400, 600):
        for machine in range(6):
            cpu, memory = rng.uniform(0, 100, 2).round(1)
            tables["machine_usage"].append(f"m_{machine},{stamp},{cpu},{memory},,,,,")
        for container in range(3):
            cpu, memory = rng.uniform(0, 100, 2).round(1)
            tables["container_usage"].append(f"c_{container},m_0,{stamp},{cpu},{memory},,,,,,")
    for container, service in enumerate(("web", "web", "db")):
        tables["container_meta"].append(f"c_{container},m_{container},0,{service},started,1,1,1")
    for number, (source, target) in enumerate(PAIRS):
        for hour in range(1, DAYS * 24):
            job, at = f"j_{number}_{hour}", hour * 3600 + 5
            for task, machine in (("M1", source), ("R2_1", target)):
                tables["batch_task"].append(f"{task},9,{job},1,Terminated,{at},{at + 60},100,1")
                instance = f"i,{task},{job},1,Terminated,{at},{at + 60},{machine},1,1,,,,"
                tables["batch_instance"] += [instance] * 9
    return {name: "\n".join(rows).encode() for name, rows in tables.items()}


@pytest.fixture
def store(tmp_path, put, ingested) -> Store:
    for name, rows in trace().items():
        put(tmp_path / "raw" / f"{name}.csv", rows)
    return ingested(tmp_path / "raw", tmp_path / "store", step="10min")[0]


def dataset(store: Store, **options: Any) -> tuple[Manifest, dict[str, Any]]:
    figures = shard(store, ShardOptions(**SMALL | options))
    return manifest.load(store, options.get("windows", "default")), figures


def values(store: Store, made: Manifest) -> pl.DataFrame:
    """All stored values, each once though the shards' halos overlap."""
    frames: Any = [pl.from_arrow(store.read_table(part.path)) for part in made.shards]
    frame = pl.concat([frame.with_columns(pl.col("entity").cast(pl.String)) for frame in frames])
    return frame.unique().sort("entity", "time")


def usage(table: str, unit: dict[str, str] | None = None) -> pl.DataFrame:
    """Mean cpu and maximal memory of each unit and step, straight from the raw rows."""
    rows = [line.split(",") for line in trace()[table].decode().split("\n")]
    at = 2 if table == "container_usage" else 1
    frame = pl.DataFrame(
        {
            "entity": [row[0] if unit is None else unit[row[0]] for row in rows],
            "time": [(ZERO + int(row[at]) // STEP * STEP) * 1000 for row in rows],
            "cpu": [float(row[at + 1]) / 100 for row in rows],
            "memory_max": [float(row[at + 2]) / 100 for row in rows],
        },
        schema_overrides={"time": pl.Datetime("ms", "UTC")},
    )
    grouped = frame.group_by("entity", "time").agg(pl.col("cpu").mean(), pl.col("memory_max").max())
    return grouped.sort("entity", "time")


def agree(found: pl.DataFrame, expected: pl.DataFrame) -> bool:
    return found.select("entity", "time").equals(expected.select("entity", "time")) and all(
        np.allclose(found[metric], expected[metric], rtol=1e-6) for metric in SMALL["metrics"]
    )


def test_machines_become_a_dense_dataset_of_the_wanted_step(store):
    made, figures = dataset(store)
    assert agree(values(store, made), usage("machine_usage"))
    assert (made.start, made.step, made.steps) == (ZERO, STEP, DAYS * 48)
    assert (made.history, made.horizon, made.lags) == (4, 2, (48,))
    assert made.groups == (tuple(f"m_{i}" for i in range(6)),)
    assert made.observed == (1, 1)
    assert figures["entities"] == 6
    assert figures["windows"] == {part: made.windows(part) for part in ("train", "val", "test")}
    assert not figures["skipped"]
    train = usage("machine_usage").filter(
        pl.col("time").dt.epoch("s") < made.start + made.step * made.boundaries[0]
    )
    assert made.scaler.mean == pytest.approx([train["cpu"].mean(), train["memory_max"].mean()], rel=1e-5)
    assert made.scaler.std == pytest.approx(
        [train["cpu"].std(ddof=0), train["memory_max"].std(ddof=0)], rel=1e-5
    )


def test_a_last_step_that_is_not_over_is_left_out(store, tmp_path, ingested):
    """The last sample is of 23:50; in bins of 5 minutes nothing is known of 23:55."""
    finer, _ = ingested(tmp_path / "raw", tmp_path / "finer", step="5min")
    assert dataset(finer)[0].steps == dataset(store)[0].steps - 1


@pytest.mark.parametrize(
    ("level", "unit"),
    [("container", None), ("service", {"c_0": "web", "c_1": "web", "c_2": "db"})],
)
def test_containers_are_forecast_alone_or_as_the_mean_and_maximum_of_their_service(store, level, unit):
    made, _ = dataset(store, level=level)
    assert made.level == level
    assert agree(values(store, made), usage("container_usage", unit))


def test_groups_are_cut_along_the_graph_and_hold_every_entity_once(store):
    whole, _ = dataset(store, windows="whole")
    made, figures = dataset(store, windows="cut", group_size=2)
    assert made.groups == tuple(PAIRS)
    assert figures["groups"] == 3
    assert values(store, made).equals(values(store, whole))
    assert made.scaler.mean == pytest.approx(whole.scaler.mean)
    assert made.scaler.std == pytest.approx(whole.scaler.std)
    for part in made.shards:
        assert part.last - part.first == whole.shards[0].last - whole.shards[0].first
        edges: Any = pl.from_arrow(store.read_table(part.edges))
        batch = edges.filter(pl.col("time").dt.epoch("s") >= ZERO + 3600)
        assert set(batch.select("source", "target").rows()) >= {(0, 1)}


def test_a_group_size_that_parts_pairs_still_holds_every_entity_once(store):
    made, _ = dataset(store, group_size=1)
    assert sorted(name for group in made.groups for name in group) == [f"m_{i}" for i in range(6)]
    assert max(map(len, made.groups)) == 1
    assert agree(values(store, made), usage("machine_usage"))


def test_shards_hold_their_windows_and_every_origin_is_in_one(store):
    options = ShardOptions(**SMALL).model_copy(update={"shard_mb": 0})
    shard(store, options)
    made = manifest.load(store, "default")
    assert len(made.shards) > 2
    origins = [origin for part in made.shards for origin in range(part.start, part.stop)]
    assert origins == list(range(made.steps + 1))
    for part in made.shards:
        assert part.first == max(0, part.start - made.context)
        assert part.last == min(made.steps, part.stop - 1 + made.horizon)
        assert len(store.read_table(part.path)) == (part.last - part.first) * made.entities
    assert agree(values(store, made), usage("machine_usage"))


def test_again_with_the_same_data_and_options_nothing_is_done(store, tasks):
    _, first = dataset(store)
    done, before = tasks.done, store.read_bytes(f"windows/default/{MANIFEST}")
    _, again = dataset(store)
    assert tasks.done == done
    assert again == {name: value for name, value in first.items() if name != "peak_bytes"} | {"skipped": True}
    assert store.read_bytes(f"windows/default/{MANIFEST}") == before
    assert not store.list("_work")


def test_other_options_or_data_replace_the_dataset_whole(store, tmp_path, put, ingested):
    dataset(store)
    made, figures = dataset(store, horizon=4 * STEP)
    assert (made.horizon, figures["skipped"]) == (4, False)
    late = DAYS * 86_400
    put(
        tmp_path / "raw" / "machine_usage-more.csv",
        f"m_9,{late},50,50,,,,,\nm_9,{late + 1800},5,5,,,,,".encode(),
    )
    ingested(tmp_path / "raw", tmp_path / "store", step="10min")
    made, figures = dataset(store, horizon=4 * STEP)
    assert figures["entities"] == 7
    assert not figures["skipped"]
    files = {path.removeprefix("windows/default/") for path in store.list("windows")}
    assert len(files) == 1 + 2 * len(made.shards)


@pytest.mark.parametrize("done", [0, 6, 8, 10])
def test_a_job_that_died_is_run_again_and_gives_the_same(store, tasks, done):
    whole, _ = dataset(store, windows="whole", group_size=2)
    tasks.done, tasks.dies_after = 0, done
    with pytest.raises(KeyboardInterrupt):
        dataset(store, windows="died", group_size=2)
    assert not store.exists("windows/died")
    tasks.done, tasks.dies_after = 0, None
    made, _ = dataset(store, windows="died", group_size=2)
    assert tasks.done == 11 - done  # a file of telemetry and one of dependencies a day, then 3 shards
    assert values(store, made).equals(values(store, whole))
    assert made.scaler == whole.scaler


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"metrics": ("cpu", "gpu")},
            r"--metrics gpu: unknown metric, expected some of cpu, cpu_max, memory",
        ),
        (
            {"metrics": ("cpu", "net_in")},
            r"--metrics net_in: no value in the training part; leave the metric out",
        ),
        (
            {"step": 400, "history": 800, "horizon": 400, "lags": ()},
            r"--step 400: expected a multiple of the telemetry's step of 600 s",
        ),
        ({"history": 300 * STEP}, r"--split 0.6 0.2 0.2: of 192 steps the train part leaves 0 for targets"),
    ],
)
def test_what_the_telemetry_does_not_hold_is_named(store, options, message):
    with pytest.raises(InputError, match=message):
        dataset(store, **options)
    assert not store.exists("windows/default")


def test_a_level_without_telemetry_is_named(tmp_path, put, ingested):
    put(tmp_path / "raw" / "machine_usage.csv", trace()["machine_usage"])
    put(tmp_path / "raw" / "container_meta.csv", trace()["container_meta"])
    store, _ = ingested(tmp_path / "raw", tmp_path / "store")
    with pytest.raises(InputError, match="--level service: the store has no container with telemetry"):
        dataset(store, level="service")


# -- a span -----------------------------------------------------------------------------------------------


def test_a_span_is_the_last_so_many_whole_steps(store):
    whole, _ = dataset(store, windows="whole")
    made, figures = dataset(store, span=2 * 86_400 + STEP - 1)
    assert made.start == ZERO + (DAYS - 2) * 86_400
    assert made.steps == figures["steps"] == 2 * 48
    late = usage("machine_usage").filter(pl.col("time").dt.epoch("s") >= made.start)
    assert agree(values(store, made), late)
    early, _ = dataset(store, windows="all", span=10 * DAYS * 86_400)
    assert (early.start, early.steps, early.scaler) == (whole.start, whole.steps, whole.scaler)


def test_a_window_at_the_start_of_a_span_has_the_edges_that_it_always_has(store):
    whole, _ = dataset(store, windows="whole")
    made, _ = dataset(store, span=2 * 86_400)
    first = made.start - 2 * 3600
    edges: list[Any] = [pl.from_arrow(store.read_table(of.shards[0].edges)) for of in (whole, made)]
    late = [found.filter(pl.col("time").dt.epoch("s") >= first) for found in edges]
    assert late[0].equals(late[1])
    assert (late[1]["time"].dt.epoch("s") < made.start).any()


def test_windows_end_when_they_are_told_to(store):
    whole, _ = dataset(store, windows="whole")
    end = ZERO + (DAYS - 1) * 86_400
    made, _ = dataset(store, until=end)
    assert (made.start, made.start + made.steps * made.step) == (whole.start, end)
    early = usage("machine_usage").filter(pl.col("time").dt.epoch("s") < end)
    assert agree(values(store, made), early)
    last, _ = dataset(store, windows="last", until=end, span=2 * 86_400)
    assert (last.start, last.steps) == (end - 2 * 86_400, 2 * 48)


def test_entities_that_were_gone_before_a_span_are_not_in_it(store, tmp_path, put, ingested):
    put(tmp_path / "raw" / "machine_usage-gone.csv", b"m_9,3600,50,50,,,,,")
    store, _ = ingested(tmp_path / "raw", tmp_path / "store", step="10min")
    assert "m_9" in dataset(store, windows="whole")[0].names
    assert dataset(store, span=2 * 86_400)[0].names == tuple(f"m_{i}" for i in range(6))


def test_without_whole_telemetry_there_is_nothing_to_shard(store, tmp_path):
    store.remove(f"telemetry/{MANIFEST}")
    with pytest.raises(InputError, match=r"telemetry is not complete; run ingest"):
        dataset(store)
    with pytest.raises(InputError, match=r"no store there \(store.json is missing\); run ingest first"):
        dataset(Store(str(Path(tmp_path) / "elsewhere")))


def test_under_ray_the_job_gives_the_same(store, ray_cluster, monkeypatch):
    alone, _ = dataset(store, windows="alone", group_size=2)
    monkeypatch.undo()
    made, _ = dataset(store, windows="ray", group_size=2)
    assert values(store, made).equals(values(store, alone))
    assert made.model_copy(update={"name": "alone"}).scaler == alone.scaler


def test_a_part_of_the_entities_is_always_the_same_and_grows_with_its_number(store):
    found = {}
    for number in (1, 3, 5):
        shard(store, ShardOptions(**SMALL, windows=f"some-{number}", entities=number))
        found[number] = set(manifest.load(store, f"some-{number}").names)
    assert {number: len(names) for number, names in found.items()} == {1: 1, 3: 3, 5: 5}
    assert found[1] < found[3] < found[5] < {f"m_{n}" for n in range(6)}
    shard(store, ShardOptions(**SMALL, windows="again", entities=3))
    assert set(manifest.load(store, "again").names) == found[3]
    with pytest.raises(InputError, match="--entities 7: expected at most the 6 there are"):
        shard(store, ShardOptions(**SMALL, entities=7))


def test_a_file_of_events_that_has_changed_makes_the_windows_anew(store, tmp_path, caplog):
    file = tmp_path / "events.csv"
    file.write_text("name,start,end\nsale,2018-01-02,\n")
    options = ShardOptions(**SMALL, calendar={"events_file": str(file)})
    assert not shard(store, options)["skipped"]
    assert shard(store, options)["skipped"]
    assert manifest.load(store, "default").marks == ("sale",)
    assert "sale" not in caplog.text
    file.write_text("name,start,end\nsale,2018-01-02,\nmatch,2018-01-04T18:00,2018-01-04T20:00\n")
    assert not shard(store, options)["skipped"]
    assert manifest.load(store, "default").marks == ("sale", "match")
    assert "match is not in the training part: no model can know what it does" in caplog.text

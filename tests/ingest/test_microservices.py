"""The microservice traces, raw files to windows, against what DuckDB and csv read of the same files."""

from __future__ import annotations

import csv
import gzip
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.schemas import describe
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.windows import manifest as manifests
from fleetcast.windows.manifest import Manifest, ShardOptions
from fleetcast.windows.views import read_values
from raw_counts import RawCounts

REAL = Path(__file__).parents[3] / "shared" / "data"
TRACES = ("microservices-v2021", "microservices-v2022")
START, STEP, SLICE = 1_514_764_800, 300, 3600
RECEIVED = ("request_rate", "request_rate_http", "request_rate_mq")


def options(trace: str, **others) -> IngestOptions:
    """All edges are kept."""
    return IngestOptions(trace=trace, neighbours=1000, **others)


@pytest.fixture(scope="module", params=TRACES)
def trace(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def raw(trace: str, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A day of 6 services in 18 containers, some of which are renamed."""
    folder = tmp_path_factory.mktemp(trace) / "raw"
    few = {"machines": 6, "services": 6, "containers": 18, "days": 1, "requests": 40}
    made = SynthesizeOptions(trace=trace, seed=7, churn=0.5, file_span="12h", **few)
    synthesize(made, Store(str(folder)))
    return folder


@pytest.fixture(scope="module")
def counted(raw: Path, trace: str) -> RawCounts:
    return RawCounts(raw, trace)


@pytest.fixture(scope="module")
def night(raw: Path, trace: str) -> tuple[Store, dict]:
    """The store, and ingest's figures."""
    store = Store(str(raw.parent / "store"))
    return store, ingest(store, str(raw), options(trace))


def windows(store: Store, level: str, metrics: tuple[str, ...], step: int = STEP) -> Manifest:
    given = {"history": 4 * step, "horizon": 2 * step, "lags": (), "windows": f"{level}-{step}"}
    shard(store, ShardOptions(level=level, metrics=metrics, step=step, **given))
    return manifests.load(store, f"{level}-{step}")


def values(store: Store, data: Manifest) -> np.ndarray:
    """[T, N, F] of a dataset of one group."""
    shards = sorted(data.shards, key=lambda part: part.start)
    return np.concatenate([read_values(store, data, p)[p.start - p.first : p.stop - p.first] for p in shards])


def edges(store: Store) -> dict[tuple[int, str, str], float]:
    """(start of the slice on the trace's clock, caller, callee) → weight."""
    tables = [
        store.read_table(path) for path in store.list("dependencies") if path.endswith("service.parquet")
    ]
    rows = pl.concat([pl.from_arrow(table) for table in tables]).select("time", "source", "target", "weight")
    return {(int(time.timestamp()) - START, a, b): weight for time, a, b, weight in rows.iter_rows()}


def test_every_row_and_entity_is_counted(night, counted):
    store, figures = night
    assert figures["rows_read"] == counted.rows()
    assert figures["rows_rejected"] == {}
    entities = pl.from_arrow(store.read_table("entities/entities.parquet")).filter("measured")
    assert dict(entities["kind"].value_counts().iter_rows()) == counted.entities()


def test_a_slice_has_as_many_calls_of_a_pair_as_are_told_apart_in_the_log(night, counted):
    """However often, and by whom, each was logged."""
    ours, theirs = edges(night[0]), counted.calls(SLICE)
    assert len(theirs) > 100
    assert ours == theirs


def test_names_that_are_not_known_are_counted(night, counted, raw):
    log = counted.columns.log
    unknown = dict.fromkeys(("um", "dm"), 0)
    for path in raw.glob(f"{log}_*.csv"):
        with path.open() as lines:
            for row in csv.DictReader(lines):
                for end in unknown:
                    unknown[end] += row[end] in ("", "(?)", "UNKNOWN", "UNAVAILABLE", "USER")
    assert night[1]["values_nulled"][log] == unknown


def test_a_service_is_as_busy_as_its_containers_on_average_and_receives_what_they_receive_together(
    night, counted
):
    store, _ = night
    data = windows(store, "service", ("cpu", *RECEIVED))
    ours = values(store, data)
    of_service = {name: place for place, name in enumerate(data.names)}
    for expected, measured in (
        (counted.cpu(STEP), ours[:, :, 0]),
        (counted.requests(STEP), np.nansum(ours[:, :, 1:], axis=-1)),
    ):
        assert len(expected) > 1000
        for (second, service), value in expected.items():
            mine = measured[(second - data.start + START) // STEP, of_service[service]]
            assert mine == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_in_longer_steps_what_containers_receive_still_adds_up(night):
    """It is their means over the step that do."""
    store, _ = night
    each = values(store, windows(store, "container", RECEIVED[:1], SLICE))[:, :, 0]
    data = windows(store, "service", RECEIVED[:1], SLICE)
    entities = pl.from_arrow(store.read_table("entities/entities.parquet"))
    service = dict(entities.filter(kind="container").select("entity", "service").iter_rows())
    names = manifests.load(store, f"container-{SLICE}").names
    for place, name in enumerate(data.names):
        mine = [at for at, container in enumerate(names) if service[container] == name]
        together = np.nansum(each[:, mine], axis=1)
        np.testing.assert_allclose(np.nan_to_num(values(store, data)[:, place, 0]), together, rtol=1e-5)


def test_where_containers_ran_joins_the_machines(night):
    store, figures = night
    assert figures["dependencies"]["colocation"] > 0
    entities = pl.from_arrow(store.read_table("entities/entities.parquet")).filter(kind="container")
    assert entities["parent"].null_count() == 0


def test_latencies_are_in_seconds_and_what_has_no_unit_is_marked(night, trace):
    store, _ = night
    telemetry = store.read_json("telemetry/manifest.json")
    rows = store.read_table(store.list("telemetry", "container-00.parquet")[0]).to_pandas()
    assert 0.0005 < rows["latency"].median() < 1
    scaled = {"cpu", "memory"} | {name for name in telemetry["metrics"] if "request_rate" in name}
    assert set(telemetry["normalised"]) == (scaled if trace.endswith("2022") else set())
    data = windows(store, "service", ("cpu", "latency"))
    words = (
        "CPU time, normalised over the trace" if trace.endswith("2022") else "CPU time, fraction of capacity"
    )
    assert describe("cpu", data.normalised) == words
    assert describe("latency_max", data.normalised) == "highest response time, s"


@pytest.mark.parametrize("trace", ["microservices-v2022"], indirect=True)
def test_a_night_forecasts_services_and_says_what_has_no_unit(night, raw, trace):
    store, _ = night
    shown = {"level": "service", "metrics": ["cpu", "request_rate"], "step": "15min"}
    given = NightlyOptions.model_validate(
        {
            "ingest": options(trace).model_dump(),
            "shard": {**shown, "history": "2h", "horizon": "2h", "lags": []},
            "train": {"epochs": 1, "batch_size": 8, "steps_per_epoch": 4, "stgnn": {"hidden": 4}},
        }
    )
    made = nightly(store, str(raw), given)
    published = store.read_json(f"{made['forecast']}/manifest.json")
    assert published["level"] == "service"
    page = store.read_bytes(f"reports/{made['forecast'].split('/')[1]}/index.html").decode()
    assert "normalised over the trace" in page
    assert "Who depends on whom" in page


def test_the_size_of_chunks_does_not_matter(night, raw, trace, tmp_path):
    """Of some megabytes of log, the header is in the first chunk alone."""
    assert max(path.stat().st_size for path in raw.iterdir()) > 3 << 20
    store = Store(str(tmp_path / "store"))
    ingest(store, str(raw), options(trace, chunk_mb=1))
    for noun in ("telemetry", "entities", "dependencies"):
        files = night[0].list(noun, ".parquet")
        assert store.list(noun, ".parquet") == files
        assert [path for path in files if store.read_bytes(path) != night[0].read_bytes(path)] == []


def test_columns_are_known_by_their_names(night, raw, counted, trace, tmp_path):
    """In whatever order, and whatever stands beside them."""
    name = {"microservices-v2021": "MSResource", "microservices-v2022": "MSMetrics"}[trace]
    (tmp_path / "raw").mkdir()
    for path in raw.glob(f"{name}_*.csv"):
        frame = pl.read_csv(path, infer_schema=False)
        turned = frame.select(reversed(frame.columns)).with_columns(remark=pl.lit("x"))
        turned.write_csv(tmp_path / "raw" / path.name)
    figures = ingest(Store(str(tmp_path / "store")), str(tmp_path / "raw"), options(trace))
    assert figures["rows_read"] == {name: counted.rows()[name]}
    assert figures["rows_rejected"] == {}
    assert figures["bins"]["container"] == night[1]["bins"]["container"]


def test_a_column_that_is_not_there_is_named(raw, trace, tmp_path):
    source = next(raw.glob("Node*.csv"))
    header, rest = source.read_text().split("\n", 1)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / source.name).write_text(header.replace("nodeid", "host") + "\n" + rest)
    with pytest.raises(
        InputError, match=r"Node.*csv: no column nodeid in its header, expected timestamp, nodeid"
    ):
        ingest(Store(str(tmp_path / "store")), str(tmp_path / "raw"), options(trace))


# -- the real traces ---------------------------------------------------------------------------------------


def real(*names: str) -> list[Path]:
    paths = [REAL / name for name in names]
    if not all(path.is_file() for path in paths):
        pytest.skip("no rows of the real traces here")
    return paths


def test_the_real_rows_of_2021_are_read_as_csv_reads_them(ray_cluster, tmp_path):
    names = ("MSCallGraph_head.csv", "MSResource_head.csv", "Node_head.csv")
    rows = {}
    for path in real(*(f"alibaba-microservices-2021/{name}" for name in names)):
        with path.open() as lines:
            rows[path.name.split("_")[0]] = list(csv.DictReader(lines))
    store = Store(str(tmp_path / "store"))
    figures = ingest(store, str(path.parent), options("microservices-v2021"))
    assert figures["rows_read"] == {table: len(found) for table, found in rows.items()}
    assert figures["rows_rejected"] == {}

    log = rows["MSCallGraph"]
    known = [r for r in log if r["um"] != r["dm"] and not {r["um"], r["dm"]} & {"", "(?)"}]
    first: dict[tuple[str, ...], int] = {}
    for r in known:
        call = (r["traceid"], r["rpcid"], r["um"], r["dm"])
        first[call] = min(int(r["timestamp"]), first.get(call, 1 << 60))
    expected: dict[tuple[int, str, str], float] = defaultdict(float)
    for (_, _, um, dm), time in first.items():
        expected[time // 1000 // SLICE * SLICE, um, dm] += 1
    assert edges(store) == expected
    assert sum(expected.values()) < len(known), "both sides of a call are in the log"

    bins: dict[tuple[int, str], list[float]] = defaultdict(list)
    for r in rows["MSResource"]:
        bins[int(r["timestamp"]) // 1000 // STEP * STEP, r["msinstanceid"]].append(
            float(r["instance_cpu_usage"])
        )
    tables = [
        pl.from_arrow(store.read_table(path)) for path in store.list("telemetry", "container-00.parquet")
    ]
    ours = {
        (int(time.timestamp()) - START, entity): cpu
        for entity, time, cpu in pl.concat(tables).select("entity", "time", "cpu").iter_rows()
    }
    assert ours == pytest.approx({key: fmean(found) for key, found in bins.items()}, rel=1e-5)


def test_the_real_calls_of_2022_are_read_as_csv_reads_them(ray_cluster, tmp_path):
    (path,) = real("alibaba-microservices-2022/CallGraph_sample.csv.gz")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / path.name).symlink_to(path)
    nodes = "timestamp,nodeid,cpu_utilization,memory_utilization\n0,NODE_1,0.5,0.25\n"
    (tmp_path / "raw" / "NodeMetrics_0.csv").write_text(
        nodes
    )  # there is nothing to forecast without telemetry
    with gzip.open(path, "rt") as lines:
        rows = list(csv.DictReader(lines))
    store = Store(str(tmp_path / "store"))
    figures = ingest(store, str(tmp_path / "raw"), options("microservices-v2022"))
    assert figures["rows_read"] == {"CallGraph": len(rows), "NodeMetrics": 1}
    nobody = {"UNKNOWN", "UNAVAILABLE", "USER", ""}
    calls: dict[tuple[str, ...], int] = {}
    for r in rows:
        if r["um"] != r["dm"] and not {r["um"], r["dm"]} & nobody:
            call = (r["traceid"], r["rpc_id"], r["um"], r["dm"])
            calls[call] = min(int(r["timestamp"]), calls.get(call, 1 << 60))
    expected: dict[tuple[int, str, str], float] = defaultdict(float)
    for (_, _, um, dm), time in calls.items():
        expected[time // 1000 // SLICE * SLICE, um, dm] += 1
    assert edges(store) == expected


def test_a_renamed_instance_is_one_series_under_its_newer_name(night):
    """A rollout replaces half of the containers of a day; what both names had lies in one column."""
    store = night[0]
    apart = windows(store, "container", ("cpu",))
    given = {"history": 4 * STEP, "horizon": 2 * STEP, "lags": (), "windows": "joined", "renamed": "10min"}
    figures = shard(store, ShardOptions(level="container", metrics=("cpu",), step=STEP, **given))
    joined = manifests.load(store, "joined")
    assert figures["renamed"] == len(joined.renamed) > 0
    old = {name for earlier in joined.renamed.values() for name in earlier}
    assert set(apart.names) == set(joined.names) | old
    entities = pl.from_arrow(store.read_table("entities/entities.parquet"))
    service = dict(entities.select(pl.col("entity", "service").cast(pl.String)).iter_rows())
    one, both = values(store, apart), values(store, joined)
    for name, earlier in joined.renamed.items():
        series = [one[:, apart.names.index(part), 0] for part in (*earlier, name)]
        assert {service[part] for part in earlier} == {service[name]}
        seen = np.isfinite(series)
        assert (seen.sum(0) <= 2).all()
        alone = seen.sum(0) == 1
        expected = np.nansum(series, 0)[alone]
        np.testing.assert_allclose(both[alone, joined.names.index(name), 0], expected, rtol=1e-5)
        assert seen.any(0).sum() == np.isfinite(both[:, joined.names.index(name), 0]).sum()


def test_only_containers_are_renamed(night):
    with pytest.raises(InputError, match=r"--renamed 600: expected --level container, not service"):
        shard(night[0], ShardOptions(level="service", metrics=("cpu",), renamed="10min"))


def test_a_file_with_its_header_alone_says_that_nothing_happened(tmp_path, raw, trace):
    """As of three minutes without a call."""
    folder = tmp_path / "raw"
    shutil.copytree(raw, folder)
    log = RawCounts(raw, trace).columns.log
    first = sorted(folder.glob(f"{log}_*.csv"))[0]
    header = first.read_text().split("\n", 1)[0]
    (folder / f"{log}_900.csv").write_text(header + "\n")
    figures = ingest(Store(str(tmp_path / "store")), str(folder), options(trace))
    assert figures["rows_read"] == RawCounts(raw, trace).rows()

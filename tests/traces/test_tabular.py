"""A table of which only the columns are known becomes what shard reads, or an error says what is wrong."""

import csv
import gzip
import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fleetcast.config import read_yaml
from fleetcast.errors import InputError
from fleetcast.ingest import make
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.ingest.shards import shard
from fleetcast.store import MANIFEST, Store
from fleetcast.traces import columns, tabular
from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.tabular import load
from fleetcast.windows import manifest
from fleetcast.windows.manifest import ShardOptions
from fleetcast.windows.views import OpenShard
from pydantic import ValidationError

DATA = Path(__file__).parents[3] / "shared" / "data"
EXAMPLES = Path(__file__).parents[2] / "examples"
#: 2024-01-01, a Monday, in Unix seconds.
ZERO = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
LONG: dict[str, Any] = {"entity": "pod", "time": "at", "metrics": ("load", "queue length")}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def table(tmp_path):
    """`table(text)` → the path of a file with these rows."""

    def write(rows: Any, name: str = "table.csv") -> str:
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "\n".join(rows) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return str(path)

    return write


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr(
        make, "spread", lambda items, work, what, **_: [work(json.loads(json.dumps(i))) for i in items]
    )


def long_rows(steps: int = 4, pods: str = "ab", step: int = 300) -> list[str]:
    """`load` is 10 · step + pod, `queue length` its half."""
    rows = [
        f"{ZERO + step * t},{pod},{10 * t + n},{(10 * t + n) / 2}"
        for t in range(steps)
        for n, pod in enumerate(pods)
    ]
    return ["at,pod,load,queue length", *rows]


def rows_of(store: Store, noun: str) -> pl.DataFrame:
    frames: Any = [pl.from_arrow(store.read_table(path)) for path in store.list(noun, ".parquet")]
    return pl.concat([frame.with_columns(pl.col(pl.Categorical).cast(pl.String)) for frame in frames])


def telemetry(store: Store, *metrics: str) -> list[tuple[Any, ...]]:
    """(entity, seconds since `ZERO`, metrics …), sorted."""
    frame = rows_of(store, "telemetry").with_columns(pl.col("time").dt.epoch("s") - ZERO)
    return frame.select("entity", "time", *metrics).sort("entity", "time").rows()


def rejected(store: Store, what: str = "table") -> list[tuple[int, str, str]]:
    return rows_of(store, f"rejected/{what}").select("offset", "reason", "line").sort("offset").rows()


def edges(store: Store) -> list[tuple[Any, ...]]:
    """(seconds since `ZERO` of the slice, source, target, weight), sorted."""
    frame = rows_of(store, "dependencies").with_columns(pl.col("time").dt.epoch("s") - ZERO)
    assert set(frame["kind"]) == {"call"}
    return frame.select("time", "source", "target", "weight").sort("time", "source", "target").rows()


def dense(store: Store, metric: str) -> tuple[list[str], np.ndarray]:
    """The entities and [T, N] values of a dataset of one shard."""
    made = manifest.load(store, "default")
    (part,) = made.shards
    values = store.read_table(part.path)[metric].to_numpy()
    return list(made.names), values.reshape(-1, made.entities)


# -- forms of tables ---------------------------------------------------------------------------------------


def test_a_long_table_becomes_telemetry_entities_and_figures(store, table):
    figures = load(store, TabularOptions(table=table(long_rows()), **LONG))
    assert telemetry(store, "load", "load_max", "queue length", "samples") == [
        (pod, 300 * t, 10 * t + n, 10 * t + n, (10 * t + n) / 2, 1)
        for n, pod in enumerate("ab")
        for t in range(4)
    ]
    described = (
        rows_of(store, "entities").select("entity", "kind", "service", "measured").sort("entity", "kind")
    )
    assert described.rows() == [
        (pod, kind, service, True)
        for pod in "ab"
        for kind, service in (("container", pod), ("service", None))
    ]
    assert figures == {
        "rows_read": {"table": 8},
        "rows_rejected": {},
        "values_nulled": {},
        "files": 1,
        "entities": 2,
        "metrics": ["load", "queue length"],
        "step": 300,
        "edges": 0,
        "bins": 8,
        "clocks": [],
        "skipped": False,
    }
    made = store.read_json(f"telemetry/{MANIFEST}")
    assert made["spans"] == {"container": {"first": ZERO, "last": ZERO + 900}}
    assert made["files"] == store.list("telemetry", ".parquet")
    assert not store.list("_work")


@pytest.mark.parametrize(
    ("level", "kind"), [("machine", "machine"), ("container", "container"), ("service", "container")]
)
def test_shard_takes_it_at_its_level_with_metrics_of_any_name(store, table, level, kind):
    load(store, TabularOptions(table=table(long_rows(40)), level=level, **LONG))
    options = ShardOptions(
        level=level,
        metrics=("queue length", "load_max"),
        step=300,
        history=1200,
        horizon=600,
        lags=(),
    )
    assert shard(store, options)["entities"] == 2
    assert all(f"/{kind}-" in path for path in store.list("telemetry", ".parquet"))
    names, values = dense(store, "queue length")
    assert names == ["a", "b"]
    assert np.array_equal(values, (10 * np.arange(40)[:, None] + np.arange(2)) / 2)
    assert np.array_equal(dense(store, "load_max")[1], 10 * np.arange(40)[:, None] + np.arange(2))


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz", "table.parquet"])
def test_every_format_means_the_same(store, table, tmp_path, name):
    """Names that look like numbers, numbers that look like texts, and quotes."""
    text = "at,pod,load\n2024-01-01 00:00:00,007,1.5\n2024-01-01 00:05:00,007,2\n"
    text += '2024-01-01 00:05:00,"x, y",nan\n2024-01-01 00:05:00,"x, y",3\n'
    if name == "table.parquet":
        pl.read_csv(
            text.encode(), schema_overrides={"pod": pl.Categorical}, try_parse_dates=True
        ).write_parquet(tmp_path / name)
    path = str(tmp_path / name) if name == "table.parquet" else table(text, name)
    figures = load(store, TabularOptions(table=path, entity="pod", time="at", metrics=("load",)))
    assert telemetry(store, "load") == [("007", 0, 1.5), ("007", 300, 2.0), ("x, y", 300, 3.0)]
    assert figures["rows_rejected"]["table"] == {"no metric has a value": 1}


def test_a_wide_table_has_an_entity_per_column(store, table):
    rows = ["at,b,a", f"{ZERO},1,2", f"{ZERO + 60},3,", f"{ZERO + 120},,"]
    figures = load(store, TabularOptions(table=table(rows), time="at", metrics=("speed",)))
    assert telemetry(store, "speed") == [("a", 0, 2), ("b", 0, 1), ("b", 60, 3)]
    assert (figures["rows_read"]["table"], figures["entities"], figures["step"]) == (3, 2, 60)
    assert rejected(store) == [(2, "no metric has a value", f"{ZERO + 120},,")]


def test_columns_of_a_wide_table_may_name_entity_and_metric(store, table):
    rows = ["at,web_cpu,web_net_in,db_cpu,web_ram", f"{ZERO},1,2,3,9", f"{ZERO + 60},4,5,,9"]
    load(store, TabularOptions(table=table(rows), time="at", metrics=("cpu", "net_in")))
    assert telemetry(store, "cpu", "net_in") == [("db", 0, 3, None), ("web", 0, 1, 2), ("web", 60, 4, 5)]


def test_rows_without_times_are_steps_from_a_monday_that_can_be_said(store, table):
    """A column of row numbers, which pandas writes without a name, is no entity."""
    path = table([",a,b", "0,1,2", "1,3,4", "2,5,6"])
    load(store, TabularOptions(table=path, metrics=("speed",), step="10min", start="2024-01-01"))
    assert telemetry(store, "speed") == [
        (n, 600 * t, 2 * t + v) for v, n in ((1, "a"), (2, "b")) for t in range(3)
    ]
    load(store, TabularOptions(table=path, metrics=("speed",)))
    first = store.read_json(f"telemetry/{MANIFEST}")["spans"]["container"]["first"]
    assert first == int(datetime(2018, 1, 1, tzinfo=UTC).timestamp())


def test_a_row_that_is_broken_still_takes_its_step(store, table):
    load(
        store, TabularOptions(table=table(["a,b", "1,2", "3", "4,5"]), metrics=("speed",), start="2024-01-01")
    )
    assert telemetry(store, "speed") == [("a", 0, 1), ("a", 600, 4), ("b", 0, 2), ("b", 600, 5)]
    assert rejected(store) == [(1, "1 columns, expected 2", "3")]


# -- times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "unit"),
    [
        (f"{ZERO}", f"{ZERO + 300}", "auto"),
        (f"{ZERO}.25", f"{ZERO + 300}.25", "auto"),
        (f"{ZERO}000", f"{ZERO + 300}000", "auto"),
        (f"{ZERO}000000", f"{ZERO + 300}000000", "auto"),
        (f"{ZERO}000000001", f"{ZERO + 300}000000001", "auto"),
        ("2024-01-01", "2024-01-01T00:05", "auto"),
        ("2024-01-01T00:00:00Z", "2024-01-01 00:05:00.123", "auto"),
        ("2024-01-01T01:00:00+01:00", "2023-12-31 22:05:00-0200", "auto"),
        ("2024-01-01 00:00:00 UTC", "2024/01/01 00:05", "auto"),
        ("2024-01-01 00:00:00.5 +0000 UTC m=+0.11", "2024-01-01 09:05:00 +0900 JST m=+300.1", "auto"),
        ("2024-01-01 00:00:00 +0000 UTC", "2023-12-31 22:05:00 -0200 -02", "auto"),
        ("0", "1", "auto"),
        ("0", "1", "step"),
        (f"{ZERO}", f"{ZERO + 300}", "s"),
        (f"{ZERO}000", f"{ZERO + 300}000", "ms"),
        (f"{ZERO}000000", f"{ZERO + 300}000000", "us"),
        (f"{ZERO}000000000", f"{ZERO + 300}000000000", "ns"),
    ],
)
def test_times_are_understood_however_they_are_written(store, table, first, second, unit):
    path = table(["at,pod,load", f"{first},a,1", f"{second},a,2"])
    options = TabularOptions(
        table=path, entity="pod", time="at", metrics=("load",), time_unit=unit, start="2024-01-01"
    )
    assert load(store, options)["step"] == 300
    assert telemetry(store, "load") == [("a", 0, 1), ("a", 300, 2)]


@pytest.mark.parametrize(
    "dtype", [pl.Datetime("us"), pl.Datetime("ns", "Asia/Tokyo"), pl.Date, pl.Int32, pl.Float64]
)
def test_times_with_a_type_mean_the_same(store, tmp_path, dtype):
    day = [datetime(2024, 1, 1 + n) for n in range(2)]
    times = pl.Series(day)
    if isinstance(dtype, pl.Datetime) and dtype.time_zone:
        times = times.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    elif dtype.is_numeric():
        times = times.dt.epoch("s")
    pl.DataFrame({"at": times.cast(dtype), "pod": "a", "load": [1, 2]}).write_parquet(tmp_path / "t.parquet")
    options = TabularOptions(table=str(tmp_path / "t.parquet"), entity="pod", time="at", metrics=("load",))
    assert load(store, options)["step"] == 86_400
    assert telemetry(store, "load") == [("a", 0, 1), ("a", 86_400, 2)]


def test_nanoseconds_are_exact(store, table):
    """As float64 the first would be a second later, and in the next bin."""
    rows = ["at,pod,load", f"{ZERO + 1}999999999,a,1", f"{ZERO + 4}000000000,a,2"]
    load(store, TabularOptions(table=table(rows), entity="pod", time="at", metrics=("load",), step=2))
    assert telemetry(store, "load") == [("a", 0, 1), ("a", 4, 2)]


@pytest.mark.parametrize(("gap", "step"), [(60, 60), (59, 60), (7, 8), (3601, 3600), (5000, 4800)])
def test_without_a_step_it_is_the_divisor_of_a_day_nearest_to_the_median_gap(store, table, gap, step):
    """Of the entity seen most often, in no order and with an outage."""
    at = [ZERO + gap * n for n in (3, 1, 0, 2, 4, 90)]
    rows = ["at,pod,load", f"{ZERO},rare,1", *(f"{t},a,1" for t in at)]
    options = TabularOptions(table=table(rows), entity="pod", time="at", metrics=("load",))
    assert load(store, options)["step"] == step


# -- values ------------------------------------------------------------------------------------------------


def test_rows_of_one_bin_are_averaged_whatever_they_are_cut_into(store, table, monkeypatch):
    """Also over batches and over what is written in between."""
    monkeypatch.setattr(columns, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tabular, "_HELD_BYTES", 200)
    rows = ["at,pod,load", *(f"{ZERO + 10 * t},{pod},{t}" for t in range(60) for pod in "ab")]
    options = TabularOptions(table=table(rows), entity="pod", time="at", metrics=("load",), step=300)
    assert load(store, options)["bins"] == 4
    assert telemetry(store, "load", "load_max", "samples") == [
        (pod, at, mean, highest, 30) for pod in "ab" for at, mean, highest in ((0, 14.5, 29), (300, 44.5, 59))
    ]


def test_values_that_are_no_finite_number_are_missing_and_counted(store, table):
    cells = ["inf", "-inf", "nan", "n/a", "1e39", "", " 7 "]
    rows = ["at,pod,load,queue length", *(f"{ZERO + 300 * t},a,{cell},1" for t, cell in enumerate(cells))]
    figures = load(store, TabularOptions(table=table(rows), **LONG))
    assert telemetry(store, "load") == [("a", 300 * t, None) for t in range(6)] + [("a", 1800, 7)]
    assert figures["values_nulled"] == {"table": {"load": 5}}


def test_rows_that_cannot_be_used_are_kept_with_their_reason_and_number(store, table, monkeypatch):
    """Numbers go on over batches and count broken rows."""
    monkeypatch.setattr(columns, "BLOCK_BYTES", 120)
    bad = {
        1: ("pod is empty", f"{ZERO},,1,1"),
        2: ("at is empty", ",a,1,1"),
        4: ("3 columns, expected 4", f"{ZERO},a,1"),
        5: ("the time cannot be read", "soon,a,1,1"),
        6: ("the time cannot be read", f"-{ZERO},a,1,1"),
        9: ("no metric has a value", f"{ZERO},a,,inf"),
        11: ("5 columns, expected 4", f"{ZERO},a,1,1,1"),
    }
    rows = [bad[n][1] if n in bad else f"{ZERO + 300 * n},a,1,1" for n in range(20)]
    figures = load(store, TabularOptions(table=table([*long_rows(0), *rows]), **LONG))
    kept = [(n, reason, line) for n, (reason, line) in bad.items()]
    # Columns are kept in the order in which they are read: entity, time, metrics.
    assert [(n, reason) for n, reason, _ in rejected(store)] == [(n, reason) for n, reason, _ in kept]
    assert rejected(store)[3] == (5, "the time cannot be read", "a,soon,1,1")
    assert figures["rows_read"] == {"table": 20}
    assert sum(figures["rows_rejected"]["table"].values()) == len(bad)
    assert len(telemetry(store)) == 20 - len(bad)


def test_too_many_bad_rows_refuse_the_table_and_keep_what_was_there(store, table):
    options = TabularOptions(table=table(long_rows()), **LONG)
    load(store, options)
    before = telemetry(store, "load")
    broken = table([*long_rows(1), *(f"-1,a,{n},1" for n in range(3))], "broken.csv")
    with pytest.raises(
        InputError, match=r"3 of 5 rows cannot be used \(the time cannot be read: 3\).*share 0.5"
    ):
        load(store, TabularOptions(table=broken, step=300, **LONG))
    assert telemetry(store, "load") == before
    assert len(rejected(store)) == 3
    assert load(store, options)["skipped"]
    assert load(store, TabularOptions(table=broken, max_rejected_share=0.6, step=300, **LONG))["bins"] == 2


# -- again -------------------------------------------------------------------------------------------------


def test_the_same_table_and_options_are_nothing_to_do_and_others_replace_it_whole(store, table, tmp_path):
    path = table(long_rows(400))
    first = load(store, TabularOptions(table=path, **LONG))
    assert len(store.list("telemetry", ".parquet")) == 2
    before = {path: store.read_bytes(path) for path in store.list("")}
    assert load(store, TabularOptions(table=path, **LONG)) == {**first, "skipped": True}
    copy = table(long_rows(400), "copy.csv")
    assert load(store, TabularOptions(table=copy, **LONG))["skipped"]
    assert {path: store.read_bytes(path) for path in store.list("")} == before

    assert not load(store, TabularOptions(table=path, **{**LONG, "metrics": ("load",)}))["skipped"]
    assert store.read_json(f"telemetry/{MANIFEST}")["metrics"] == ["load"]
    table(long_rows(3, "xyz"))
    assert load(store, TabularOptions(table=path, **LONG))["entities"] == 3
    assert {row[0] for row in telemetry(store)} == set("xyz")
    assert len(store.list("telemetry", ".parquet")) == 1


def test_a_run_that_died_is_run_again_and_gives_the_same(store, table, tmp_path, monkeypatch):
    path, graph = table(long_rows(400)), table(["source,target", "a,b"], "edges.csv")
    options = TabularOptions(table=path, edges=graph, **LONG)
    whole = Store(str(tmp_path / "whole"))
    load(whole, options)
    files = {path: whole.read_bytes(path) for path in whole.list("")}
    earlier = TabularOptions(table=table(long_rows(9, "xyz"), "earlier.csv"), **LONG)
    for noun in ("entities", "dependencies", "telemetry"):
        load(store, earlier)
        with monkeypatch.context() as patched:
            real = Store.publish

            def dies(self, staging, folder, noun=noun, real=real):
                if folder == noun:
                    raise KeyboardInterrupt
                real(self, staging, folder)

            patched.setattr(Store, "publish", dies)
            with pytest.raises(KeyboardInterrupt):
                load(store, options)
        assert not store.exists(f"telemetry/{MANIFEST}")
    assert not load(store, options)["skipped"]
    assert {path: store.read_bytes(path) for path in store.list("")} == files


def test_a_store_of_another_trace_is_not_written_over_nor_the_reverse(store, table, tmp_path):
    load(store, TabularOptions(table=table(long_rows()), **LONG))
    raw = tmp_path / "machine_usage.csv"
    raw.write_text("m_1,10,1,2,3,4,5,6,7\n")
    with pytest.raises(InputError, match=r"--trace alibaba-2018: .* was ingested with tabular"):
        ingest(store, str(raw), IngestOptions())
    store.write_json("ingested/manifest.json", {"settings": {"trace": "alibaba-2018"}, "files": [{}]})
    with pytest.raises(InputError, match=r"--store .*: holds the trace alibaba-2018; use another store"):
        load(store, TabularOptions(table=table(long_rows(9)), **LONG))


# -- the graph ---------------------------------------------------------------------------------------------


def test_edges_without_a_time_hold_in_the_slice_that_every_window_sees(store, table):
    graph = table(["from,to,value", "a,b,2", "b,a,0.5", "a,b,1"], "edges.csv")
    figures = load(store, TabularOptions(table=table(long_rows(400)), edges=graph, **LONG))
    days = (-86_400, 0, 86_400)
    assert edges(store) == [(day, *edge) for day in days for edge in (("a", "b", 3), ("b", "a", 0.5))]
    assert figures["edges"] == 2
    assert store.read_json(f"telemetry/{MANIFEST}")["settings"]["slice"] == 86_400
    options = ShardOptions(level="service", metrics=("load",), step=300, history=1200, horizon=600, lags=())
    shard(store, options)
    made = manifest.load(store, "default")
    view = OpenShard.read(store, made, made.shards[0])
    for origin in (made.history, 200, 399):
        batch = view.batch(np.array([origin]))
        joined = zip(*batch.edges.index.tolist(), batch.edges.weight.tolist(), strict=True)
        assert sorted(joined) == [(0, 1, 1), (1, 0, pytest.approx(0.5 / 3))]


@pytest.mark.parametrize(("gap", "slice"), [(60, 3600), (3600, 3600), (7200, 86_400)])
def test_timed_edges_are_summed_by_the_hour_or_the_day_if_they_are_rarer(store, table, gap, slice):
    rows = ["source,target,weight,time", *(f"a,b,1,{ZERO + gap * n}" for n in range(100))]
    figures = load(store, TabularOptions(table=table(long_rows(400)), edges=table(rows, "edges.csv"), **LONG))
    at = gap * np.arange(100) // slice * slice
    assert edges(store) == [(t, "a", "b", n) for t, n in zip(*np.unique(at, return_counts=True), strict=True)]
    assert figures["edges"] == 1
    assert store.read_json(f"telemetry/{MANIFEST}")["settings"]["slice"] == slice


def test_edges_that_cannot_be_used_are_rejected_with_their_reason(store, table):
    bad = {
        0: ("source and target are the same", "a,a,1"),
        2: ("target is no entity of the table", "a,nobody,1"),
        3: ("source is no entity of the table", "nobody,a,1"),
        4: ("source is empty", ",a,1"),
        5: ("weight is not a positive number", "a,b,0"),
        6: ("weight is not a positive number", "a,b,-1"),
        7: ("weight is not a positive number", "a,b,much"),
        8: ("2 columns, expected 3", "a,b"),
    }
    rows = ["src,dst,calls", *(bad[n][1] if n in bad else "a,b,4" for n in range(9))]
    options = TabularOptions(
        table=table(long_rows()),
        edges=table(rows, "edges.csv"),
        edges_source="src",
        edges_target="dst",
        edges_weight="calls",
        **LONG,
    )
    figures = load(store, options)
    assert rejected(store, "edges") == [(n, reason, line) for n, (reason, line) in bad.items()]
    assert figures["rows_rejected"]["edges"]["weight is not a positive number"] == 3
    assert {edge[1:] for edge in edges(store)} == {("a", "b", 4)}


def test_a_matrix_joins_row_to_column_in_the_order_of_the_columns(store, table):
    path = table(["b,a,target", "1,2,3", "4,5,6"])
    graph = table("1,0,7\n-1,0,0\n0,8,0\n", "matrix.csv")
    figures = load(store, TabularOptions(table=path, metrics=("speed",), start="2024-01-01", edges=graph))
    assert {edge[1:] for edge in edges(store)} == {("b", "target", 7), ("target", "a", 8)}
    assert figures["rows_rejected"]["edges"] == {
        "source and target are the same": 1,
        "weight is not a positive number": 1,
    }
    assert [row[0] for row in rejected(store, "edges")] == [0, 3]


def test_a_table_without_edges_leaves_none_of_an_earlier_one(store, table):
    path, graph = table(long_rows()), table(["source,target", "a,b"], "edges.csv")
    load(store, TabularOptions(table=path, edges=graph, **LONG))
    assert store.list("dependencies")
    load(store, TabularOptions(table=path, **LONG))
    assert not store.list("dependencies")


# -- errors at the door ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "missing.csv"}, r"--table missing.csv: no such file"),
        ({"table": "rows.xlsx"}, r"--table rows.xlsx: expected a file that ends in .parquet, .csv, .csv.gz"),
        (
            {"entity": "pods"},
            r"--entity pods: no such column in .*\(did you mean pod\?\), expected one of at, pod, ",
        ),
        ({"time": "when"}, r"--time when: no such column in .*, expected one of at, pod, load, queue length"),
        ({"time": ("at", "when")}, r"--time when: no such column in .*, expected one of at, pod, "),
        ({"edges_time": ("when",)}, r"--edges-time when: no such column in .*, expected one of src, target"),
        ({"metrics": ("laod",)}, r"--metrics laod: no such column in .*\(did you mean load\?\)"),
        (
            {"metrics": ("pod",), "entity": "load", "step": 60},
            r"--metrics pod: column pod of .* is not numeric.*got 'a'",
        ),
        ({"time": "pod"}, r"--time pod: expected times between 1970 and 2200 .*got 'a'"),
        ({"time_unit": "step", "time": "pod"}, r"--time pod: expected numbers for --time-unit step, got 'a'"),
        ({"entity": None}, r"--metrics load: is a column of .* long; expected --entity as well"),
        (
            {"entity": None, "metrics": ("x", "y")},
            r"--metrics x: without --entity .* expected <entity>_x among at",
        ),
        ({"entity": None, "metrics": ("x",)}, r"column pod of .* is not numeric.* a long one needs --entity"),
        ({"edges": "missing.csv"}, r"--edges missing.csv: no such file"),
        ({"edges_source": "caller"}, r"--edges-source caller: no such column .*expected one of src, target"),
        ({}, r"--edges-source: .* has no column source or from, nor columns .* expected one of src, target"),
        (
            {"edges_source": "src"},
            r"--edges .*: has no usable edge \(source is no entity of the table: 1\).*as a, b",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_what_was_expected(store, table, options, message):
    given = {"table": table(long_rows()), "edges": table(["src,target", "x,a"], "edges.csv"), **LONG}
    with pytest.raises(InputError, match=message):
        load(store, TabularOptions(**given | options))
    assert not store.exists(f"telemetry/{MANIFEST}")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "the file is empty, expected a header and rows"),
        ("at,pod,load,queue length\n", "no row of .* has a value there"),
        (f"at,pod,load,queue length\n{ZERO},a,,\n", r"has no usable row \(no metric has a value: 1\)"),
        (f"at,pod,load,queue length\n{ZERO},,1,1\n", r"has no usable row \(pod is empty: 1\)"),
        (
            "at,pod,load,load,queue length\n1,a,1,1,1\n",
            "--metrics load: .* has more than one column of that name",
        ),
        (
            f"at,pod,load,queue length\n{ZERO},a,1,1\n",
            "--step: cannot be told from .*, where a has a single time",
        ),
    ],
)
def test_a_table_without_usable_rows_is_refused(store, table, rows, message):
    step = {} if "--step" in message else {"step": 300}
    with pytest.raises(InputError, match=message):
        load(store, TabularOptions(table=table(rows), **LONG, **step))


def test_a_file_that_is_no_table_is_refused(store, tmp_path):
    for name in ("t.parquet", "t.csv.gz"):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(InputError, match=rf"--table .*{name}: cannot be read as a table"):
            load(store, TabularOptions(table=str(tmp_path / name), **LONG))


def test_a_matrix_of_the_wrong_size_or_for_a_long_table_is_refused(store, table):
    wide, matrix = table(["a,b", "1,2"]), table("1,0,7\n1,0,0\n0,8,0\n", "matrix.csv")
    with pytest.raises(InputError, match="a matrix of 3 x 3, expected 2 x 2 for the entities"):
        load(store, TabularOptions(table=wide, metrics=("speed",), edges=matrix))
    with pytest.raises(InputError, match="a matrix, whose order only the columns of a wide table say"):
        load(store, TabularOptions(table=table(long_rows(), "long.csv"), edges=matrix, **LONG))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ()}, "at least 1 item"),
        ({"metrics": ("cpu", "cpu")}, "expected each metric once"),
        ({"metrics": ("samples",)}, "the store keeps the name samples for itself"),
        ({"metrics": ("cpu_max", "cpu")}, "keeps cpu_max for the maximum of cpu"),
        ({"metrics": ("cpu",), "step": "7min"}, "expected a width that divides a day"),
        ({"metrics": ("cpu",), "entity": "pod"}, r"entity \(pod\) names a long table, expected time as well"),
        ({"metrics": {"cpu": {"unit": "furlongs"}}}, "'percent', 'millicores', 'ms'"),
        ({"metrics": {"cpu": {"unit": 0}}}, "greater than 0"),
        ({"metrics": {"cpu": {"column": "x"}, "x": {}}}, "expected each column once, got x twice"),
        ({"metrics": ("cpu",), "file_name": "(?P<entity"}, "file_name\n.*not a regular expression"),
        ({"metrics": ("cpu",), "file_name": "(?P<pod>.*)"}, "named groups among entity, .*, got pod"),
        (
            {"metrics": ("cpu",), "file_name": "(?P<entity>.*)", "entity": "pod", "time": "at"},
            r"entity \(pod\) is in file_name as well, expected one of them",
        ),
        ({"metrics": ("cpu",), "service": "of"}, "service: a wide table has entities only"),
        (
            {"metrics": ("cpu",), "entity": "pod", "time": "at", "machine": "on", "level": "machine"},
            "machine: machines have none, expected level container or service",
        ),
    ],
)
def test_options_that_contradict_the_store_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TabularOptions(table="t.csv", **options)


# -- many files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["days", "days/*.csv", "days/day-?.csv.gz"])
def test_the_files_of_a_folder_or_pattern_are_one_table(store, table, tmp_path, given):
    """Rows of a bin may be in several of them, in any format; other files are left out."""
    (tmp_path / "days" / "old").mkdir(parents=True)
    rows = long_rows(4)
    table([rows[0], *rows[1:4]], "days/day-1.csv")
    table([rows[0], *rows[4:]], "days/day-2.csv.gz")
    table(["at,pod,load,queue length", f"{ZERO},a,100,0"], "days/old/day-0.csv")
    table("no table", "days/notes.txt")
    figures = load(store, TabularOptions(table=str(tmp_path / given), step=300, **LONG))
    every = [(pod, 300 * t, 10.0 * t + n) for n, pod in enumerate("ab") for t in range(4)]
    expected = {
        "days": [("a", 0, 50.0), *every[1:]],
        "days/*.csv": [every[0], every[1], every[4]],
        "days/day-?.csv.gz": [every[2], every[3], *every[5:]],
    }[given]
    assert telemetry(store, "load") == expected
    assert figures["rows_read"]["table"] == {"days": 9, "days/*.csv": 3, "days/day-?.csv.gz": 5}[given]


def test_a_further_file_is_read_and_a_second_copy_of_one_is_not(store, table, tmp_path):
    (tmp_path / "days").mkdir()
    options = TabularOptions(table=str(tmp_path / "days"), **LONG)
    table(long_rows(4), "days/1.csv")
    load(store, options)
    table(long_rows(4), "days/copy.csv")
    assert load(store, options)["skipped"]
    table([f"at,pod,load,queue length\n{ZERO + 1200},a,7,7"], "days/2.csv")
    figures = load(store, options)
    assert (figures["files"], figures["rows_read"]["table"]) == (2, 9)
    assert ("a", 1200, 7.0) in telemetry(store, "load")


def test_files_names_say_entity_service_and_machine(store, table, tmp_path):
    (tmp_path / "node-1").mkdir()
    (tmp_path / "node-2").mkdir()
    for name, value in (("node-1/web-a1", 1), ("node-1/web-b2", 3), ("node-2/db-c3", 5)):
        table(["at,load", *(f"{ZERO + 300 * t},{value}" for t in range(40))], f"{name}.csv")
    graph = table(["source,target", "web,db"], "graph.csv")
    options = TabularOptions(
        table=str(tmp_path / "node-*" / "*.csv"),
        file_name=r"(?P<machine>[^/]+)/(?P<entity>(?P<service>[a-z]+)-.*)\.csv",
        time="at",
        metrics="load",
        edges=graph,
    )
    assert load(store, options)["entities"] == 3
    described = rows_of(store, "entities").filter(pl.col("kind") == "container")
    assert described.select("entity", "service", "parent").sort("entity").rows() == [
        ("db-c3", "db", "node-2"),
        ("web-a1", "web", "node-1"),
        ("web-b2", "web", "node-1"),
    ]
    assert {edge[1:3] for edge in edges(store)} == {("web", "db")}
    given = {"metrics": ("load",), "step": 300, "history": 1200, "horizon": 600, "lags": ()}
    shard(store, ShardOptions(level="service", **given))
    names, values = dense(store, "load")
    assert names == ["db", "web"], "services are the mean of their containers"
    assert np.array_equal(values, np.tile([5.0, 2.0], (40, 1)))
    with pytest.raises(InputError, match=r"--file-name .*: says no service for node-1/web-a1.csv"):
        load(store, options.model_copy(update={"file_name": "(?P<service>x)", "entity": "at"}))


def test_columns_say_service_and_machine(store, table):
    rows = ["at,pod,of,on,load", *(f"{ZERO + 300 * t},p{n},s,m{n},{n}" for t in range(3) for n in range(2))]
    rows += [f"{ZERO},p9,,m1,1"]
    options = TabularOptions(
        table=table(rows), entity="pod", service="of", machine="on", time="at", metrics="load"
    )
    assert load(store, options)["rows_rejected"] == {"table": {"of is empty": 1}}
    described = rows_of(store, "entities").select("entity", "kind", "service", "parent").sort("entity")
    assert described.rows() == [
        ("p0", "container", "s", "m0"),
        ("p1", "container", "s", "m1"),
        ("s", "service", None, None),
    ]


def test_a_wide_file_may_be_of_one_metric_that_its_name_says(store, table, tmp_path):
    (tmp_path / "wide").mkdir()
    table(["at,a,b", f"{ZERO},10,20", f"{ZERO + 60},30,40"], "wide/cpu.csv")
    table(["at,b", f"{ZERO},5"], "wide/rt.csv")
    options = TabularOptions(
        table=str(tmp_path / "wide"),
        file_name=r"(?P<metric>\w+)\.csv",
        time="at",
        step=60,
        metrics={"cpu": {"unit": "percent"}, "latency": {"column": "rt", "unit": "ms"}},
    )
    load(store, options)
    assert telemetry(store, "cpu", "latency") == [
        ("a", 0, pytest.approx(0.1), None),
        ("a", 60, pytest.approx(0.3), None),
        ("b", 0, pytest.approx(0.2), pytest.approx(0.005)),
        ("b", 60, pytest.approx(0.4), None),
    ]


def test_long_files_may_have_some_of_the_metrics_each(store, table, tmp_path):
    (tmp_path / "long").mkdir()
    table(["at,pod,load", f"{ZERO},a,1", f"{ZERO + 300},a,2"], "long/load.csv")
    table(["at,pod,queue length", f"{ZERO},a,3"], "long/queue.csv")
    options = TabularOptions(table=str(tmp_path / "long"), **LONG)
    load(store, options)
    assert telemetry(store, "load", "queue length") == [("a", 0, 1, 3), ("a", 300, 2, None)]
    with pytest.raises(InputError, match=r"--metrics depth: no such column in .*load.csv"):
        load(store, options.model_copy(update={"metrics": ("load", "queue length", "depth")}))


@pytest.mark.parametrize(
    ("unit", "one"), [("percent", 0.01), ("millicores", 0.001), ("per_minute", 1 / 60), (8, 8), (0.5, 0.5)]
)
def test_metrics_have_a_column_and_a_unit(store, table, unit, one):
    """Of a long table, and of a wide one, where the column is an ending."""
    metrics = {"cpu": {"column": "used (%)", "unit": unit}}
    rows = ["at,pod,used (%)", f"{ZERO},a,100", f"{ZERO + 60},a,300"]
    load(store, TabularOptions(table=table(rows), entity="pod", time="at", metrics=metrics, step=300))
    found = (pytest.approx(200 * one), pytest.approx(300 * one))
    assert telemetry(store, "cpu", "cpu_max") == [("a", 0, *found)]
    wide = ["at,a_used (%),a_rest", f"{ZERO},100,1", f"{ZERO + 60},300,1"]
    load(store, TabularOptions(table=table(wide), time="at", metrics=metrics, step=300))
    assert telemetry(store, "cpu", "cpu_max") == [("a", 0, *found)]


# -- clocks ------------------------------------------------------------------------------------------------


def go(at: int) -> str:
    """A time as Go prints it."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}.123456789 +0000 UTC m=+{at - ZERO}.25"


def clocked(table, tmp_path, *offsets: int, order: tuple[str, ...] = ("unix", "printed")) -> TabularOptions:
    """A file for each offset [s] of its column `unix` from what its column `printed` says."""
    (tmp_path / "pods").mkdir()
    for n, offset in enumerate(offsets):
        rows = [f"{ZERO + 60 * t + offset},{go(ZERO + 60 * t)},{t}" for t in range(5)]
        table(["unix,printed,load", *rows], f"pods/{n}.csv")
    return TabularOptions(
        table=str(tmp_path / "pods"), file_name=r"(?P<entity>\d)\.csv", time=order, metrics="load"
    )


EVERY_MINUTE = [(f"{pod}", 60 * t, float(t)) for pod in range(3) for t in range(5)]


@pytest.mark.parametrize("order", [("unix", "printed"), ("printed", "unix")])
def test_a_clock_that_is_off_is_named_and_the_other_one_used(store, table, tmp_path, order):
    figures = load(store, clocked(table, tmp_path, 0, 200_000_000, 3, order=order))
    assert telemetry(store, "load") == EVERY_MINUTE, "3 s are no wrong clock"
    assert figures["clocks"] == [
        {"file": "1.csv", "column": "unix", "offset": 200_000_000, "used": "printed"}
    ]
    assert store.read_json(f"telemetry/{MANIFEST}")["figures"]["clocks"] == figures["clocks"]


def test_clocks_that_are_off_everywhere_are_named_and_the_first_is_used(store, table, tmp_path):
    figures = load(store, clocked(table, tmp_path, 7200, 7200, 7200, order=("printed", "unix")))
    assert telemetry(store, "load") == EVERY_MINUTE
    assert [(off["file"], off["offset"]) for off in figures["clocks"]] == [
        (f"{n}.csv", 7200) for n in range(3)
    ]


def test_a_wrong_clock_without_another_is_refused(store, table, tmp_path):
    options = clocked(table, tmp_path, 0, 200_000_000, 0, order=("unix",))
    with pytest.raises(
        InputError, match=r"--time unix: the times of 1.csv are some 200,000,000 s from those"
    ):
        load(store, options)


@pytest.mark.parametrize("offset", [0, 8 * 3600])
def test_files_of_one_day_each_are_read_by_the_same_clock(store, table, tmp_path, offset):
    """Of two that may be off from each other by the hours of a zone."""
    (tmp_path / "days").mkdir()
    for day in range(3):
        hours = range(ZERO + 86_400 * day, ZERO + 86_400 * (day + 1), 3600)
        table(["unix,printed,pod,load", *(f"{at},{go(at + offset)},a,1" for at in hours)], f"days/{day}.csv")
    options = TabularOptions(
        table=str(tmp_path / "days"), entity="pod", time=("unix", "printed"), metrics="load"
    )
    figures = load(store, options)
    assert telemetry(store, "load") == [("a", 3600 * hour, 1) for hour in range(72)]
    assert [off["offset"] for off in figures["clocks"]] == ([offset] * 3 if offset else [])


def test_edges_with_a_wrong_clock_are_read_by_the_one_that_is_near_the_table(store, table):
    rows = [f"a,b,{ZERO + 60 * t - 10_000_000},{go(ZERO + 60 * t)}" for t in range(60)]
    graph = table(["source,target,timestamp,when", *rows], "edges.csv")
    options = TabularOptions(
        table=table(long_rows(40)), edges=graph, edges_time=("timestamp", "when"), **LONG
    )
    assert load(store, options)["clocks"] == [
        {"file": "edges.csv", "column": "timestamp", "offset": -10_000_000, "used": "when"}
    ]
    assert edges(store) == [(0, "a", "b", 60)]


def test_wide_edges_have_a_column_for_each_pair_and_come_and_go(store, table):
    """Nothing and 0 are no edge; what lies between the names may be anything that is no letter or digit."""
    rows = ["Time,web_db,web -> my_cache,my_cache_db,web_other"]
    rows += [f"{ZERO + 60 * t},{t // 60},{'' if t < 60 else 2},0,1" for t in range(180)]
    pods = ("web", "db", "my_cache")
    load_rows = ["at,pod,load", *(f"{ZERO + 300 * t},{pod},1" for t in range(40) for pod in pods)]
    options = TabularOptions(
        table=table(load_rows), entity="pod", time="at", metrics="load", edges=table(rows, "edges.csv")
    )
    figures = load(store, options)
    assert edges(store) == [
        (3600, "web", "db", 60),
        (3600, "web", "my_cache", 120),
        (7200, "web", "db", 120),
        (7200, "web", "my_cache", 120),
    ]
    assert (figures["edges"], figures["rows_rejected"]) == (2, {})
    bad = table(["at,web_db", f"{ZERO},-1", f"{ZERO},much", f"{ZERO},1"], "bad.csv")
    figures = load(store, options.model_copy(update={"edges": bad, "edges_time": ("at",)}))
    assert figures["rows_rejected"] == {"edges": {"weight is not a positive number": 2}}


def test_edges_may_be_in_many_files(store, table, tmp_path):
    (tmp_path / "calls").mkdir()
    for hour in range(3):
        table([f"from,to,value,time\na,b,{hour + 1},{ZERO + 3600 * hour}"], f"calls/{hour}.csv")
    load(store, TabularOptions(table=table(long_rows(40)), edges=str(tmp_path / "calls"), **LONG))
    assert [edge[3] for edge in edges(store)] == [1, 2, 3]


# -- real tables -------------------------------------------------------------------------------------------


def read_csv(*path: str) -> list[dict[str, str]]:
    """The rows of a file, by Python's own csv."""
    with (DATA.joinpath(*path)).open(newline="") as file:
        return list(csv.DictReader(file))


def example(store: Store, name: str, folder: str, table: str, graph: str | None = None) -> dict[str, Any]:
    if not (DATA / folder).exists():
        pytest.skip(f"{DATA / folder} is not here")
    options = read_yaml(str(EXAMPLES / f"{name}.yaml"))
    files = {"table": str(DATA / folder / table), "edges": graph and str(DATA / folder / graph)}
    described = TabularOptions(**files, **options["tabular"])
    figures = load(store, described)
    same = {"metrics": described.names, "level": described.level, "step": described.step}
    shard(store, ShardOptions(**same, **options["shard"] | {"windows": "default"}))
    return figures


def test_the_production_services_keep_every_bit(store):
    example(store, "production-services", "production-services", "services_5min.parquet")
    made = manifest.load(store, "default")
    assert (made.entities, made.steps) == (30, 12_960)
    rows = pl.read_parquet(DATA / "production-services" / "services_5min.parquet")
    for metric in ("m06", "m08", "m14"):
        expected = rows.with_columns(pl.col("service").cast(pl.String)).pivot(
            "service", index="step", values=metric
        )
        frames = [store.read_table(part.path) for part in made.shards]
        names = list(made.names)
        values = np.concatenate([frame[metric].to_numpy().reshape(-1, 30) for frame in frames])
        assert np.array_equal(values, expected.sort("step").select(names).to_numpy())


def test_the_sensors_of_los_loop_are_joined_as_the_matrix_says(store):
    example(store, "los-loop", "los-loop", "los_speed.csv", "los_adj.csv")
    made = manifest.load(store, "default")
    assert (made.entities, made.steps) == (207, 2016)
    speed = pl.read_csv(DATA / "los-loop" / "los_speed.csv")
    names, values = dense(store, "speed")
    assert np.array_equal(values, speed.select(names).to_numpy().astype(np.float32))
    matrix = np.loadtxt(DATA / "los-loop" / "los_adj.csv", delimiter=",")
    np.fill_diagonal(matrix, 0)
    found = np.zeros_like(matrix)
    at = {name: n for n, name in enumerate(speed.columns)}
    listed = edges(store)
    for time, source, target, weight in listed:
        if time == listed[0][0]:
            found[at[source], at[target]] = weight
    assert np.allclose(found, matrix, rtol=1e-6, atol=0)


def test_the_online_boutique_has_its_calls_hour_by_hour(store):
    """Against an independent reading of the same files."""
    figures = example(store, "online-boutique-24h", "online-boutique-24h", "nodes.csv", "edges.csv")
    made = manifest.load(store, "default")
    assert (made.entities, made.steps, figures["edges"]) == (11, 1441, 14)
    rows = read_csv("online-boutique-24h", "nodes.csv")
    names, values = dense(store, "cpu")
    kept = np.isfinite(values).all(1)
    assert kept.sum() == len(rows) == figures["rows_read"]["table"] == 1440
    assert np.array_equal(
        values[kept], np.array([[float(row[f"{n}_cpu"]) for n in names] for row in rows], "f4")
    )
    calls: Counter[tuple[int, str, str]] = Counter()
    for row in read_csv("online-boutique-24h", "edges.csv"):
        if (value := float(row["value"])) > 0:
            calls[int(row["timestamp"]) // 3600 * 3600 - ZERO, row["from"], row["to"]] += value
    assert {edge[:3]: edge[3] for edge in edges(store)} == pytest.approx(calls, rel=1e-6)


def test_the_online_boutique_of_nezha_is_read_by_the_right_clock(store):
    """Against an independent reading of the same files, by the clock that is right."""
    folder = "online-boutique-nezha"
    figures = example(store, folder, folder, "metric/*_metric.csv", "metric/source_50.csv")
    assert figures["clocks"] == [
        {
            "file": "adservice-5f6585d649-fnmft_metric.csv",
            "column": "TimeStamp",
            "offset": 200_000_000,
            "used": "Time",
        }
    ]
    expected: dict[tuple[str, int], list[float | None]] = {}
    columns = {"CpuUsageRate(%)": 100, "MemoryUsageRate(%)": 100, "PodWorkload(Ops)": 1}
    files = sorted((DATA / folder / "metric").glob("*_metric.csv"))
    rows = [row for file in files for row in read_csv(folder, "metric", file.name)]
    for row in rows:
        seconds = row["Time"].split(".")[0] + " +0000"
        at = int(datetime.strptime(seconds, "%Y-%m-%d %H:%M:%S %z").timestamp())
        expected[row["PodName"], at // 60 * 60 - ZERO] = [
            float(row[name]) / by for name, by in columns.items()
        ]
    found = {row[:2]: list(row[2:]) for row in telemetry(store, "cpu", "memory", "request_rate")}
    assert len(found) == len(rows) == figures["rows_read"]["table"] == 12_090
    assert found.keys() == expected.keys()
    got, wanted = (np.array([values[key] for key in sorted(expected)]) for values in (found, expected))
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    made = manifest.load(store, "default")
    assert made.names == tuple(sorted(file.name.split("-")[0] for file in files))

    calls: Counter[tuple[int, str, str]] = Counter()
    for row in read_csv(folder, "metric", "source_50.csv"):
        hour = int(row.pop("timestamp")) // 3600 * 3600 - ZERO
        for pair, value in row.items():
            if pair != "time" and value and float(value) > 0:
                calls[(hour, *pair.split("_"))] += float(value)
    assert {edge[:3]: edge[3] for edge in edges(store)} == pytest.approx(calls, rel=1e-6)
    assert figures["edges"] == 14

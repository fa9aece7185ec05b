"""A table of which only the columns are known becomes what shard reads, or an error says what is wrong."""

import gzip
import json
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
    ],
)
def test_options_that_contradict_the_store_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        TabularOptions(table="t.csv", **options)


# -- real tables -------------------------------------------------------------------------------------------


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
    figures = example(store, "online-boutique-24h", "online-boutique-24h", "nodes.csv", "edges.csv")
    made = manifest.load(store, "default")
    assert (made.entities, made.steps, figures["edges"]) == (11, 1441, 14)
    rows = pl.read_csv(DATA / "online-boutique-24h" / "nodes.csv")
    names, values = dense(store, "cpu")
    kept = np.isfinite(values).all(1)
    assert kept.sum() == len(rows) == 1440
    assert np.array_equal(values[kept], rows.select(f"{n}_cpu" for n in names).to_numpy().astype(np.float32))
    calls = pl.read_csv(DATA / "online-boutique-24h" / "edges.csv").filter(pl.col("value") > 0)
    keys = {"time": pl.col("timestamp") // 3600 * 3600 - ZERO, "source": "from", "target": "to"}
    summed = calls.group_by(**keys).agg(pl.col("value").sum()).sort("time", "source", "target")
    found = pl.DataFrame(edges(store), schema=["time", "source", "target", "value"], orient="row")
    assert found.select("time", "source", "target").equals(summed.select("time", "source", "target"))
    assert np.allclose(found["value"], summed["value"], rtol=1e-6)

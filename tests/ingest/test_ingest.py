"""The ingest job: raw rows → telemetry, entities, dependencies and rejected rows, each exactly once."""

import gzip
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.ingest import files, run
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.alibaba_2018 import TABLES

ZERO = datetime(2018, 1, 1, tzinfo=UTC)
DAY = 86_400
REAL = Path(__file__).parents[3] / "shared" / "data" / "alibaba-2018"
METRICS = {"cpu": 2, "memory": 3, "memory_bandwidth": 4, "mpki": 5, "net_in": 6, "net_out": 7, "disk_io": 8}

BAD_USAGE = [
    b"m_1,10,1,2,3",
    b"m_1,10,1,2,3,4,5,6,7,8,9",
    b"m_1,soon,1,2,3,4,5,6,7",
    b"m_1,10.5,1,2,3,4,5,6,7",
    b'm_1,10,"50",2,3,4,5,6,7',
    b"m_1,10,1,2,3,4,5,6,much",
    b",10,1,2,3,4,5,6,7",
    b"m_1,,1,2,3,4,5,6,7",
    b"m_1,-5,1,2,3,4,5,6,7",
    b"m_1,346896000,1,2,3,4,5,6,7",
    b"m_\xff\xfe,10,1,2,3,4,5,6,7",
    b"",
    b"",
]
BAD_TASKS = [b"M1,1,j_9,1,Terminated,500,400,100,0.5", b"M1,1,,1,Terminated,500,600,100,0.5"]
TASKS = [b"M1,1,j_1,1,Terminated,500,600,100,0.5", b"R2_1,,j_1,1,Waiting,700,0,,"]


def usage(machines: int, days: int, seed: int = 0, every: int = 700) -> list[bytes]:
    """Rows of machine_usage in no order, with values of two decimals, empty ones, -1 and 101, and a gap."""
    rng = np.random.default_rng(seed)
    rows = []
    for machine in range(machines):
        for stamp in range(0, days * DAY, every):
            stamp += int(rng.integers(every))
            values = [f"{value:.2f}" for value in rng.uniform(0, 100, 7)]
            values[6] = str(rng.choice([values[6], "-1", "101", "0", ""]))
            if stamp < days * DAY and not 30_000 <= stamp < 40_000:
                rows.append(f"m_{machine},{stamp},{','.join(values)}".encode())
    return [rows[i] for i in rng.permutation(len(rows))]


def lines(rows: list[bytes]) -> bytes:
    return b"".join(row + b"\n" for row in rows)


def mixed() -> bytes:
    """Good and bad rows, CRLF among the line ends."""
    rows = usage(3, 2)
    step = len(rows) // len(BAD_USAGE)
    for place, bad in enumerate(BAD_USAGE):
        rows.insert(place * (step + 1) + 1, bad)
    return b"".join(row + (b"\r\n" if i % 5 == 0 else b"\n") for i, row in enumerate(rows))


def read_by_pandas(path: Path, table: str) -> tuple[pd.DataFrame, pd.Series]:
    """Every row as pandas sees it, and the reason why it cannot be used (or "")."""
    columns = TABLES[table].columns
    width = len(columns)
    raw = pd.read_csv(
        path,
        sep="\x01",
        header=None,
        names=["line"],
        dtype=str,
        keep_default_na=False,
        skip_blank_lines=False,
        quoting=3,
        encoding_errors="replace",
    )["line"]
    widths = raw.str.count(",") + 1
    fields = raw.str.split(",", expand=True).fillna("")
    frame = fields.iloc[:, :width].set_axis(list(columns), axis=1)
    reason = pd.Series("", index=raw.index)

    def because(bad: pd.Series, why: pd.Series | str) -> None:
        reason[:] = np.where((reason == "") & bad, why, reason)

    because(raw.str.contains("�"), "not UTF-8")
    because(widths != width, widths.astype(str) + f" columns, expected {width}")
    for name, dtype in columns.items():
        if dtype != pl.String:
            number = pd.to_numeric(frame[name], errors="coerce")
            whole = dtype == pl.Int64
            wrong = number.isna() | (whole & (number % 1 != 0))
            because((frame[name] != "") & wrong, f"{name} is not a {'whole number' if whole else 'number'}")
            frame[name] = number
    ids, clock = {
        "machine_usage": (["machine_id"], "time_stamp"),
        "container_usage": (["container_id"], "time_stamp"),
        "machine_meta": (["machine_id"], "time_stamp"),
        "batch_task": (["job_name", "task_name"], "start_time"),
    }[table]
    for name in ids:
        because(frame[name] == "", f"{name} is empty")
    because(frame[clock].isna(), f"{clock} is empty")
    because(~frame[clock].between(0, 10 * 366 * DAY), f"{clock} is outside 0 to 10 years")
    if "end_time" in frame:
        early = (frame["end_time"] != 0) & (frame["end_time"] < frame["start_time"])
        because(early, "end_time is before start_time")
    return frame, reason


def binned_by_pandas(rows: pd.DataFrame, step: int = 300) -> pl.DataFrame:
    """Telemetry of machine_usage, by groupby on the raw rows."""
    names = list(TABLES["machine_usage"].columns)
    values = {}
    for metric, column in METRICS.items():
        raw = rows[names[column]].astype("float32").astype("float64")
        divisor = 1 if metric == "mpki" else 100
        values[metric] = raw.where((raw >= 0) & ((raw <= 100) | (divisor == 1))) / divisor
    time = rows["time_stamp"].astype("int64") // step * step + int(ZERO.timestamp())
    grouped = pd.DataFrame(values).groupby([rows["machine_id"], time])
    mean = grouped.mean().astype("float32")
    maximum = grouped.max().astype("float32").add_suffix("_max")
    both = mean.join(maximum).assign(samples=grouped.size()).reset_index()
    frame = pl.from_pandas(both, nan_to_null=True).rename({"machine_id": "entity", "time_stamp": "time"})
    return frame.with_columns((pl.col("time") * 1000).cast(pl.Datetime("ms", "UTC"))).sort("entity", "time")


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tar.gz"])
def test_counts_and_bins_agree_with_pandas_on_every_kind_of_bad_row(tmp_path, put, ingested, table, form):
    put(tmp_path / "raw" / f"machine_usage.{form}", mixed())
    put(tmp_path / "raw" / f"batch_task.{form}", lines(TASKS + BAD_TASKS))
    store, figures = ingested(tmp_path / "raw", tmp_path / "store", max_rejected_share=0.6)

    put(tmp_path / "machine_usage.csv", mixed())
    put(tmp_path / "batch_task.csv", lines(TASKS + BAD_TASKS))
    usable = {}
    for name in ("machine_usage", "batch_task"):
        frame, reason = read_by_pandas(tmp_path / f"{name}.csv", name)
        assert figures["rows_read"][name] == len(frame)
        assert figures["rows_rejected"][name] == reason[reason != ""].value_counts().to_dict()
        usable[name] = frame[reason == ""]
    assert sum(figures["rows_rejected"]["machine_usage"].values()) == len(BAD_USAGE)

    disk = usable["machine_usage"]["disk_io_percent"]
    assert figures["values_nulled"] == {"machine_usage": {"disk_io_percent": int(disk.isin([-1, 101]).sum())}}
    expected = binned_by_pandas(usable["machine_usage"])
    found = table(store, "telemetry").sort("entity", "time")
    assert found["cpi"].null_count() == len(found)  # a metric of containers
    for column in expected.columns:
        assert found[column].cast(expected[column].dtype).to_list() == expected[column].to_list(), column
    assert found["disk_io"].null_count() > 0 < (found["disk_io"] == 0).sum()


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tar.gz"])
def test_a_rejected_row_is_found_again_by_its_offset(tmp_path, put, ingested, table, monkeypatch, form):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(run, "chunks", lambda found, *_: files.chunks(found, 3001, {}))
    content = mixed()
    put(tmp_path / "raw" / f"machine_usage.{form}", content)
    store, _ = ingested(tmp_path / "raw", tmp_path / "store")
    rejected = table(store, "rejected").sort("offset")
    assert set(rejected["table"]) == {"machine_usage"}
    assert set(rejected["file"]) == {f"machine_usage.{form}"}
    places = [content[offset:].split(b"\n", 1)[0].removesuffix(b"\r") for offset in rejected["offset"]]
    assert places == BAD_USAGE
    assert rejected["line"].to_list() == [line.decode(errors="backslashreplace") for line in places]


def test_telemetry_does_not_depend_on_how_the_rows_are_cut(tmp_path, put, ingested, table, monkeypatch):
    rows = usage(4, 2)
    put(tmp_path / "one" / "machine_usage.csv", lines(rows))
    for part, start in enumerate(range(0, len(rows), 150)):
        put(tmp_path / "many" / f"machine_usage-{part}.csv.gz", lines(rows[start : start + 150]))
    put(tmp_path / "reversed" / "machine_usage.tar.gz", lines(rows[::-1]))

    def telemetry(source: str, name: str, **options) -> pl.DataFrame:
        store, _ = ingested(tmp_path / source, tmp_path / name, **options)
        return table(store, "telemetry")

    whole = telemetry("one", "a")
    assert whole["samples"].sum() == len(rows)
    assert telemetry("many", "b").equals(whole)
    assert telemetry("reversed", "c", buckets=4).equals(whole)
    monkeypatch.setattr(files, "BLOCK_BYTES", 500)
    monkeypatch.setattr(run, "chunks", lambda found, *_: files.chunks(found, 4000, {}))
    assert telemetry("one", "d").equals(whole)
    assert telemetry("many", "e", buckets=4).equals(whole)


def test_bins_and_days_start_with_the_trace(tmp_path, put, ingested, table):
    put(
        tmp_path / "raw" / "machine_usage.csv",
        b"m_1,86399,50,,,,,,\nm_1,86400,60,,,,,,\nm_1,87299,70,,,,,,\n",
    )
    store, figures = ingested(tmp_path / "raw", tmp_path / "store", step="15min", start="2020-02-28")
    start = datetime(2020, 2, 28, tzinfo=UTC)
    assert table(store, "telemetry").select("time", "cpu_max", "samples").rows() == [
        (start + timedelta(seconds=85_500), np.float32(0.5), 1),
        (start + timedelta(days=1), float(np.float32(0.7)), 2),
    ]
    folders = {path.split("/")[1] for path in store.list("telemetry", ".parquet")}
    assert folders == {"date=2020-02-28", "date=2020-02-29"}
    assert figures["bins"] == {"machine": 2}
    assert store.read_json(f"telemetry/{MANIFEST}")["spans"]["machine"] == {
        "first": int(start.timestamp()) + 85_500,
        "last": int(start.timestamp()) + DAY,
    }


# -- again ------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path, put) -> Path:
    """Three days of usage in three files, with jobs and containers."""
    for day in range(3):
        rows = [row for row in usage(3, 3) if int(row.split(b",")[1]) // DAY == day]
        put(tmp_path / "raw" / f"machine_usage-{day}.csv", lines([*rows, b"broken"]))
    put(tmp_path / "raw" / "batch_task.csv", lines(TASKS))
    put(
        tmp_path / "raw" / "batch_instance.csv",
        b"i,M1,j_1,1,Terminated,500,600,m_0,1,1,,,,\ni,R2_1,j_1,1,Terminated,700,800,m_1,1,1,,,,\n",
    )
    put(tmp_path / "raw" / "container_meta.csv", b"c_1,m_0,0,a,started,1,1,1\nc_2,m_2,0,a,started,1,1,1\n")
    put(tmp_path / "raw" / "container_usage.csv", b"c_1,m_0,90000,50,50,1,1,1,1,1,1\n")
    return tmp_path / "raw"


def contents(store: Store, table) -> dict[str, pl.DataFrame]:
    return {name: table(store, name) for name in ("telemetry", "entities", "dependencies", "rejected")}


def same(left: dict[str, pl.DataFrame], right: dict[str, pl.DataFrame]) -> bool:
    return all(left[name].equals(right[name]) for name in left)


def counts(figures: dict) -> dict:
    return {
        name: value
        for name, value in figures.items()
        if name not in ("peak_bytes", "stage_seconds", "stage_peak_bytes", "skipped")
    }


def test_with_nothing_new_nothing_is_done(raw, tmp_path, ingested, tasks):
    store, first = ingested(raw, tmp_path / "store")
    done, before = tasks.done, store.read_bytes(f"telemetry/{MANIFEST}")
    _, again = ingested(raw, tmp_path / "store")
    assert not first["skipped"]
    assert again["skipped"]
    assert counts(again) == counts(first)
    assert tasks.done == done
    assert store.read_bytes(f"telemetry/{MANIFEST}") == before


def test_more_files_add_only_what_is_new_and_equal_all_at_once(raw, tmp_path, ingested, tasks, table):
    whole, figures = ingested(raw, tmp_path / "whole")
    later = tmp_path / "later"
    later.mkdir()
    for name in ("machine_usage-2.csv", "container_meta.csv"):
        (raw / name).rename(later / name)
    store, _ = ingested(raw, tmp_path / "store")
    first_day = [path for path in store.list("telemetry") if "2018-01-01" in path]
    stamps = [store.fs.modified(store.path(path)) for path in first_day]

    done = tasks.done
    for name in ("machine_usage-2.csv", "container_meta.csv"):
        (later / name).rename(raw / name)
    _, added = ingested(raw, tmp_path / "store")
    # two chunks and what they say of entities; the third day; entities; the placements of containers; the
    # dependencies of all days, for containers now join machines
    assert tasks.done - done == 2 + 1 + 1 + 1 + 1 + 3
    assert [store.fs.modified(store.path(path)) for path in first_day] == stamps
    assert same(contents(store, table), contents(whole, table))
    assert counts(added) == counts(figures)


def test_another_source_folder_adds_to_the_same_store(raw, tmp_path, put, ingested, table):
    whole, _ = ingested(raw, tmp_path / "whole")
    (tmp_path / "other").mkdir()
    (raw / "machine_usage-1.csv").rename(tmp_path / "other" / "machine_usage-1.csv")
    ingested(raw, tmp_path / "store")
    store, figures = ingested(tmp_path / "other", tmp_path / "store")
    assert figures["rows_read"]["machine_usage"] == len(usage(3, 3)) + 3
    assert same(contents(store, table), contents(whole, table))


def test_a_replaced_file_takes_its_old_rows_with_it(raw, tmp_path, put, ingested, table):
    put(tmp_path / "fourth", lines([b"m_7,300000,1,2,3,4,5,6,7", b"worse"]))
    fourth = raw / "machine_usage-3.csv"
    fourth.write_bytes((tmp_path / "fourth").read_bytes())
    store, _ = ingested(raw, tmp_path / "store", max_rejected_share=0.5)
    assert "m_7" in table(store, "entities")["entity"]
    fourth.write_bytes(b"m_0,200000,1,2,3,4,5,6,7\n")
    _, figures = ingested(raw, tmp_path / "store")
    whole, expected = ingested(raw, tmp_path / "whole")
    assert same(contents(store, table), contents(whole, table))
    assert counts(figures) == counts(expected)
    assert "2018-01-04" not in "".join(store.list("telemetry") + store.list("dependencies"))


def test_the_same_content_under_another_name_counts_once(raw, tmp_path, ingested, table):
    whole, _ = ingested(raw, tmp_path / "whole")
    (raw / "machine_usage-9.csv").write_bytes((raw / "machine_usage-1.csv").read_bytes())
    store, _ = ingested(raw, tmp_path / "store")
    assert same(
        {k: v for k, v in contents(store, table).items() if k != "rejected"},
        {k: v for k, v in contents(whole, table).items() if k != "rejected"},
    )
    _, again = ingested(raw, tmp_path / "whole")
    assert again["skipped"]


def test_files_that_were_renamed_and_written_anew_keep_all_their_rows(tmp_path, put, ingested):
    """As logs rotate: the old content is found under a new name, and the old name holds new content."""
    rows = usage(1, 1)
    put(tmp_path / "raw" / "machine_usage.csv", lines(rows[:50]))
    ingested(tmp_path / "raw", tmp_path / "store")
    (tmp_path / "raw" / "machine_usage.csv").rename(tmp_path / "raw" / "machine_usage.1.csv")
    put(tmp_path / "raw" / "machine_usage.csv", lines(rows[50:]))
    _, figures = ingested(tmp_path / "raw", tmp_path / "store")
    assert figures["rows_read"]["machine_usage"] == len(rows)


def test_another_chunk_size_changes_nothing(raw, tmp_path, ingested, table, monkeypatch):
    """What an earlier run read in other chunks is not taken for these."""
    whole, expected = ingested(raw, tmp_path / "whole")
    with monkeypatch.context() as small:
        small.setattr(run, "chunks", lambda found, *_: files.chunks(found, 3000, {}))
        ingested(raw, tmp_path / "store")
    (raw / "machine_usage-3.csv").write_bytes(b"m_0,200000,1,2,3,4,5,6,7\n")
    store, figures = ingested(raw, tmp_path / "store")
    whole, expected = ingested(raw, tmp_path / "whole")
    assert same(contents(store, table), contents(whole, table))
    assert counts(figures) == counts(expected)


@pytest.mark.parametrize("done", [0, 3, 7, 8, 9, 12, 13, 14, 16])
def test_a_job_that_died_is_run_again_and_gives_the_same(raw, tmp_path, ingested, tasks, table, done):
    whole, expected = ingested(raw, tmp_path / "whole")
    tasks.done, tasks.dies_after = 0, done
    with pytest.raises(KeyboardInterrupt):
        ingested(raw, tmp_path / "store")
    store = Store(str(tmp_path / "store"))
    assert not store.exists(f"telemetry/{MANIFEST}")
    tasks.done, tasks.dies_after = 0, None
    _, figures = ingested(raw, tmp_path / "store")
    # 7 chunks, what they say of entities, 4 parts of telemetry, entities, placements, 3 days of dependencies
    assert tasks.done == 17 - done
    assert same(contents(store, table), contents(whole, table))
    assert counts(figures) == counts(expected)


def test_only_what_is_missing_is_built_again(raw, tmp_path, ingested, tasks, table):
    store, first = ingested(raw, tmp_path / "store")
    before = contents(store, table)
    store.remove(f"telemetry/{MANIFEST}")
    done = tasks.done
    _, figures = ingested(raw, tmp_path / "store")
    assert tasks.done == done
    assert counts(figures) == counts(first)

    store.remove(f"telemetry/{MANIFEST}")
    store.remove(store.list("telemetry", ".parquet")[0])
    ingested(raw, tmp_path / "store")
    assert tasks.done == done + 1
    assert same(contents(store, table), before)


def test_what_a_run_with_other_settings_left_is_not_used(raw, tmp_path, ingested, tasks, table):
    whole, _ = ingested(raw, tmp_path / "whole", step=600)
    tasks.done, tasks.dies_after = 0, 5
    with pytest.raises(KeyboardInterrupt):
        ingested(raw, tmp_path / "store", step=300)
    tasks.dies_after = None
    store, _ = ingested(raw, tmp_path / "store", step=600)
    assert same(contents(store, table), contents(whole, table))


# -- what is refused --------------------------------------------------------------------------------------


def test_over_the_share_of_bad_rows_nothing_is_published_but_the_rows_are_kept(
    tmp_path, put, ingested, tasks, table
):
    put(tmp_path / "raw" / "machine_usage.csv", lines([*usage(1, 1)[:98], b"broken", b",1,1,1,1,1,1,1,1"]))
    with pytest.raises(InputError) as failure:
        ingested(tmp_path / "raw", tmp_path / "store", max_rejected_share=0.019)
    assert str(failure.value) == (
        "machine_usage: 2 of 100 rows cannot be used "
        + "(2.0%; 1 columns, expected 9: 1, machine_id is empty: 1), more than --max-rejected-share 0.019; "
        + "the rows are in rejected/machine_usage, nothing was published"
    )
    store = Store(str(tmp_path / "store"))
    assert not store.list("telemetry")
    assert sorted(table(store, "rejected")["line"]) == [",1,1,1,1,1,1,1,1", "broken"]
    done = tasks.done
    _, figures = ingested(tmp_path / "raw", tmp_path / "store", max_rejected_share=0.02)
    assert sum(figures["rows_rejected"]["machine_usage"].values()) == 2
    assert tasks.done - done == 4  # the chunk is not read again


def test_over_the_share_in_new_files_what_was_published_stays(raw, tmp_path, ingested, table):
    store, _ = ingested(raw, tmp_path / "store")
    before = table(store, "telemetry")
    (raw / "machine_usage-3.csv").write_bytes(b"garbage\n" * 100)
    with pytest.raises(InputError, match="machine_usage: 103 of"):
        ingested(raw, tmp_path / "store")
    assert store.exists(f"telemetry/{MANIFEST}")
    assert table(store, "telemetry").equals(before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("machine_usage.csv", b"", "machine_usage.csv: the file is empty"),
        ("machine_usage.csv.gz", gzip.compress(b""), "machine_usage.csv.gz: the file is empty"),
        ("machine_usage.csv.gz", gzip.compress(mixed())[:-100], "machine_usage.csv.gz: expected a complete"),
        ("machine_usage.csv.gz", b"no gzip at all", "machine_usage.csv.gz: expected a complete"),
        ("machine_usage.csv", bytes(range(11, 256)) * 9, "machine_usage: 1 of 1 rows cannot be used"),
        (
            "machine_meta.csv",
            b"m_1,0,a,b,96,100,USING\n",
            "no usable row of machine_usage or container_usage",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_nothing_is_published(
    tmp_path, ingested, name, content, message
):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        ingested(tmp_path / "raw", tmp_path / "store")
    assert not Store(str(tmp_path / "store")).exists(f"telemetry/{MANIFEST}")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("step", 600, r"--step 600: the store .*store was ingested with 300; use that, or another store"),
        ("buckets", 2, r"--buckets 2: the store .* was ingested with 1"),
        (
            "start",
            datetime(2019, 1, 1),
            r"--start 2019-01-01T00:00:00Z: .* ingested with 2018-01-01T00:00:00Z",
        ),
    ],
)
def test_a_store_has_one_step_start_and_number_of_buckets(raw, tmp_path, ingested, option, value, message):
    ingested(raw, tmp_path / "store")
    with pytest.raises(InputError, match=message):
        ingested(raw, tmp_path / "store", **{option: value})


def test_a_new_store_has_buckets_for_the_size_of_its_raw_rows_and_keeps_them(
    tmp_path, put, ingested, monkeypatch
):
    rows = put(tmp_path / "raw" / "machine_usage-0.csv", lines(usage(4, 1)))
    monkeypatch.setattr(run, "_BUCKET_BYTES", rows.stat().st_size // 3)
    store, _ = ingested(tmp_path / "raw", tmp_path / "store")
    buckets = store.read_json(f"telemetry/{MANIFEST}")["settings"]["buckets"]
    assert buckets == 3
    put(tmp_path / "raw" / "machine_usage-1.csv", lines(usage(40, 2, seed=1)))
    ingested(tmp_path / "raw", tmp_path / "store")
    ingested(tmp_path / "raw", tmp_path / "store", buckets=3)
    assert {path[-10:-8] for path in store.list("telemetry", ".parquet")} == {"00", "01", "02"}
    with pytest.raises(InputError, match=r"--buckets 2: the store .* was ingested with 3"):
        ingested(tmp_path / "raw", tmp_path / "store", buckets=2)


def test_compressed_raw_rows_count_five_times(tmp_path, put, ingested, monkeypatch):
    rows = put(tmp_path / "raw" / "machine_usage.csv.gz", lines(usage(4, 1)))
    monkeypatch.setattr(run, "_BUCKET_BYTES", rows.stat().st_size)
    store, _ = ingested(tmp_path / "raw", tmp_path / "store")
    assert store.read_json(f"telemetry/{MANIFEST}")["settings"]["buckets"] == 5


def test_what_an_earlier_version_has_ingested_is_refused(raw, tmp_path, ingested):
    store, _ = ingested(raw, tmp_path / "store")
    state = store.read_json("ingested/manifest.json")
    del state["format"]
    store.write_json("ingested/manifest.json", state)
    with pytest.raises(InputError, match="was ingested by an earlier version; ingest into another store"):
        ingested(raw, tmp_path / "store")


def test_what_an_earlier_version_left_unfinished_is_forgotten(raw, tmp_path, ingested):
    """It had read a chunk and died; its receipts say other things than ours."""
    store = Store(str(tmp_path / "store")).open_or_create()
    whole, figures = ingested(raw, tmp_path / "whole")
    state = whole.read_json("ingested/manifest.json")
    begun = {"settings": state["settings"], "files": [], "read": {}, "stray": []}
    store.write_json("ingested/manifest.json", begun)
    for file in state["files"]:
        size = file["size"]
        receipt = {"places": {"machine/date=2018-01-01/bucket=00": 1}, "whole": [], "rows": 1}
        store.write_json(f"ingested/chunks/{file['key']}-{128 << 20}-0+{size}.json", receipt)
    assert ingested(raw, tmp_path / "store")[1]["rows_read"] == figures["rows_read"]


def test_a_folder_of_other_things_is_no_store(raw, tmp_path, ingested):
    with pytest.raises(InputError, match=r"the folder holds other files and no store.json"):
        ingested(raw, raw)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "google-2019"}, "unknown trace; known: alibaba-2018"),
        ({"step": 7}, "expected a width that divides a day"),
        ({"step": 0}, "expected a width that divides a day"),
        ({"step": "90min", "slice": "2h"}, r"slice \(7200 s\) must be a multiple of step \(5400 s\)"),
        ({"start": datetime(2018, 1, 1, 6)}, "expected midnight UTC"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IngestOptions(**options)


# -- entities and dependencies ----------------------------------------------------------------------------


def machine_rows(*machines: str, days: int = 2) -> bytes:
    """One sample a day."""
    return lines([f"{m},{day * DAY + 1},50,50,1,1,1,1,1".encode() for m in machines for day in range(days)])


def edges(frame: pl.DataFrame, kind: str) -> dict[tuple[int, str, str], float]:
    """(second of the slice, source, target) → weight."""
    rows = frame.filter(pl.col("kind") == kind).select("time", "source", "target", "weight").iter_rows()
    return {
        (int((time - ZERO).total_seconds()), source, target): weight for time, source, target, weight in rows
    }


def test_entities_keep_their_capacity_parent_service_and_last_telemetry(tmp_path, put, ingested, table):
    put(tmp_path / "raw" / "machine_usage.csv", machine_rows("m_1"))
    put(tmp_path / "raw" / "machine_meta.csv", b"m_1,0,a,b,96,100,USING\nm_2,0,a,b,64,50,USING\n")
    put(
        tmp_path / "raw" / "container_meta.csv",
        b"c_1,m_1,90,app_1,started,400,800,1.5\nc_1,m_2,99,app_1,started,400,800,1.5\n"
        b"c_2,m_1,10,app_2,started,400,400,3\n",
    )
    put(tmp_path / "raw" / "container_usage.csv", b"c_1,m_2,90000,50,50,1,1,1,1,1,1\n")
    store, _ = ingested(tmp_path / "raw", tmp_path / "store")
    assert table(store, "entities").sort("kind", "entity").rows() == [
        ("c_1", "container", "m_2", "app_1", 8.0, 1.5, True, ZERO + timedelta(seconds=90_000)),
        ("c_2", "container", "m_1", "app_2", 4.0, 3.0, False, None),
        ("m_1", "machine", None, None, 96.0, 100.0, True, ZERO + timedelta(days=1)),
        ("m_2", "machine", None, None, 64.0, 50.0, False, None),
        ("app_1", "service", None, None, None, None, True, ZERO + timedelta(seconds=90_000)),
        ("app_2", "service", None, None, None, None, False, None),
    ]


@pytest.mark.parametrize("buckets", [1, 4])
def test_batch_edges_run_from_upstream_to_downstream_machines_also_past_midnight(
    tmp_path, put, ingested, table, buckets
):
    def task(name: str, job: str, start: int) -> bytes:
        return f"{name},1,{job},1,Terminated,{start},{start + 60},100,0.5".encode()

    def instance(name: str, job: str, start: int, machine: str) -> bytes:
        return f"i,{name},{job},1,Terminated,{start},{start + 60},{machine},1,1,,,,".encode()

    put(tmp_path / "raw" / "machine_usage.csv", machine_rows("m_a", "m_b", "m_c", days=2))
    put(
        tmp_path / "raw" / "batch_task.csv",
        lines(
            [
                task("M1", "j_1", DAY - 1000),
                task("R2_1", "j_1", DAY - 900),  # waits, and starts its instances after midnight
                task("M1", "j_2", 3700),
                task("J2_1", "j_2", 3800),
                task("task_LTg==", "j_2", 3800),
            ]
        ),
    )
    put(
        tmp_path / "raw" / "batch_instance.csv",
        lines(
            [
                *[instance("M1", "j_1", DAY - 950, "m_a")] * 3,
                instance("M1", "j_1", DAY - 950, "m_b"),
                *[instance("R2_1", "j_1", DAY + 500, "m_c")] * 4,
                instance("M1", "j_2", 3700, "m_c"),
                instance("J2_1", "j_2", 3900, "m_a"),
                instance("task_LTg==", "j_2", 3900, "m_b"),
            ]
        ),
    )
    store, figures = ingested(tmp_path / "raw", tmp_path / "store", buckets=buckets)
    found = table(store, "dependencies")
    assert edges(found, "batch") == {
        (3600, "m_c", "m_a"): 1.0,
        (DAY, "m_a", "m_c"): 3.0,
        (DAY, "m_b", "m_c"): 1.0,
    }
    assert figures["dependencies"] == {"batch": 3}
    by_day = {path.split("/")[1]: store.read_table(path).num_rows for path in store.list("dependencies")}
    assert by_day == {"date=2018-01-01": 1, "date=2018-01-02": 2}


def test_machines_that_share_a_service_are_joined_while_their_containers_run(tmp_path, put, ingested, table):
    put(tmp_path / "raw" / "machine_usage.csv", machine_rows("m_a", "m_b", days=2))
    put(
        tmp_path / "raw" / "container_meta.csv",
        b"c_1,m_a,0,app,started,1,1,1\n"
        b"c_2,m_b,7300,app,started,1,1,1\nc_2,m_b,7300,app,started,1,1,1\nc_2,m_b,14500,app,stopped,1,1,1\n"
        b"c_3,m_b,0,other,started,1,1,1\n",
    )
    store, figures = ingested(tmp_path / "raw", tmp_path / "store")
    both_ways = [("m_a", "m_b"), ("m_b", "m_a")]
    assert edges(table(store, "dependencies"), "colocation") == {
        (slice_, *pair): 1.0 for slice_ in (7200, 10_800, 14_400) for pair in both_ways
    }
    assert figures["dependencies"] == {"colocation": 6}


def moving(day: int, seed: int) -> list[bytes]:
    """A day in which m_1 and m_2 move together and m_3 on its own."""
    rng = np.random.default_rng(seed)
    together, alone = rng.uniform(0, 100, (2, 96))
    rows = []
    for quarter in range(96):
        stamp = day * DAY + quarter * 900
        for name, value in (("m_1", together), ("m_2", together), ("m_3", alone)):
            rows.append(f"{name},{stamp},{value[quarter]:.2f},,,,,,".encode())
    return rows


def test_correlation_stands_in_only_where_nothing_is_recorded_and_knows_only_the_day_before(
    tmp_path, put, ingested, table
):
    put(tmp_path / "raw" / "machine_usage-0.csv", lines(moving(0, seed=0)))
    put(tmp_path / "raw" / "machine_usage-1.csv", lines(moving(1, seed=1)))
    store, _ = ingested(tmp_path / "raw", tmp_path / "a")
    found = table(store, "dependencies")
    correlated = edges(found, "correlation")
    assert {(source, target) for _, source, target in correlated} == {("m_1", "m_2"), ("m_2", "m_1")}
    assert {second for second, _, _ in correlated} == set(range(DAY, 2 * DAY, 3600))
    assert list(correlated.values()) == pytest.approx([1.0] * 48, abs=1e-5)

    put(tmp_path / "raw" / "machine_usage-1.csv", lines([b"m_3,90000,7,,,,,,", *moving(1, seed=2)[:9]]))
    other, _ = ingested(tmp_path / "raw", tmp_path / "b")
    assert table(other, "dependencies").equals(found)

    put(tmp_path / "raw" / "container_meta.csv", b"c_1,m_1,0,a,started,1,1,1\nc_2,m_3,0,a,started,1,1,1\n")
    recorded, _ = ingested(tmp_path / "raw", tmp_path / "b")
    assert set(table(recorded, "dependencies")["kind"]) == {"colocation"}


def test_steps_too_long_to_correlate_give_no_edges(tmp_path, put, ingested):
    put(tmp_path / "raw" / "machine_usage.csv", lines(moving(0, seed=0) + moving(1, seed=1)))
    _, figures = ingested(tmp_path / "raw", tmp_path / "store", step="12h", slice="12h")
    assert figures["dependencies"] == {}


def test_only_the_strongest_neighbours_are_kept(tmp_path, put, ingested, table):
    machines = [f"m_{i}" for i in range(5)]
    put(tmp_path / "raw" / "machine_usage.csv", machine_rows(*machines, days=1))
    placed = [f"c_{i},{m},0,app,started,1,1,1".encode() for i, m in enumerate(machines)]
    put(tmp_path / "raw" / "container_meta.csv", lines(placed))
    store, _ = ingested(tmp_path / "raw", tmp_path / "store", neighbours=2)
    assert table(store, "dependencies").group_by("time", "target").len()["len"].unique().to_list() == [2]


# -- the real thing ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the rows of cluster-trace-v2018 are not in {REAL}")
def test_real_rows_agree_with_pandas_and_the_hole_of_the_second_day_stays_empty(tmp_path, ingested, table):
    store, figures = ingested(REAL, tmp_path / "store", max_rejected_share=0.5)
    usable = {}
    for path in sorted(REAL.glob("*.csv")):
        frame, reason = read_by_pandas(path, path.stem)
        assert figures["rows_read"][path.stem] == len(frame)
        rejected = reason[reason != ""].value_counts().to_dict()
        assert figures["rows_rejected"].get(path.stem, {}) == rejected
        usable[path.stem] = frame[reason == ""]
    disk = usable["machine_usage"]["disk_io_percent"]
    assert figures["values_nulled"]["machine_usage"] == {"disk_io_percent": int(disk.isin([-1, 101]).sum())}
    expected = binned_by_pandas(usable["machine_usage"])
    found = table(store, "/machine-").sort("entity", "time")
    for column in expected.columns:
        assert found[column].cast(expected[column].dtype).to_list() == expected[column].to_list(), column
    hole = [ZERO + timedelta(seconds=at) for at in (141_600, 160_200)]  # the whole bins inside
    assert found.filter(pl.col("time").is_between(*hole)).is_empty()


def test_under_ray_the_job_gives_the_same(raw, tmp_path, ingested, table, ray_cluster, monkeypatch):
    alone, expected = ingested(raw, tmp_path / "alone")
    monkeypatch.undo()
    store = Store(str(tmp_path / "store"))
    figures = ingest(store, str(raw), IngestOptions())
    assert same(contents(store, table), contents(alone, table))
    assert counts(figures) == counts(expected)
    assert figures["peak_bytes"] > 1 << 20

    with tarfile.open(raw / "machine_usage-4.tar.gz", "w:gz") as two:
        two.add(raw / "machine_usage-0.csv")
        two.add(raw / "machine_usage-1.csv")
    with pytest.raises(InputError, match=r"machine_usage-4.tar.gz: the archive holds more than one file"):
        ingest(store, str(raw), IngestOptions())
    assert store.exists(f"telemetry/{MANIFEST}")

"""Partial products: parts of parts, or all at once, merge to the same."""

from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from fleetcast.traces.alibaba_2018 import METRICS, TABLES
from fleetcast.traces.products import PRODUCTS, last_known, partitions, telemetry
from fleetcast.traces.raw import Binning, parse

CLOCK = Binning(start=int(datetime(2018, 1, 1, tzinfo=UTC).timestamp()), step=300, slice=3600)


def usage(rows: int, seed: int = 0) -> list[bytes]:
    """Lines of machine_usage with two decimals, in no order."""
    rng = np.random.default_rng(seed)
    percent = rng.uniform(0, 100, (rows, 7)).round(2)
    stamps = rng.integers(0, 3000, rows)
    return [
        f"m_{i % 3},{stamp},{','.join(map(str, values))}\n".encode()
        for i, (stamp, values) in enumerate(zip(stamps, percent, strict=True))
    ]


def products(table: str, lines: list[bytes]) -> dict[str, pl.DataFrame]:
    return TABLES[table].products(parse(b"".join(lines), TABLES[table]).frame, CLOCK)


@pytest.mark.parametrize("cuts", [(100,), (1, 2, 500), (250, 251, 999)])
def test_sums_of_bins_are_the_same_to_the_last_bit_however_the_rows_are_cut(cuts):
    lines = usage(1000)
    whole = products("machine_usage", lines)["machine"].sort("entity", "time")
    edges = [0, *cuts, len(lines)]
    parts = [products("machine_usage", lines[a:b])["machine"] for a, b in pairwise(edges)]
    merge = PRODUCTS["machine"].merge
    for order in (parts, parts[::-1]):
        assert merge(pl.concat(order)).select(whole.columns).sort("entity", "time").equals(whole)
    stepwise = merge(pl.concat([merge(pl.concat(parts[:-1])), parts[-1].select(merge(parts[0]).columns)]))
    assert stepwise.select(whole.columns).sort("entity", "time").equals(whole)


def described(*rows: tuple[str | None, str | None, int]) -> pl.DataFrame:
    schema = {"parent": pl.String, "service": pl.String, "seen": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").select(pl.lit("c_1").alias("entity"), pl.all())


def test_each_column_of_an_entity_is_what_was_known_last_however_descriptions_are_merged():
    """The parent of second 5 is newer than that of second 1, though a part with the latter was seen later."""
    first, second = described(("m_1", None, 1), (None, "app", 10)), described(("m_2", None, 5))
    merge = PRODUCTS["entities"].merge
    for parts in ([first, second], [second, first], [merge(first), merge(second)]):
        assert last_known(merge(pl.concat(parts))).row(0) == ("c_1", "m_2", "app")


def test_repeated_descriptions_are_held_once():
    assert PRODUCTS["entities"].merge(described(*[("m_1", "app", i) for i in range(9)])).rows() == [
        ("c_1", "m_1", "app", 8)
    ]


def test_repeated_tasks_are_held_once_with_their_lists():
    line = b"J3_1_2,2,j_1,1,Terminated,3700,3800,100,0.5\n"
    tasks = PRODUCTS["tasks"].merge(
        products("batch_task", [line, line, line.replace(b"J3_1_2", b"M1")])["tasks"]
    )
    assert tasks.select("task_name", "upstream").rows() == [("J3_1_2", [1, 2]), ("M1", [])]


def test_rows_go_to_the_place_of_their_date_and_of_their_keys_bucket():
    frame = pl.DataFrame(
        {
            "entity": ["m_1", "m_2", "m_1"],
            "time": [datetime(2018, 1, 1, 23, 55), datetime(2018, 1, 2), datetime(2018, 1, 2)],
        },
        schema_overrides={"time": pl.Datetime("ms")},
    )
    mixed = frame[::-1]
    rows, starts = partitions("machine", mixed, buckets=1)
    assert starts == {"2018-01-01/00": 0, "2018-01-02/00": 1}
    assert rows.equals(pl.concat([frame[:1], mixed[:2]]))
    rows, starts = partitions("machine", mixed, buckets=50)
    # crc32 of the name, which no machine, version or seed changes
    assert starts == {"2018-01-01/14": 0, "2018-01-02/14": 1, "2018-01-02/22": 2}
    assert rows.equals(frame[[0, 2, 1]])
    assert partitions("entities", frame, buckets=50)[1] == {"all": 0}


def test_telemetry_is_mean_and_maximum_in_our_units_with_null_for_no_value():
    bins = pl.DataFrame(
        {
            "entity": ["b", "a"],
            "time": [0, 0],
            "cpu_sum": [90.0, 0.0],
            "cpu_count": [2, 0],
            "cpu_max": pl.Series([60.0, None], dtype=pl.Float32),
            "mpki_sum": [0.0, 3.0],
            "mpki_count": [4, 2],
            "mpki_max": pl.Series([0.0, 2.0], dtype=pl.Float32),
            "samples": [4, 2],
        }
    )
    rows = telemetry(bins, {"cpu": METRICS["cpu"], "mpki": METRICS["mpki"], "cpi": METRICS["cpi"]})
    assert rows.drop("time").rows() == [
        ("a", None, None, 1.5, 2.0, None, None, 2),
        ("b", float(np.float32(0.45)), float(np.float32(0.6)), 0.0, 0.0, None, None, 4),
    ]
    assert rows.schema["cpu"] == rows.schema["cpi_max"] == pl.Float32

"""cluster-trace-v2018: its raw tables and their quirks become partial products of canonical tables."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from fleetcast.traces import alibaba_2018
from fleetcast.traces.raw import Binning, parse

ZERO = datetime(2018, 1, 1, tzinfo=UTC)
CLOCK = Binning(start=int(ZERO.timestamp()), step=300, slice=3600)


def products(table: str, *lines: str) -> dict[str, pl.DataFrame]:
    """The products of usable lines."""
    spec = alibaba_2018.TABLES[table]
    parsed = parse("\n".join(lines).encode(), spec)
    assert parsed.rejected.is_empty()
    return spec.products(parsed.frame, CLOCK)


def reasons(table: str, *lines: str) -> list[str]:
    return parse("\n".join(lines).encode(), alibaba_2018.TABLES[table]).rejected["reason"].to_list()


def at(seconds: int) -> datetime:
    return ZERO + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("name", "number", "upstream"),
    [
        ("M1", 1, []),
        ("R4_2", 4, [2]),
        ("M5_3_4", 5, [3, 4]),
        ("J12_11_10", 12, [11, 10]),
        ("R2_1_Stg8", 2, [1]),
        ("M1_Stg2_7", 1, []),
        ("task_LTg0MTUwNTA5Mjg4MDkwNjIzMA==", None, []),
        ("task_123", None, []),
        ("MergeTask", None, []),
        ("", None, []),
        (None, None, []),
        ("M3_99999999999999999999", 3, []),
    ],
)
def test_a_task_name_holds_its_number_and_those_it_waits_for(name, number, upstream):
    parsed = alibaba_2018.parse_task_names(pl.Series([name], dtype=pl.String))
    assert parsed.schema == {"number": pl.Int64, "upstream": pl.List(pl.Int64)}
    assert parsed.row(0) == (number, upstream)


@pytest.mark.parametrize(
    ("name", "upstream"),
    [
        ("J30_4_5_6_8_9_10_12_13_14_16_17_18_19_21_22_24_25_", 17),
        ("R24_1_2_3_4_5_6_7_8_9_10_11_12_13_14_15_16_17_18_1", 18),  # 1 may be 19: left out
    ],
)
def test_a_name_cut_off_at_50_characters_loses_no_whole_number_and_keeps_no_stump(name, upstream):
    assert len(name) == 50
    assert len(alibaba_2018.parse_task_names(pl.Series([name]))["upstream"][0]) == upstream


def test_samples_are_binned_to_sum_count_maximum_and_rows_in_raw_units():
    bins = products(
        "machine_usage",
        "m_1,0,10,50,,,,,5",
        "m_1,299,30,60,,,,,",
        "m_1,300,70,60,,,,,0",
        "m_2,10,20,60,,,,,",
    )["machine"].sort("entity", "time")
    columns = ["entity", "time", "cpu_sum", "cpu_count", "cpu_max", "disk_io_sum", "disk_io_count", "samples"]
    assert bins.select(columns).rows() == [
        ("m_1", at(0), 40, 2, 30, 5, 1, 2),
        ("m_1", at(300), 70, 1, 70, 0, 1, 1),
        ("m_2", at(0), 20, 1, 20, 0, 0, 1),
    ]
    assert bins["net_in_max"].null_count() == 3


@pytest.mark.parametrize("value", ["-1", "101", "100.5", "nan", "inf"])
def test_an_impossible_percentage_is_missing_but_its_row_counts(value):
    bins = products("machine_usage", f"m_1,0,50,50,1,1,1,1,{value}", "m_1,10,60,50,1,1,1,1,7")["machine"]
    found = bins.select("disk_io_sum", "disk_io_count", "disk_io_max", "cpu_sum", "samples").row(0)
    assert found == (7, 1, 7, 110, 2)


@pytest.mark.parametrize(("value", "count"), [("-1", 0), ("nan", 0), ("inf", 0), ("250", 1)])
def test_counts_have_no_upper_limit_but_are_finite_and_positive(value, count):
    bins = products("machine_usage", f"m_1,0,50,50,1,{value},1,1,1")["machine"]
    assert bins["mpki_count"].item() == count
    assert np.isfinite(bins["mpki_sum"].item())


def test_machines_and_containers_are_measured_where_they_have_usage():
    machine = products("machine_usage", "m_1,20,1,1,1,1,1,1,1", "m_1,10,1,1,1,1,1,1,1")["entities"]
    assert machine.select("entity", "kind", "parent", "measured", "seen").rows() == [
        ("m_1", "machine", None, True, 0)  # seen in the bin that begins at 0
    ]
    described = products("machine_meta", "m_1,0,dom1,dom2,96,100,USING")["entities"]
    assert described.select("cpu_capacity", "memory_capacity", "measured").rows() == [(96, 100, None)]


def test_a_container_that_moved_has_a_description_for_each_machine_in_any_order_of_rows():
    lines = ["c_1,m_2,900,1,1,1,1,1,1,1,1", "c_1,m_1,10,1,1,1,1,1,1,1,1", "c_1,m_1,20,1,1,1,1,1,1,1,1"]
    for order in (lines, lines[::-1]):
        found = products("container_usage", *order)["entities"].select("entity", "parent", "seen")
        assert sorted(found.rows()) == [("c_1", "m_1", 20), ("c_1", "m_2", 900)]


def test_container_records_say_where_it_ran_its_service_and_whether_it_still_does():
    found = products(
        "container_meta",
        "c_1,m_1,0,app_1,started,400,800,1.5",
        "c_1,m_1,7205,app_1,stopped,400,800,1.5",
        "c_2,m_2,5,,started,400,800,1.5",
        "c_3,m_2,5,app_1,,400,800,1.5",
    )
    assert found["hosted"].rows() == [
        ("c_1", "m_1", "app_1", at(0), True),
        ("c_1", "m_1", "app_1", at(7205), False),
        ("c_3", "m_2", "app_1", at(5), True),
    ]
    first = found["entities"].select("kind", "parent", "service", "cpu_capacity", "memory_capacity").row(0)
    assert first == ("container", "m_1", "app_1", 8.0, 1.5)


def test_tasks_of_the_graph_carry_their_slice_number_and_upstream_and_others_are_left_out():
    tasks = products(
        "batch_task",
        "M1,2,j_1,1,Terminated,3700,3800,100,0.5",
        "R2_1,2,j_1,1,Running,7200,0,,",
        "task_LTg0==,1,j_2,1,Terminated,10,20,100,0.5",
        "MergeTask,1,j_3,1,Terminated,10,20,100,0.5",
    )["tasks"]
    assert tasks.rows() == [("j_1", "M1", at(3600), 1, []), ("j_1", "R2_1", at(7200), 2, [1])]
    assert tasks.schema["upstream"] == pl.List(pl.Int64)


def test_instances_are_counted_by_task_machine_and_slice_of_their_start():
    def line(task: str, start: int, machine: str) -> str:
        return f"i,{task},j_1,1,Terminated,{start},{start + 9},{machine},1,1,,,,"

    found = products(
        "batch_instance",
        line("M1", 10, "m_1"),
        line("M1", 3599, "m_1"),
        line("M1", 3600, "m_1"),
        line("M1", 10, ""),  # waiting: it has no machine
    )["instances"]
    assert sorted(found.select("task_name", "machine", "slice", "instances").rows()) == [
        ("M1", "m_1", at(0), 2),
        ("M1", "m_1", at(3600), 1),
    ]


@pytest.mark.parametrize("table", ["machine_meta", "machine_usage", "container_meta", "container_usage"])
def test_clocks_start_at_zero_and_end_within_ten_years(table):
    columns = list(alibaba_2018.TABLES[table].columns)

    def line(stamp: str) -> str:
        return ",".join(stamp if c == "time_stamp" else "1" for c in columns)

    wrong = "time_stamp is outside 0 to 10 years"
    eleven_years = str(11 * 366 * 86_400)
    assert reasons(table, line("0"), line("-1"), line(eleven_years), line("")) == [
        wrong,
        wrong,
        "time_stamp is empty",
    ]


def test_an_end_before_the_start_is_a_clock_that_ran_backwards_but_zero_means_not_ended():
    assert reasons(
        "batch_task",
        "M1,2,j_1,1,Running,3700,0,100,0.5",
        "M1,2,j_1,1,Terminated,3700,3699,100,0.5",
        ",2,j_1,1,Terminated,1,2,100,0.5",
        "M1,2,,1,Terminated,1,2,100,0.5",
    ) == ["end_time is before start_time", "task_name is empty", "job_name is empty"]


def test_rows_without_an_id_are_rejected():
    assert reasons("machine_usage", ",10,1,1,1,1,1,1,1") == ["machine_id is empty"]
    assert reasons("container_usage", ",m_1,10,1,1,1,1,1,1,1,1") == ["container_id is empty"]

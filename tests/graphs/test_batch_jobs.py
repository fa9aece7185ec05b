"""Batch edges: from the machines of a task to those of the tasks that wait for it."""

import re
from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from fleetcast.graphs import batch_jobs, dependencies

NINE = datetime(2018, 1, 1, 9, tzinfo=UTC)
TEN = NINE + timedelta(hours=1)


def tasks_of(*names: str, job: str = "j") -> pl.DataFrame:
    """Tasks whose names say their number and those of the tasks they wait for."""
    numbers = [[int(digits) for digits in re.findall(r"\d+", name)] for name in names]
    return pl.DataFrame(
        {
            "job_name": [job] * len(names),
            "task_name": names,
            "number": [number for number, *_ in numbers],
            "upstream": [upstream for _, *upstream in numbers],
        },
        schema_overrides={"upstream": pl.List(pl.Int64)},
    )


def placed(*rows: tuple[str, str, datetime, int], job: str = "j") -> pl.DataFrame:
    """(task, machine, slice, instances) of one job."""
    task, machine, slices, instances = zip(*rows, strict=True)
    return pl.DataFrame(
        {"job_name": [job] * len(rows), "task_name": task, "machine": machine, "slice": slices},
        schema_overrides={"slice": pl.Datetime("ms", "UTC")},
    ).with_columns(instances=pl.Series(instances, dtype=pl.Int64))


def as_dict(edges: pl.DataFrame) -> dict[tuple[datetime, str, str], float]:
    return {(t, s, d): w for t, s, d, w in edges.select("time", "source", "target", "weight").iter_rows()}


def test_weight_is_the_number_of_downstream_instances_expected_to_be_fed_from_the_source():
    found, cut = batch_jobs.edges(
        tasks_of("M1", "R2_1"),
        placed(("M1", "a", NINE, 3), ("M1", "b", NINE, 1), ("R2_1", "c", NINE, 8), ("R2_1", "d", NINE, 2)),
    )
    assert found.schema == dependencies.SCHEMA
    assert found["kind"].unique().to_list() == ["batch"]
    assert as_dict(found) == {
        (NINE, "a", "c"): 6.0,
        (NINE, "a", "d"): 1.5,
        (NINE, "b", "c"): 2.0,
        (NINE, "b", "d"): 0.5,
    }
    assert cut == 0


def test_an_edge_lies_in_the_slice_of_the_downstream_instances_and_knows_only_upstream_so_far():
    found, _ = batch_jobs.edges(
        tasks_of("M1", "R2_1"),
        placed(("M1", "a", NINE, 1), ("M1", "b", TEN, 3), ("R2_1", "c", NINE, 4), ("R2_1", "c", TEN, 4)),
    )
    assert as_dict(found) == {(NINE, "a", "c"): 4.0, (TEN, "a", "c"): 1.0, (TEN, "b", "c"): 3.0}


def test_edges_since_a_slice_still_count_the_upstream_instances_before_it():
    found, _ = batch_jobs.edges(
        tasks_of("M1", "R2_1"),
        placed(("M1", "a", NINE, 1), ("M1", "b", TEN, 3), ("R2_1", "c", NINE, 4), ("R2_1", "c", TEN, 4)),
        since=TEN,
    )
    assert as_dict(found) == {(TEN, "a", "c"): 1.0, (TEN, "b", "c"): 3.0}


def test_upstream_that_starts_only_later_gives_no_edge():
    placements = placed(("M1", "a", TEN, 1), ("R2_1", "c", NINE, 1))
    assert batch_jobs.edges(tasks_of("M1", "R2_1"), placements)[0].is_empty()


def test_jobs_do_not_mix_and_a_machine_is_not_its_own_source():
    tasks = pl.concat([tasks_of("M1"), tasks_of("R2_1", job="other"), tasks_of("M1", "R2_1", job="self")])
    placements = pl.concat(
        [
            placed(("M1", "a", NINE, 1)),
            placed(("R2_1", "b", NINE, 1), job="other"),
            placed(("M1", "c", NINE, 1), ("R2_1", "c", NINE, 1), job="self"),
        ]
    )
    found, _ = batch_jobs.edges(tasks, placements)
    assert found.is_empty()
    assert found.schema == dependencies.SCHEMA


def test_weights_of_several_task_pairs_and_jobs_are_summed():
    tasks = pl.concat([tasks_of("M1", "M2", "J3_1_2"), tasks_of("M1", "R2_1", job="k")])
    placements = pl.concat(
        [
            placed(("M1", "a", NINE, 1), ("M2", "a", NINE, 2), ("J3_1_2", "b", NINE, 5)),
            placed(("M1", "a", NINE, 1), ("R2_1", "b", NINE, 1), job="k"),
        ]
    )
    assert as_dict(batch_jobs.edges(tasks, placements)[0]) == {(NINE, "a", "b"): 11.0}


def test_only_the_heaviest_machines_of_a_task_are_used_and_the_others_counted():
    rows = [("M1", f"u{i}", NINE, i + 1) for i in range(5)] + [("R2_1", f"d{i}", NINE, 1) for i in range(4)]
    found, cut = batch_jobs.edges(tasks_of("M1", "R2_1"), placed(*rows), max_machines=2)
    assert cut == 3 + 2
    assert set(found["source"]) == {"u3", "u4"}
    assert set(found["target"]) == {"d0", "d1"}
    # 15 upstream instances in all: what the cut machines fed is not handed to the others
    assert as_dict(found)[NINE, "u4", "d0"] == pytest.approx(5 / 15)


def test_the_order_of_the_records_changes_nothing():
    tasks = tasks_of("M1", "M2", "R3_1_2", "J4_3")
    rows = [
        (task, f"m{(7 * i + k) % 11}", NINE if i % 2 else TEN, 1 + i % 5)
        for k, task in enumerate(tasks["task_name"])
        for i in range(11)
    ]
    forward, _ = batch_jobs.edges(tasks, placed(*rows))
    backward, _ = batch_jobs.edges(tasks.reverse(), placed(*rows[::-1]))
    assert forward.equals(backward)

"""Co-location edges: between machines that run containers of the same service."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from fleetcast.graphs import colocation, dependencies

NINE = datetime(2018, 1, 1, 9, tzinfo=UTC)
HOUR = 3600


def running(*rows: tuple[str, str, str], start: datetime = NINE, end: datetime | None = None) -> pl.DataFrame:
    """(container, machine, service) with the same start and end."""
    return pl.DataFrame(list(rows), schema=["container", "machine", "service"], orient="row").with_columns(
        start=pl.lit(start, pl.Datetime("ms", "UTC")), end=pl.lit(end, pl.Datetime("ms", "UTC"))
    )


def as_dict(edges: pl.DataFrame) -> dict[tuple[str, str], float]:
    return {(s, d): w for s, d, w in edges.select("source", "target", "weight").iter_rows()}


def test_a_machine_receives_from_the_others_in_proportion_to_their_containers():
    placements = running(
        ("c1", "a", "s"), ("c2", "b", "s"), ("c3", "b", "s"), ("c4", "b", "s"), ("c5", "c", "s")
    )
    found = colocation.edges(placements, [NINE], HOUR)
    assert found.schema == dependencies.SCHEMA
    assert as_dict(found) == {
        ("b", "a"): 0.75,
        ("c", "a"): 0.25,
        ("a", "b"): 0.5,
        ("c", "b"): 0.5,
        ("a", "c"): 0.25,
        ("b", "c"): 0.75,
    }


@pytest.mark.parametrize("machines", [2, 3, 5, 6, 9, 10, 400])
def test_every_machine_receives_one_from_each_service_over_a_bounded_number_of_edges(machines):
    placements = running(*((f"c{i}", f"m{i:03}", "s") for i in range(machines)))
    found = colocation.edges(placements, [NINE], HOUR, neighbours=8)
    received = found.group_by("target").agg(pl.col("weight").sum(), edges=pl.len())
    assert received.height == machines
    assert received["weight"].to_list() == pytest.approx([1.0] * machines)
    assert received["edges"].unique().to_list() == [min(8, machines - 1)]
    both_ways = set(as_dict(found))
    assert all((d, s) in both_ways for s, d in both_ways)


def test_services_add_up_and_one_machine_alone_has_no_edges():
    two = running(("c1", "a", "s"), ("c2", "b", "s"), ("c3", "a", "t"), ("c4", "b", "t"), ("c5", "c", "u"))
    assert as_dict(colocation.edges(two, [NINE], HOUR)) == {("a", "b"): 2.0, ("b", "a"): 2.0}


def test_a_container_counts_in_the_slices_in_which_it_ran():
    late = NINE + timedelta(hours=1, minutes=59)
    placements = pl.concat(
        [running(("c1", "a", "s")), running(("c2", "b", "s"), start=late, end=late + timedelta(minutes=1))]
    )
    slices = [NINE + timedelta(hours=h) for h in range(3)]
    found = colocation.edges(placements, slices, HOUR)
    assert found["time"].unique().to_list() == [slices[1]]


def test_a_container_recorded_twice_on_a_machine_counts_once():
    placements = running(("c1", "a", "s"), ("c1", "a", "s"), ("c2", "b", "s"), ("c3", "c", "s"))
    assert as_dict(colocation.edges(placements, [NINE], HOUR))["a", "b"] == 0.5


def test_no_slices_give_an_empty_edge_frame():
    assert colocation.edges(running(("c1", "a", "s")), [], HOUR).schema == dependencies.SCHEMA

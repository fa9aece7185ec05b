"""The graph that is looked at: that of the last slice that had ended, of the entities with the most flow."""

import numpy as np
import pytest
from fleetcast.windows.graph import last_graph

START, STEPS = 1_514_765_700, 41  # from 00:15 in quarters of an hour: the telemetry ends at 10:30
HOUR = 3600
LAST = START - 900 + 9 * HOUR  # 09:00, the slice that had ended


def values(entities: int) -> np.ndarray:
    cpu = np.tile(np.arange(1.0, entities + 1), (STEPS, 1))
    return np.stack([cpu, cpu], axis=-1).astype(np.float32)


def test_it_is_of_the_last_slice_that_had_ended(dataset):
    edges = [(LAST - HOUR, "e0", "e1", 5.0), (LAST, "e1", "e2", 2.0), (LAST, "e2", "e0", 1.0)]
    store, data = dataset(values(3), [*edges, (LAST + HOUR, "e0", "e2", 9.0)])
    graph = last_graph(store, data, most=60)
    assert (graph.time, graph.slice) == (LAST, HOUR)
    assert graph.edges.rows() == [("e1", "e2", 1.0), ("e2", "e0", 0.5)]
    assert (graph.entities, graph.total) == (3, 2)
    assert (graph.metric, graph.load) == ("cpu", {"e0": 1.0, "e1": 2.0, "e2": 3.0})


def test_an_edge_between_groups_counts_once_and_its_ends_have_their_load(dataset):
    store, data = dataset(
        values(3),
        [(LAST, "e2", "e0", 4.0), (LAST, "e0", "e1", 2.0)],
        groups=[["e0", "e1"], ["e2"]],
        borders=[["e2"], ["e0"]],
    )
    graph = last_graph(store, data, most=60)
    assert graph.edges.rows() == [("e2", "e0", 1.0), ("e0", "e1", 0.5)]
    assert graph.total == 2
    assert graph.load == {"e0": 1.0, "e1": 2.0, "e2": 3.0}


def test_only_the_entities_with_the_most_flow_are_kept_but_all_are_counted(dataset):
    edges = [(LAST, f"e{n}", "e0", float(n)) for n in range(1, 6)]
    store, data = dataset(values(6), edges)
    graph = last_graph(store, data, most=3)
    assert [row[0] for row in graph.edges.rows()] == ["e5", "e4"]
    assert set(graph.load) == {"e0", "e4", "e5"}
    assert (graph.entities, graph.total) == (6, 5)


def test_kinds_are_those_that_the_store_has_of_the_slice(dataset):
    store, data = dataset(values(2), [(LAST, "e0", "e1", 1.0)])
    day = "dependencies/date=2018-01-01/machine.parquet"
    store.write_table(day, store.read_table("dependencies.parquet"))
    assert last_graph(store, data, most=60).kinds == ("call",)


@pytest.mark.parametrize("edges", [[], [(LAST - HOUR, "e0", "e1", 5.0)]], ids=["never", "not any more"])
def test_without_edges_there_is_none(dataset, edges):
    store, data = dataset(values(2), edges)
    assert last_graph(store, data, most=60) is None

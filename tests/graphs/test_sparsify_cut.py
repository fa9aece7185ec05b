"""Fewer edges per target, and groups that follow the graph."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.graphs import dependencies
from fleetcast.graphs.cut import _fill as fill
from fleetcast.graphs.cut import border, cut
from fleetcast.graphs.sparsify import strongest

NINE = datetime(2018, 1, 1, 9, tzinfo=UTC)


def test_strongest_keeps_the_k_heaviest_sources_of_each_slice_target_and_kind():
    rows = [
        (time, source, target, kind, weight)
        for time in (NINE, NINE + timedelta(hours=1))
        for target in ("x", "y")
        for kind in ("batch", "call")
        for source, weight in (("c", 1.0), ("a", 1.0), ("b", 1.0), ("d", 2.0))
    ]
    edges = pl.DataFrame(rows, schema=dependencies.SCHEMA, orient="row")
    kept = strongest(edges, 2)
    assert kept.schema == dependencies.SCHEMA
    assert (
        kept.group_by("time", "target", "kind").agg(pl.col("source").sort())["source"].to_list()
        == [["a", "d"]] * 8
    )
    assert strongest(edges.reverse(), 2).equals(kept)


def undirected(pairs: list[tuple[str, str, float]]) -> pl.DataFrame:
    return pl.DataFrame(pairs, schema=["source", "target", "weight"], orient="row", infer_schema_length=None)


def clique(names: list[str], weight: float) -> list[tuple[str, str, float]]:
    return [(a, b, weight) for i, a in enumerate(names) for b in names[i + 1 :]]


def test_two_dense_communities_with_a_weak_bridge_are_not_mixed():
    # even and odd numbers, so that neither the order of names nor that of edges gives it away
    even, odd = ([f"m{i:02}" for i in range(first, 16, 2)] for first in (0, 1))
    edges = undirected([*clique(even, 1.0), *clique(odd, 0.8), ("m00", "m01", 0.5)])
    for size in (8, 10, 15):
        assert cut([*odd, *even], edges, size) == [even, odd]
    assert cut([*odd, *even], edges, 16) == [sorted([*even, *odd])]


def test_light_edges_join_what_heavier_ones_left_room_for():
    names = [f"m{i}" for i in range(8)]
    chains = [
        ("m0", "m1", 9),
        ("m1", "m2", 9),
        ("m3", "m4", 8),
        ("m4", "m5", 8),
        ("m3", "m6", 1),
        ("m0", "m7", 1),
    ]
    groups = cut(names, undirected([(a, b, float(w)) for a, b, w in chains]), 4)
    assert groups == [["m0", "m1", "m2", "m7"], ["m3", "m4", "m5", "m6"]]


@pytest.mark.parametrize("size", [1, 7, 32, 200])
def test_every_entity_is_in_exactly_one_group_of_at_most_the_size(size):
    random = np.random.default_rng(size)
    names = [f"m{i:03}" for i in range(150)]
    edges = undirected(
        [
            (names[a], names[b], float(w))
            for a, b, w in zip(*random.integers(0, 100, (2, 500)), random.random(500), strict=True)
        ]
        + [("m000", "somewhere else", 1.0)]
    )
    groups = cut(names, edges, size)
    assert sorted(name for group in groups for name in group) == names
    assert all(group == sorted(group) for group in groups)
    sizes = sorted(map(len, groups))
    assert sizes[-1] <= size
    assert len(sizes) == 1 or sizes[0] + sizes[1] > -(-150 // -(-150 // size))
    shuffled = random.permutation(edges.height)
    assert cut(names[::-1], edges[shuffled.tolist()], size) == groups


def test_groups_keep_most_of_a_clustered_graphs_weight():
    random = np.random.default_rng(0)
    names = [f"m{i:03}" for i in range(160)]
    member = random.permutation(160) // 16  # ten communities of 16
    a, b = random.integers(0, 160, (2, 6000))
    inside = member[a] == member[b]
    weight = np.where(inside, 1.0, 0.05) * random.random(6000)
    edges = undirected([(names[i], names[j], float(w)) for i, j, w in zip(a, b, weight, strict=True)])
    groups = cut(names, edges, 16)
    group_of = {name: g for g, group in enumerate(groups) for name in group}
    kept = edges.filter(
        pl.Series([group_of[s] == group_of[t] for s, t in edges.select("source", "target").iter_rows()])
    )
    assert kept["weight"].sum() > 0.95 * weight[inside].sum()


def test_a_path_is_cut_into_even_pieces():
    names = [f"m{i:02}" for i in range(11)]
    edges = undirected([(a, b, 1.0) for a, b in pairwise(names)])
    assert cut(names, edges, 10) == [names[:6], names[6:]]


def test_no_entities_no_edges_and_no_size():
    nothing = undirected([]).cast({"source": pl.String, "target": pl.String, "weight": pl.Float32})
    assert cut([], nothing, 4) == []
    assert cut(["b", "a", "c"], nothing, 2) == [["a", "b"], ["c"]]
    with pytest.raises(InputError, match="group size 0"):
        cut(["a"], nothing, 0)


GROUPS = [["a", "b"], ["c", "d"], ["e", "f", "g"]]
FLOWS = [
    ("c", "a", 2.0),
    ("c", "b", 1.0),  # 3 into the first group
    ("e", "a", 3.0),
    ("g", "b", 3.0),
    ("d", "b", 2.5),
    ("a", "b", 9.0),  # inside
    ("a", "f", 9.0),  # out of the first group, into the last
    ("b", "c", 0.0),  # nothing flows
    ("x", "c", 9.0),  # not an entity
]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, [[], [], []]),
        (1, [["c"], [], ["a"]]),  # c, e and g send as much: by name
        (2, [["c", "e"], [], ["a"]]),
        (3, [["c", "e", "g"], [], ["a"]]),
        (9, [["c", "d", "e", "g"], [], ["a"]]),
    ],
)
def test_a_border_holds_those_that_send_the_most_load_into_a_group(most, expected):
    edges = undirected(FLOWS)
    assert border(GROUPS, edges, most) == expected
    assert border(GROUPS, edges.reverse(), most) == expected


def test_clusters_fill_groups_as_if_every_group_had_been_looked_at():
    random = np.random.default_rng(3)
    sizes = sorted(random.integers(1, 9, 300).tolist(), reverse=True)
    starts = np.cumsum([0, *sizes])
    clusters = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    expected: list[list[int]] = []
    for nodes in clusters:
        room = [group for group in expected if len(group) + len(nodes) <= 10]
        if room:
            max(room, key=len).extend(nodes)
        else:
            expected.append(list(nodes))
    assert fill(clusters, 10) == expected

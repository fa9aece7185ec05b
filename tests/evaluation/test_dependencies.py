"""Who depends on whom, in the reports: callers left of those they call, the same picture every time, in words
what it shows."""

import networkx as nx
import numpy as np
import polars as pl
import pytest
from fleetcast.evaluation import dependencies
from fleetcast.evaluation.dependencies import LISTED, MOST, NONE, caption, picture, section
from fleetcast.evaluation.document import pages
from fleetcast.windows.graph import LastGraph

LAST = 1_514_797_200  # 2018-01-01 09:00 UTC


def graph(edges, total=None, kinds=("call",)) -> LastGraph:
    frame = pl.DataFrame(edges, ["source", "target", "weight"], orient="row")
    frame = frame.sort("weight", descending=True, maintain_order=True)
    names = sorted({*frame["source"], *frame["target"]})
    return LastGraph(
        time=LAST,
        slice=3600,
        kinds=kinds,
        entities=len(names),
        total=total or len(frame),
        edges=frame,
        metric="cpu",
        normalised=(),
        load={name: 0.1 * place for place, name in enumerate(names)},
    )


TREE = [("a", "b", 1.0), ("a", "c", 0.5), ("b", "d", 0.25), ("c", "d", 0.2), ("a", "d", 0.1)]


def test_the_caption_names_kinds_slice_and_what_is_drawn():
    words = caption(graph(TREE))
    assert "Dependencies (call) of the 1 h from 2018-01-01 09:00 UTC" in words
    assert "all 5 edges between 4 entities" in words
    assert "cpu (CPU time, fraction of capacity)" in words
    assert "the strongest 5 of 900 edges, between 4 of 4 entities" in caption(graph(TREE, total=900))
    assert "Dependencies (batch, colocation)" in caption(graph(TREE, kinds=("batch", "colocation")))


def test_the_table_has_the_strongest_edges_first():
    (table,) = section(graph(TREE)).tables
    assert [row[:2] for row in table.rows] == [edge[:2] for edge in TREE]
    many = [(f"s{n}", f"t{n}", 1 - n / 100) for n in range(2 * LISTED)]
    (table,) = section(graph(many)).tables
    assert [row[0] for row in table.rows] == [f"s{n}" for n in range(LISTED)]
    long = "4ab265f54516248ee8873be7d6441912456ce17e84f39918e01ddc4210e56da5"
    (table,) = section(graph([(long, "b", 1.0)])).tables
    assert table.rows[0][0] == "4ab265f545…"


def test_without_edges_the_section_says_so():
    found = section(None)
    assert found.words == (NONE,)
    assert not found.tables and not found.pictures


def test_sections_of_several_data_sets_do_not_share_a_picture():
    found = [section(graph(TREE), of) for of in ("", "coupled", "uncoupled")]
    assert [one.title for one in found] == [
        "Who depends on whom",
        "coupled: who depends on whom",
        "uncoupled: who depends on whom",
    ]
    assert len(pages("Backtest", [], found).plots) == 3


def test_callers_stand_left_of_those_that_they_call():
    whole = nx.DiGraph([edge[:2] for edge in TREE])
    assert dependencies._layers(whole) == [["a"], ["b", "c"], ["d"]]
    whole.add_edges_from((f"x{n}", f"x{n + 1}") for n in range(10))
    whole.add_edge("x1", "x0")
    layers = dependencies._layers(whole)
    assert {"x0", "x1"} <= set(layers[0]), "a small circle is one place"


def test_columns_are_ordered_so_that_few_arrows_cross():
    pairs = [(f"a{n}", f"b{7 - n}") for n in range(8)]
    whole = nx.DiGraph(pairs)
    places = dependencies._columns(whole, dependencies._layers(whole))
    assert all(places[one][1] == places[other][1] for one, other in pairs)
    assert len(set(places.values())) == 16


def test_a_graph_of_circles_has_no_layers_but_places_that_do_not_meet():
    ring = nx.DiGraph([(f"e{n}", f"e{(n + 1) % 12}") for n in range(12)] + [("x", "y")])
    assert dependencies._layers(ring) is None
    places = np.array(list(dependencies._close(ring).values()))
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 10 * np.eye(len(places))
    assert apart.min() > 0.5


@pytest.mark.parametrize(
    "edges",
    [
        TREE,
        [("a", "b", 1.0)],
        [("a", "b", 1.0), ("b", "a", 0.5), ("b", "c", 0.5), ("c", "a", 0.1)],
        [(f"e{n % MOST}", f"e{(n * 7 + 1) % MOST}", 1 / (n + 1)) for n in range(400)],
    ],
    ids=["tree", "one edge", "circle", "many"],
)
def test_the_same_graph_gives_the_same_picture(edges):
    first, again = picture(graph(edges)), picture(graph(edges[::-1]))
    assert first.png == again.png
    assert first.wide
    assert f"between {len({name for edge in edges for name in edge[:2]})} entities" in first.alt


def test_an_entity_of_which_nothing_is_known_is_drawn_too():
    one = graph(TREE)
    one.load["d"] = float("nan")
    del one.load["c"]
    assert picture(one).png


def test_edges_of_an_entity_with_itself_are_not_drawn():
    assert "1 dependencies between 2 entities" in picture(graph([("a", "b", 1.0), ("a", "a", 1.0)])).alt

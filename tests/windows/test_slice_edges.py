"""The graph at a window's origin: the last slice that had ended by then, and one block a window."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.graphs import dependencies
from fleetcast.windows.edges import SliceEdges, combine, last_complete

NINE = datetime(2018, 1, 1, 9, tzinfo=UTC)


def slice_edges() -> SliceEdges:
    """Slices at 0, 12, 24 of 12 steps; the middle one has no edges; given out of order."""
    return SliceEdges.build(
        starts=torch.tensor([0, 12, 24]),
        time=torch.tensor([24, 0, 24, 0, 24]),
        source=torch.tensor([2, 0, 1, 1, 0]),
        target=torch.tensor([0, 1, 2, 0, 2]),
        weight=torch.tensor([0.3, 0.1, 0.4, 0.2, 0.5]),
    )


def test_a_window_sees_a_slice_only_once_it_has_ended():
    origins = torch.tensor([0, 11, 12, 23, 24, 35, 36, 99])
    known = last_complete(origins, torch.tensor([0, 12, 24]), 12)
    assert known.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert last_complete(origins, torch.tensor([], dtype=torch.long), 12).tolist() == [-1] * 8


def test_windows_are_blocks_of_one_graph():
    edges = slice_edges().batch(torch.tensor([2, -1, 1, 0, 2]), n_nodes=3)
    assert edges.index.tolist() == [
        [2, 1, 0, 9 + 0, 9 + 1, 12 + 2, 12 + 1, 12 + 0],
        [0, 2, 2, 9 + 1, 9 + 0, 12 + 0, 12 + 2, 12 + 2],
    ]
    assert edges.weight.tolist() == pytest.approx([0.3, 0.4, 0.5, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert (edges.index.dtype, edges.weight.dtype) == (torch.int64, torch.float32)


def test_no_known_slice_no_edges_and_no_slices_at_all():
    assert slice_edges().batch(torch.tensor([-1, -1]), n_nodes=3).index.shape == (2, 0)
    nothing = torch.tensor([], dtype=torch.long)
    empty = SliceEdges.build(nothing, nothing, nothing, nothing, torch.tensor([]))
    assert empty.batch(torch.tensor([-1]), n_nodes=3).weight.shape == (0,)


def test_an_edge_outside_every_slice_is_an_error():
    one = torch.tensor([1])
    with pytest.raises(InputError, match="edge at time 5, expected the start"):
        SliceEdges.build(torch.tensor([0, 12]), torch.tensor([5]), one, one, torch.tensor([1.0]))


def test_kinds_are_scaled_to_one_in_each_slice_and_summed():
    ten = NINE + timedelta(hours=1)
    edges = pl.DataFrame(
        [
            (NINE, "a", "b", "call", 500.0),
            (NINE, "a", "c", "call", 125.0),
            (NINE, "a", "c", "batch", 2.0),
            (NINE, "b", "c", "batch", 1.0),
            (NINE, "b", "c", "correlation", 0.4),
            (ten, "a", "c", "call", 7.0),
        ],
        schema=dependencies.SCHEMA,
        orient="row",
    )
    assert combine(edges, ["call", "batch"]).rows() == [
        (NINE, "a", "b", 1.0),
        (NINE, "a", "c", 1.25),
        (NINE, "b", "c", 0.5),
        (ten, "a", "c", 1.0),
    ]
    assert combine(edges, []).is_empty()
    indices = edges.with_columns(
        pl.lit(0).alias("source"), pl.lit(1).alias("target"), pl.lit(12).alias("time")
    )
    assert combine(indices, ["batch"]).rows() == [(12, 0, 1, 1.5)]
    with pytest.raises(InputError, match="'calls', expected some of call, batch"):
        combine(edges, ["calls"])

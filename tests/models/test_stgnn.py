"""stgnn: what it must be whatever it has learnt, and that it learns what travels along the edges."""

import dataclasses

import pytest
import torch
from fleetcast.models import build
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Adjacency
from fleetcast.models.stgnn import PLAIN
from fleetcast.windows.batch import Edges
from samples import (
    FOLLOWER,
    GEOMETRY,
    NO_EDGES,
    NODES,
    PATH,
    affected,
    batch,
    error_of_the_follower,
    forecast,
)


def model(geometry: Geometry = GEOMETRY, **options) -> Model:
    torch.manual_seed(0)
    return build("stgnn", {"hidden": 8, **options}, geometry)


def test_evaluation_is_deterministic_and_training_drops_out():
    module = model(dropout=0.5)
    assert torch.equal(forecast(module, batch()).mean, forecast(module, batch()).mean)
    module.train()
    assert not torch.equal(module(batch()).mean, module(batch()).mean)


def test_information_moves_along_and_against_the_edges_one_edge_a_layer():
    assert affected(model(layers=1), PATH, 2) == {1, 2, 3}
    assert affected(model(layers=2), PATH, 2) == {0, 1, 2, 3, 4}
    assert affected(model(layers=2), PATH, 0) == {0, 1, 2}


@pytest.mark.parametrize(("silenced", "reached"), [("against", {2, 3, 4}), ("along", {0, 1, 2})])
def test_each_direction_moves_information_its_own_way(silenced, reached):
    module = model(layers=2)
    for layer in module.convolutions:
        torch.nn.init.zeros_(getattr(layer, silenced).weight)
    assert affected(module, PATH, 2) == reached


def test_weight_and_direction_of_an_edge_matter():
    module = model()
    outputs = [
        forecast(module, batch(1, edges=Edges(index, PATH.weight * factor))).mean
        for index, factor in ((PATH.index, 1), (PATH.index.flip(0), 1), (PATH.index, 3))
    ]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_without_edges_every_node_stands_alone():
    assert affected(model(), NO_EDGES, 2) == {2}


def test_a_graph_layer_is_the_papers_equation_in_both_directions():
    layer = model().convolutions[0]
    x = torch.randn(NODES, 1, 4, generator=torch.Generator().manual_seed(2))
    adjacency = torch.eye(NODES)
    adjacency[PATH.index[1], PATH.index[0]] = PATH.weight  # the receiver's row

    def normalised(a):
        d = a.sum(1) ** -0.5
        return d[:, None] * a * d

    backward = torch.eye(NODES)
    backward[PATH.index[0], PATH.index[1]] = PATH.weight
    expected = torch.relu(
        layer.along(normalised(adjacency) @ x[:, 0]) + layer.against(normalised(backward) @ x[:, 0])
    )
    torch.testing.assert_close(layer(x, Adjacency.symmetric(PATH, NODES))[:, 0], expected)


def test_values_that_were_not_observed_are_neutral_among_the_seasonal_ones():
    module, inputs = model(), batch()
    filled = torch.where(inputs.seasonal_mask, inputs.seasonal, 99.0)
    assert torch.equal(
        forecast(module, inputs).mean, forecast(module, dataclasses.replace(inputs, seasonal=filled)).mean
    )


def test_the_model_knows_what_was_observed():
    module, inputs = model(**PLAIN), batch()
    other = dataclasses.replace(inputs, mask=~inputs.mask)
    assert not torch.allclose(forecast(module, inputs).mean, forecast(module, other).mean)


def test_the_plain_form_reads_nothing_seasonal():
    module, inputs = model(**PLAIN), batch()
    other = dataclasses.replace(
        inputs,
        seasonal_x=inputs.seasonal_x + 1,
        seasonal_x_mask=~inputs.seasonal_x_mask,
        seasonal=inputs.seasonal + 1,
        seasonal_mask=~inputs.seasonal_mask,
    )
    assert torch.equal(forecast(module, inputs).mean, forecast(module, other).mean)


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_it_learns_what_travels_along_the_edge(options):
    def error(edges: list[tuple[int, int]]) -> float:
        module = model(FOLLOWER, **{"hidden": 24, "layers": 1} | options)
        return error_of_the_follower(module, edges, steps=150, learning_rate=0.01)

    assert error([]) > 0.9, "noise of variance 1: alone there is nothing to learn"
    assert error([(0, 1)]) < 0.4

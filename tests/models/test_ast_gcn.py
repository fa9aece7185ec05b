"""ast_gcn: the cell is T-GCN's for each node, attributes are features, and load moves along the edge."""

import dataclasses

import pytest
import torch
from fleetcast.models import build
from fleetcast.models.ast_gcn import TgcnCell
from fleetcast.models.base import Model
from fleetcast.models.graph import Adjacency
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


def model(**options) -> Model:
    torch.manual_seed(0)
    return build("ast_gcn", {"hidden": 8, **options}, GEOMETRY)


def test_the_cell_is_t_gcns_formula_on_a_directed_path():
    torch.manual_seed(0)
    cell, x = TgcnCell(3, 4), torch.randn(NODES, 6, 3)
    adjacency = torch.eye(NODES)
    adjacency[PATH.index[1], PATH.index[0]] = PATH.weight  # the receiver's row
    scale = adjacency.sum(1) ** -0.5
    adjacency = scale[:, None] * adjacency * scale
    h = torch.zeros(NODES, 4)
    weight_x, weight_h, bias = cell.inputs.weight.T, cell.gates.weight.T, cell.inputs.bias
    for step in range(6):
        given = adjacency @ x[:, step]
        r = torch.sigmoid(given @ weight_x[:, :4] + adjacency @ h @ weight_h[:, :4] + bias[:4])
        u = torch.sigmoid(given @ weight_x[:, 4:8] + adjacency @ h @ weight_h[:, 4:] + bias[4:8])
        c = torch.tanh(given @ weight_x[:, 8:] + adjacency @ (r * h) @ cell.candidate.weight.T + bias[8:])
        h = u * h + (1 - u) * c
    torch.testing.assert_close(cell(x, Adjacency.symmetric(PATH, NODES).along), h)


def test_gates_begin_open_to_the_past():
    bias = TgcnCell(3, 4).inputs.bias
    assert bias[:8].eq(1).all()
    assert bias[8:].eq(0).all()


def test_the_cell_is_blind_to_the_order_of_nodes():
    torch.manual_seed(0)
    cell, x = TgcnCell(3, 4), torch.randn(NODES, 6, 3)
    order = torch.tensor([3, 0, 4, 1, 2])
    relabelled = Edges(torch.argsort(order)[PATH.index], PATH.weight)
    first = cell(x, Adjacency.symmetric(PATH, NODES).along)
    second = cell(x[order], Adjacency.symmetric(relabelled, NODES).along)
    torch.testing.assert_close(first[order], second)


def test_information_moves_along_the_edges_only():
    assert affected(model(), PATH, 0) == {0, 1, 2, 3, 4}
    assert affected(model(), PATH, 2) == {2, 3, 4}
    assert affected(model(), PATH, 4) == {4}
    assert affected(model(), NO_EDGES, 2) == {2}


def test_static_attributes_tell_nodes_apart():
    inputs = batch(1, edges=NO_EDGES)
    alike = dataclasses.replace(
        inputs,
        x=inputs.x[:, :, :1].expand_as(inputs.x),
        mask=inputs.mask[:, :, :1].expand_as(inputs.mask),
    )
    known, plain = (forecast(model(residual=False, static=width), alike).mean[0] for width in (8, 0))
    assert not torch.allclose(known[:, 0], known[:, 1])
    torch.testing.assert_close(plain[:, 0], plain[:, 1])


@pytest.mark.parametrize("window", [0, 2])
def test_a_step_sees_its_dynamic_attributes_and_those_of_the_window_before(window):
    module, inputs = model(window=window, static=0), batch(1)
    time_x = inputs.time_x.clone()
    time_x[:, 2] += 1
    changed = dataclasses.replace(inputs, time_x=time_x)
    difference = module._augmented(changed) - module._augmented(inputs)
    steps = torch.nonzero(difference.abs().amax((0, 2))).flatten().tolist()
    assert steps == list(range(2, 3 + window))


def test_before_the_look_back_dynamic_attributes_are_zero():
    module, inputs = model(window=7, static=0), batch(1)
    features = module._augmented(inputs)[:, :, 4:].unflatten(-1, (8, GEOMETRY.calendar))
    assert features[:, 0, :7].eq(0).all()
    torch.testing.assert_close(features[:, 0, 7], inputs.time_x[0, :1].expand(NODES, -1))


def test_nothing_of_the_horizon_is_read():
    module, inputs = model(residual=False), batch()
    other = dataclasses.replace(inputs, time_y=inputs.time_y + 1, seasonal=inputs.seasonal + 1)
    assert torch.equal(forecast(module, inputs).mean, forecast(module, other).mean)


def test_entities_it_was_not_trained_on_get_a_forecast():
    strangers = dataclasses.replace(batch(1), nodes=torch.tensor([0, -1, 2, -1, 4]))
    assert forecast(model(), strangers).mean.isfinite().all()


def test_it_learns_what_travels_along_the_edge():
    def error(edges: list[tuple[int, int]]) -> float:
        torch.manual_seed(0)
        module = build("ast_gcn", {"hidden": 16}, FOLLOWER)
        return error_of_the_follower(module, edges, steps=80, learning_rate=0.02, windows=128)

    assert error([]) > 0.9, "noise of variance 1: alone there is nothing to learn"
    assert error([(0, 1)]) < 0.4

"""DGCRN: its step is the published one, information moves by its graphs, the decoder knows no target."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from fleetcast.models import build, dgcrn
from fleetcast.models.dgcrn import Dgcrn, diffuse
from fleetcast.models.geometry import Geometry
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


def model(geometry: Geometry = GEOMETRY, **options) -> Dgcrn:
    torch.manual_seed(0)
    return build("dgcrn", {"hidden": 8, "rank": 4, **options}, geometry)


def published_step(module: Dgcrn, x, h, walks):
    """The published cell on [B, N, …]: matrices have the sender's row, out[w] = Σ_v A[v, w] x[v].

    `walks` are the walk along and the one against the edges. Returns the next state and the dynamic graph.
    """
    cell, sigmoid, tanh = module.decoder, torch.sigmoid, torch.tanh

    def send(matrix, z):
        return torch.einsum("nvw,nvc->nwc", matrix, z)

    def hops(z, *matrices):
        first = 0.05 * z + 0.95 * sum(send(matrix, z) for matrix in matrices)
        return [z, first, 0.05 * z + 0.95 * sum(send(matrix, first) for matrix in matrices)]

    inputs = torch.cat([x, h], -1)
    hyper = zip(cell.hyper.weight.chunk(4), cell.hyper.bias.chunk(4), cell.necks, strict=True)
    necks = [
        sigmoid(neck(sigmoid(torch.cat(hops(inputs, walks[i // 2]), -1) @ weight.T + bias)))
        for i, (weight, bias, neck) in enumerate(hyper)
    ]  # along for sources, along for targets, against for sources, against for targets
    sources = tanh(3 * module.sources.table * cell.filters[0](torch.cat([necks[0], necks[2]], -1)))
    targets = tanh(3 * module.targets.table * cell.filters[1](torch.cat([necks[1], necks[3]], -1)))
    graph = torch.relu(tanh(3 * (sources @ targets.mT - targets @ sources.mT)))

    def normalised(a):
        a = a + torch.eye(a.shape[1])
        return a / a.sum(2, keepdim=True)

    def convolved(z, layer):
        along = hops(z, normalised(graph), walks[0])
        against = hops(z, normalised(graph.mT), walks[1])
        return layer(torch.cat([*along, *against[1:]], -1))

    keep, reset = sigmoid(convolved(inputs, cell.gates)).chunk(2, -1)
    candidate = tanh(convolved(torch.cat([x, reset * h], -1), cell.candidate))
    return keep * h + (1 - keep) * candidate, graph


def walk(edges: Edges, windows: int) -> tuple[torch.Tensor, torch.Tensor]:
    dense = torch.zeros(windows * NODES, windows * NODES)
    dense = dense.index_put(tuple(edges.index), edges.weight, accumulate=True)
    weight = torch.stack([dense[i : i + NODES, i : i + NODES] for i in range(0, windows * NODES, NODES)])
    return tuple(a / a.sum(2, keepdim=True).clamp_min(1e-9) for a in (weight, weight.mT))


def test_a_step_is_the_published_one():
    module, inputs = model(), batch(2)
    x, h = torch.randn(2, NODES, 5), torch.randn(2, NODES, 8)
    with torch.no_grad():
        for parameter in module.decoder.parameters():
            parameter.mul_(3)  # so that the parts tell
        state, graph = published_step(module, x, h, walk(inputs.edges, 2))
        static = module._static(inputs)
        links = module.decoder.links(torch.cat([x, h], dim=-1), static)
        assert 0.05 < graph.mean() < 0.95
        torch.testing.assert_close(links, graph + torch.eye(NODES), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.decoder(x, h, static), state, rtol=1e-4, atol=1e-5)


def test_each_hop_moves_information_one_edge_and_keeps_a_twentieth_of_the_input():
    walks = Adjacency.walks(Edges(torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([3.0, 1.0, 2.0])), 3)
    x = torch.tensor([4.0, 10.0, 100.0])
    along = torch.tensor([[0.0, 0, 0], [0.75, 0, 0], [0.25, 1, 0]])  # row = receiver
    against = torch.tensor([[0.0, 1, 1 / 3], [0, 0, 2 / 3], [0, 0, 0]])
    expected = [x]
    for matrix in (along, against):
        first = 0.05 * x + 0.95 * matrix @ x
        expected += [first, 0.05 * x + 0.95 * matrix @ first]
    spreads = [lambda h, m=m: 0.95 * (m @ h[0])[None] for m in (walks.along, walks.against)]
    torch.testing.assert_close(diffuse(x.view(1, 3, 1), *spreads, 2)[0, :, :, 0].T, torch.stack(expected))


def still(module: Dgcrn, *without: str) -> Dgcrn:
    """A model whose dynamic graphs stay empty; and without one of the directions of the walks."""
    for embedding in (module.sources, module.targets):
        torch.nn.init.zeros_(embedding.table.requires_grad_(False))
    for cell in (module.encoder, module.decoder):
        for layer in (cell.gates, cell.candidate):
            terms = layer.weight.data.unflatten(1, (5, -1))
            for direction, at in (("along", slice(1, 3)), ("against", slice(3, 5))):
                if direction in without:
                    terms[:, at] = 0
    return module


@pytest.mark.parametrize(
    ("without", "reached"), [((), {0, 1, 2, 3, 4}), (("against",), {2, 3, 4}), (("along",), {0, 1, 2})]
)
def test_without_its_dynamic_graphs_information_moves_by_the_edges_alone(without, reached):
    assert affected(still(model(), *without), PATH, 2) == reached
    assert affected(still(model(), *without), NO_EDGES, 2) == {2}


def test_the_dynamic_graphs_need_no_edges():
    assert affected(model(residual=False), NO_EDGES, 2) == set(range(NODES))


def test_a_step_of_the_horizon_knows_its_time_and_those_before():
    module, inputs = model(residual=False), batch()
    time = inputs.time_y.clone()
    time[:, 2] += 1
    moved = (
        (forecast(module, dataclasses.replace(inputs, time_y=time)).mean - forecast(module, inputs).mean)
        .abs()
        .amax((0, 2, 3))
    )
    assert (moved[:2] == 0).all()
    assert (moved[2:] > 1e-5).all()


def test_the_decoder_reads_its_own_mean_and_no_target():
    module, inputs = model(residual=False), batch()
    blind = {name: getattr(inputs, name) for name in ("x", "mask", "time_x", "time_y", "edges", "nodes")}
    assert torch.equal(module.raw(SimpleNamespace(**blind)), module.raw(inputs))
    before = forecast(module, inputs)
    with torch.no_grad():
        module.last.bias += 1
    after = forecast(module, inputs)
    change = (after.mean - before.mean - 1).abs().amax((0, 2, 3))
    assert change[0] < 1e-5  # the first step has read zeros
    assert (change[1:] > 1e-4).all()


def test_steps_that_are_computed_twice_have_the_same_gradients(monkeypatch):
    gradients = []
    for limit in (dgcrn._LINKS, 0):
        monkeypatch.setattr(dgcrn, "_LINKS", limit)
        module = model().train()
        module(batch()).mean.square().sum().backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_it_learns_what_travels_along_the_edge():
    def error(edges: list[tuple[int, int]]) -> float:
        return error_of_the_follower(
            still(model(FOLLOWER, hidden=16)), edges, steps=40, learning_rate=0.02, windows=192
        )

    assert error([]) > 0.9, "noise of variance 1: alone there is nothing to learn"
    assert error([(0, 1)]) < 0.4

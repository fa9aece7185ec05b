"""Graph WaveNet: it sees the whole look-back, diffuses both ways, and computes what was published."""

import dataclasses

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import build
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Adjacency, gather, transposed
from fleetcast.models.graph_wavenet import Diffusion, GraphWavenet, GraphWavenetConfig
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
)
from torch.nn.functional import batch_norm

SMALL = {"hidden": 8, "skip": 8, "end": 8}


def model(geometry: Geometry = GEOMETRY, **options) -> GraphWavenet:
    torch.manual_seed(0)
    return build("graph_wavenet", {**SMALL, **options}, geometry)


def of_history(history: int) -> Geometry:
    return GEOMETRY.model_copy(update={"history": history})


@pytest.mark.parametrize(
    ("history", "dilations"),
    [(1, [1, 2] * 4), (12, [1, 2] * 4), (13, [1, 2] * 4), (14, [1, 2, 4] * 4)],
)
def test_a_block_has_as_many_layers_as_see_the_look_back(history, dilations):
    assert GraphWavenetConfig().dilations(history) == dilations


@pytest.mark.parametrize(("history", "padding"), [(1, 12), (6, 7), (13, 0), (14, 15)])
def test_the_oldest_step_reaches_the_output(history, padding):
    module, inputs = model(of_history(history), residual=False), batch(geometry=of_history(history))
    x = inputs.x.clone().requires_grad_()
    module.eval()(dataclasses.replace(inputs, x=x)).mean.sum().backward()
    assert module.padding == padding
    assert x.grad[:, 0].abs().amax((1, 2)).min() > 0


def test_layers_that_do_not_see_the_look_back_are_refused():
    with pytest.raises(
        InputError, match=r"option layers: 2 in each of 1 blocks see 4 steps, expected .* of 6"
    ):
        model(blocks=1, layers=2)


def test_diffusion_moves_load_from_source_to_target_hop_by_hop():
    edges = Edges(torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([3.0, 1.0, 2.0]))
    walks, layer = Adjacency.walks(edges, 3), Diffusion(1, 2, 2)
    x = torch.tensor([4.0, 10.0, 100.0])
    along = torch.tensor([0.0, 3.0, 1.0 + 10.0])  # node 0 sends 3 : 1, node 1 all to node 2
    along_twice = torch.tensor([0.0, 0.0, 3.0])
    against = torch.tensor([10.0 + 100.0 / 3, 100.0 * 2 / 3, 0.0])  # node 2 answers 1 : 2
    against_twice = torch.tensor([100.0 * 2 / 3, 0.0, 0.0])
    weights = torch.tensor([[1.0, 0.1, 0.01, 0.001, 0.0001]])
    with torch.no_grad():
        layer.mix.weight.copy_(weights)
        supports = [(matrix, transposed(matrix)) for matrix in (walks.along, walks.against)]
        output = layer(x.view(3, 1, 1), supports).flatten()
    terms = torch.stack([x, along, along_twice, against, against_twice])
    torch.testing.assert_close(output, (weights @ terms).flatten())


def test_the_product_that_has_its_transpose_at_hand_has_the_same_gradient():
    along, gradients = Adjacency.walks(PATH, NODES).along, []
    for back in (None, transposed(along)):
        h = torch.arange(3.0 * NODES).view(NODES, 3).requires_grad_()
        gather(along, h, back).square().sum().backward()
        gradients.append(h.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def silenced(*supports: str, **options) -> GraphWavenet:
    """Two diffusions of one hop each, without some of the supports."""
    module = model(blocks=1, hops=1, **options)
    assert len(module.diffusions) == 2
    for layer in module.diffusions:
        parts = dict(
            zip(("own", "adaptive", "along", "against"), layer.mix.weight.data.chunk(4, 1), strict=True)
        )
        for support in supports:
            parts[support].zero_()
    return module


@pytest.mark.parametrize(
    ("without", "reached"),
    [((), {0, 1, 2, 3, 4}), (("against",), {2, 3, 4}), (("along",), {0, 1, 2}), (("along", "against"), {2})],
)
def test_information_moves_along_and_against_the_edges_one_edge_a_hop(without, reached):
    assert affected(silenced("adaptive", *without), PATH, 2) == reached


def test_no_information_moves_farther_than_there_are_hops():
    assert affected(silenced("adaptive"), PATH, 0) == {0, 1, 2}
    assert affected(silenced("adaptive"), NO_EDGES, 2) == {2}


def test_the_adaptive_adjacency_needs_no_edges():
    assert affected(model(), NO_EDGES, 2) == set(range(NODES))
    assert affected(model(graph="learned"), NO_EDGES, 2) == set(range(NODES))


def published(module: GraphWavenet, x: torch.Tensor, supports: list[torch.Tensor]) -> torch.Tensor:
    """The published forward pass on [B, T, N, inputs]: images, einsum from row to column, growing skips.

    The walks' matrices have the sender's row, and the skip is taken of all steps and cropped.
    """
    images, skip = module.start(x).permute(0, 3, 2, 1), 0
    for i, gate in enumerate(module.gates):
        convolution = gate.convolution
        z = torch.conv2d(images, convolution.weight.mT, convolution.bias, dilation=convolution.dilation[::-1])
        filtered, gates = z.chunk(2, dim=1)  # the module's filter is twice the published tanh's argument
        gated = (filtered / 2).tanh() * gates.sigmoid()
        weight = module.skip.weight.chunk(len(module.gates), 1)[i][:, :, None, None]
        added = torch.conv2d(gated, weight)
        skip = added + (skip[..., -added.shape[3] :] if i else module.skip.bias[:, None, None])
        if i == len(module.diffusions):
            break
        hops = [gated]
        for support in supports:
            hops.append(torch.einsum("ncvl,nvw->ncwl", gated, support))
            hops.append(torch.einsum("ncvl,nvw->ncwl", hops[-1], support))
        mix = module.diffusions[i].mix
        mixed = torch.conv2d(torch.cat(hops, 1), mix.weight[:, :, None, None])
        norm, summed = module.norms[i], mixed + images[..., -mixed.shape[3] :]
        images = batch_norm(summed, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert skip.shape[3] == 1
    return module.last(module.end(skip[..., 0].relu().transpose(1, 2)).relu())


def test_the_forward_pass_is_the_published_one():
    module, inputs = model(residual=False).eval(), batch(2)
    dense = torch.zeros(2 * NODES, 2 * NODES).index_put(
        tuple(inputs.edges.index), inputs.edges.weight, accumulate=True
    )
    weight = torch.stack([dense[:NODES, :NODES], dense[NODES:, NODES:]])

    def walk(a):
        return a / a.sum(2, keepdim=True).clamp_min(1e-9)

    adaptive = (module.sources.table @ module.targets.table.T).relu().softmax(1).expand(2, -1, -1)
    time = inputs.time_x[:, :, None].expand(-1, -1, NODES, -1)
    steps = torch.cat([inputs.x, inputs.mask.float(), time], dim=-1)
    padded = torch.cat([torch.zeros(2, 7, NODES, 7), steps], dim=1)  # 4 blocks of 2 layers see 13 steps
    with torch.no_grad():
        for norm in module.norms:
            norm.running_mean.normal_()
        expected = published(module, padded, [adaptive, walk(weight), walk(weight.mT)])
        torch.testing.assert_close(
            module.raw(inputs), expected.view(2, NODES, 4, 2, 4).transpose(1, 2), rtol=1e-4, atol=1e-4
        )


def test_it_learns_what_travels_along_the_edge_and_finds_it_itself():
    def error(edges: list[tuple[int, int]], **options) -> float:
        module = model(FOLLOWER, blocks=1, hidden=16, skip=32, end=32, dropout=0, **options)
        return error_of_the_follower(module, edges, steps=120, learning_rate=0.003)

    assert error([(0, 1)]) < 0.4
    assert error([], graph="learned") < 0.4

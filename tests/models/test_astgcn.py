"""astgcn: its graph convolution and attentions are the paper's, and every branch and node counts."""

import dataclasses

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import build
from fleetcast.models.astgcn import (
    ChebyshevConvolution,
    SpatialAttention,
    TemporalAttention,
    chebyshev,
    dense,
    scaled_laplacian,
)
from fleetcast.models.base import Model
from fleetcast.windows.batch import Edges
from samples import FOLLOWER, GEOMETRY, NODES, PATH, affected, batch, error_of_the_follower, forecast


def model(**options) -> Model:
    torch.manual_seed(0)
    return build("astgcn", {"hidden": 8, **options}, GEOMETRY)


def make_neutral(module: Model) -> None:
    """Attention that is the same for all, whatever the values."""
    for part in module.modules():
        if isinstance(part, SpatialAttention | TemporalAttention):
            torch.nn.init.zeros_(part.v)


def test_the_laplacian_is_scaled_and_blind_to_the_direction():
    edges = Edges(torch.tensor([[0, 2], [1, 1]]), torch.tensor([1.0, 3.0]))
    expected = torch.zeros(4, 4)
    expected[0, 1] = expected[1, 0] = -1 / (1 * 4) ** 0.5
    expected[2, 1] = expected[1, 2] = -3 / (3 * 4) ** 0.5
    expected[3, 3] = -1  # no edges: L = 0
    for given in (edges, Edges(edges.index.flip(0), edges.weight)):
        torch.testing.assert_close(scaled_laplacian(dense(given, 1, 4))[0], expected)


def test_each_window_has_the_laplacian_of_its_own_edges():
    both = scaled_laplacian(dense(Edges(torch.tensor([[0, 3], [1, 5]]), torch.ones(2)), 2, 3))
    torch.testing.assert_close(both[0], -torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    torch.testing.assert_close(both[1], -torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]]))


def test_eigenvalues_of_the_scaled_laplacian_lie_where_the_polynomials_are_bounded():
    inputs = batch(4)
    eigenvalues = torch.linalg.eigvalsh(scaled_laplacian(dense(inputs.edges, 4, NODES)))
    torch.testing.assert_close(eigenvalues[:, 0], -torch.ones(4))
    assert eigenvalues.max() <= 1 + 1e-6


def test_the_recursion_is_of_matrix_products():
    laplacian = scaled_laplacian(dense(PATH, 1, NODES))
    t1, t2, t3 = chebyshev(laplacian, 4)
    torch.testing.assert_close(t1, laplacian)
    torch.testing.assert_close(t2[0], 2 * laplacian[0].mm(laplacian[0]) - torch.eye(NODES))
    torch.testing.assert_close(t3[0], 4 * torch.linalg.matrix_power(laplacian[0], 3) - 3 * laplacian[0])
    assert t2[0, 0, 2] > 0  # two edges apart: the element-wise product has nothing there


def test_the_convolution_is_the_papers_equation():
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, NODES, 6, 3, generator=random)
    attention = torch.rand(2, NODES, NODES, generator=random).softmax(-1)
    layer = ChebyshevConvolution(3, 4, order=3)
    polynomials = chebyshev(scaled_laplacian(dense(batch(2).edges, 2, NODES)), 3)
    identity = torch.eye(NODES).expand(2, -1, -1)
    expected = sum(
        torch.einsum("bji,bji,bitc,cd->bjtd", polynomial, attention, x, theta)
        for polynomial, theta in zip([identity, *polynomials], layer.theta.split(3), strict=True)
    )
    torch.testing.assert_close(layer(x, polynomials, attention), expected)


def test_what_a_receiver_takes_of_its_sources_sums_to_one():
    torch.manual_seed(0)
    x, nodes = torch.randn(2, NODES, 6, 3), torch.arange(NODES)
    for attention in (TemporalAttention(NODES, 6, 3), SpatialAttention(NODES, 6, 3)):
        weight = attention(x, nodes)
        torch.testing.assert_close(weight.sum(2), torch.ones(weight.shape[:2]))
        assert not torch.allclose(weight.sum(1), torch.ones(weight.shape[:2]), atol=1e-3)


def test_attention_is_the_papers_equation():
    torch.manual_seed(0)
    x, nodes = torch.randn(2, NODES, 6, 3), torch.arange(NODES)
    time, space = TemporalAttention(NODES, 6, 3), SpatialAttention(NODES, 6, 3)
    for attention in (time, space):
        torch.nn.init.normal_(attention.b)
    published = x.transpose(2, 3)  # [B, N, inputs, T]
    e = time.v.T @ torch.sigmoid(
        (published.permute(0, 3, 2, 1) @ time.u1) @ time.u2 @ (time.u3 @ published) + time.b.T
    )
    s = space.v.T @ torch.sigmoid((published @ space.w1 @ space.w2) @ (space.w3 @ published).mT + space.b.T)
    torch.testing.assert_close(time(x, nodes), e.softmax(1).mT)
    torch.testing.assert_close(space(x, nodes), s.softmax(1).mT)


def test_with_neutral_attention_information_moves_two_edges_a_block():
    one, two = model(blocks=1), model(blocks=2)
    for module in (one, two):
        make_neutral(module)
    assert affected(one, PATH, 0) == {0, 1, 2}
    assert affected(one, PATH, 2) == {0, 1, 2, 3, 4}
    assert affected(two, PATH, 0) == {0, 1, 2, 3, 4}
    reach_one = model(blocks=2, order=2)
    make_neutral(reach_one)
    assert affected(reach_one, PATH, 0) == {0, 1, 2}


@pytest.mark.parametrize("attention", [SpatialAttention, TemporalAttention])
def test_each_attention_matters(attention):
    module = model()
    before = forecast(module, batch()).mean
    for part in module.modules():
        if isinstance(part, attention):
            torch.nn.init.zeros_(part.v)
    assert not torch.allclose(before, forecast(module, batch()).mean, atol=1e-4)


def test_temporal_attention_reaches_the_forecast_by_the_convolution_too():
    module = model(blocks=1)
    for part in module.modules():
        if isinstance(part, SpatialAttention):
            torch.nn.init.zeros_(part.v)  # the same whatever temporal attention gives it
    before = forecast(module, batch()).mean
    make_neutral(module)
    assert not torch.allclose(before, forecast(module, batch()).mean, atol=1e-4)


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_each_branch_reads_its_own_segment(branch):
    module, inputs = model(residual=False), batch()
    with torch.no_grad():
        module.fusion.zero_()[branch] = 1
    recent = dataclasses.replace(inputs, x=inputs.x + 1)
    daily, weekly = (inputs.seasonal.clone() for _ in range(2))
    daily[..., 0] += 1
    weekly[..., 1] += 1
    changed = [
        recent,
        dataclasses.replace(inputs, seasonal=daily),
        dataclasses.replace(inputs, seasonal=weekly),
    ]
    before = forecast(module, inputs).mean
    moved = [not torch.equal(before, forecast(module, other).mean) for other in changed]
    assert moved == [place == branch for place in range(3)]


def test_branches_are_fused_by_a_weight_per_node_and_horizon_step():
    module, inputs = model(residual=False), batch()
    before = forecast(module, inputs).mean
    with torch.no_grad():
        module.fusion[:, 3, 1] = 0
    after = forecast(module, inputs).mean
    assert (after[:, 1, 3] == 0).all()
    after[:, 1, 3] = before[:, 1, 3]
    assert torch.equal(before, after)


def test_a_node_takes_its_parameters_along_into_another_group():
    module = model()
    make_neutral(module)
    groups = [
        dataclasses.replace(batch(1, 2, edges=Edges(torch.tensor([[0], [1]]), torch.ones(1))), nodes=ids)
        for ids in (torch.tensor([3, 1]), torch.tensor([3, 4]), torch.tensor([0, 1]))
    ]
    with torch.no_grad():
        module.fusion[:, 3] *= 2
    same, kept, other = (forecast(module, group).mean[:, :, 0] for group in groups)
    torch.testing.assert_close(same, kept)
    assert not torch.allclose(same, other)


def test_spatial_attention_knows_its_pairs_by_their_ids():
    torch.manual_seed(0)
    attention, x = SpatialAttention(NODES, 6, 3), torch.randn(2, NODES, 6, 3)
    torch.nn.init.normal_(attention.b)
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = attention(x, torch.arange(NODES))
    torch.testing.assert_close(attention(x[:, order], order), whole[:, order][:, :, order])


def test_entities_it_was_not_trained_on_are_named_as_the_problem():
    strangers = dataclasses.replace(batch(1), nodes=torch.tensor([0, -1, 2, -1, 4]))
    with pytest.raises(InputError, match="model astgcn: 2 of 5 entities are unknown to it, expected those"):
        model()(strangers)


def test_single_steps_leave_no_idle_parameter():
    geometry = GEOMETRY.model_copy(update={"history": 1, "horizon": 1})
    torch.manual_seed(0)
    module = build("astgcn", {"hidden": 8}, geometry)
    module(batch(8, geometry=geometry)).mean.square().sum().backward()
    assert [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_it_learns_what_travels_along_the_edge():
    def error(edges: list[tuple[int, int]]) -> float:
        torch.manual_seed(0)
        module = build("astgcn", {"hidden": 16, "blocks": 1}, FOLLOWER)
        return error_of_the_follower(module, edges, steps=80, learning_rate=0.02)

    assert error([]) > 0.9, "noise of variance 1: alone there is nothing to learn"
    assert error([(0, 1)]) < 0.4

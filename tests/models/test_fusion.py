"""fusion: the paper's equations, its candidates, the edges that each step keeps, and what it learns."""

import dataclasses

import numpy as np
import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import build, fusion
from fleetcast.models.fusion import (
    PLAIN,
    AdditiveAttention,
    Candidates,
    DynamicAdjacency,
    Fusion,
    FusionConfig,
    kept_edges,
    most_correlated,
    unit_series,
)
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch, Edges
from samples import GEOMETRY, NO_EDGES, NODES, PATH, affected, assert_same, batch, forecast, window
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def model(geometry: Geometry = GEOMETRY, **options) -> Fusion:
    torch.manual_seed(0)
    return build("fusion", {"hidden": 8, "identity": 4, "dropout": 0, **options}, geometry)


def relevance(candidates: Candidates) -> dict[tuple[int, int], float]:
    """By sender and receiver."""
    pairs = map(tuple, candidates.index.T.tolist())
    return dict(zip(pairs, candidates.relevance.tolist(), strict=True))


def observed(*series: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """One window of one metric of these nodes; None is a gap whose filling is absurd."""
    x = torch.tensor([[1e3 if v is None else v for v in values] for values in series]).T[None, :, :, None]
    return x, torch.tensor([[v is not None for v in values] for values in series]).T[None, :, :, None]


# --- The paper's equations, densely ---------------------------------------------------------------------


def dense_relevance(inputs: Batch, b: int, neighbours: int) -> np.ndarray:
    """[receiver, sender] of one window, NaN where there is no candidate: from the definitions."""
    nodes = inputs.x.shape[2]
    x, mask = inputs.x[b].double().numpy(), inputs.mask[b].numpy()
    level = (x * mask).sum(0) / mask.sum(0)
    centred = (x - level) * mask
    correlation = np.zeros((nodes, nodes))
    for f in range(x.shape[2]):
        norms = np.linalg.norm(centred[..., f], axis=0)
        correlation += centred[..., f].T @ centred[..., f] / np.outer(norms, norms) / x.shape[2]
    dependency = np.zeros((nodes, nodes))
    pairs, given = inputs.edges.index.tolist(), inputs.edges.weight.tolist()
    for source, target, weight in zip(*pairs, given, strict=True):
        if source // nodes == b and source != target:
            dependency[target % nodes, source % nodes] += weight
    candidate = dependency > 0
    for i in range(nodes):
        others = sorted(set(range(nodes)) - {i}, key=lambda j: -correlation[i, j])
        candidate[i, others[:neighbours]] = True
    share = dependency / np.maximum(dependency.max(1, keepdims=True), 1e-30)
    positive = correlation.clip(min=0)
    return np.where(candidate, positive + share - positive * share, np.nan)


def dense_forecast(module: Fusion, inputs: Batch, **options) -> torch.Tensor:
    """Eq. 2–6 with an [N, N] adjacency for each window, step and head."""
    heads, sparsity = options["heads"], options["sparsity"]
    windows, history, nodes, _ = inputs.x.shape
    time = inputs.time_x[:, :, None].expand(-1, -1, nodes, -1)
    x = torch.cat([inputs.x, inputs.mask.float(), time], dim=-1)
    spatial = torch.zeros(windows, history, nodes, module.config.hidden)
    for b in range(windows):
        relevant = torch.tensor(dense_relevance(inputs, b, options["neighbours"]), dtype=torch.float32)
        candidate, relevant = ~relevant.isnan(), relevant.nan_to_num()
        for t in range(history):
            to, of = module.attention.receiver(x[b, t]), module.attention.sender(x[b, t])
            hidden = torch.tanh(to[:, None] + of[None]).unflatten(-1, (heads, -1))
            weight = torch.sigmoid((hidden * module.attention.vector).sum(-1)) * relevant[..., None]
            strength = torch.where(candidate, weight.mean(-1), -torch.inf)
            count = kept_edges(sparsity, int(candidate.sum()))
            keep = torch.zeros_like(candidate).flatten()
            keep[strength.flatten().topk(count).indices] = True
            weight = torch.where(keep.view(nodes, nodes, 1), weight, 0) + torch.eye(nodes)[..., None]
            adjacency = weight / weight.sum(1, keepdim=True)
            h = x[b, t]
            for layer in module.convolutions:
                shares = (h @ layer.neighbours.weight.T).unflatten(-1, (heads, -1))
                h = torch.relu(torch.einsum("ijk,jkc->ikc", adjacency, shares).flatten(1))
            spatial[b, t] = h
    steps = torch.cat([x, spatial], dim=-1) if options["sequence"] else x
    _, temporal = module.gru(steps.transpose(0, 1).flatten(1, 2))
    alpha = torch.sigmoid(module.balance)
    fused = alpha * spatial[:, -1] + (1 - alpha) * temporal[0].unflatten(0, (windows, nodes))
    return module.head.last(fused).unflatten(-1, (GEOMETRY.horizon, *module.outputs)).transpose(1, 2)


@pytest.mark.parametrize("nodes", [NODES, 40])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("options", [(0, 0.5, 1), (3, 0.5, 4), (3, 0, 2), (99, 0.3, 2), (99, 0, 4)])
def test_the_sparse_path_is_the_papers_equations(nodes, sequence, options):
    options = dict(zip(("neighbours", "sparsity", "heads"), options, strict=True), sequence=sequence)
    module, inputs = model(**PLAIN | options), batch(2, nodes)
    inputs = dataclasses.replace(inputs, mask=inputs.mask.index_fill(1, torch.tensor([0, 1]), True))
    expected = dense_forecast(module, inputs, **options)
    torch.testing.assert_close(module.raw(inputs), expected, rtol=0, atol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad((module.raw(inputs) * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_plain_form_reads_nothing_ahead():
    module, inputs = model(**PLAIN), batch()
    other = dataclasses.replace(
        inputs,
        seasonal_x=inputs.seasonal_x + 1,
        seasonal=inputs.seasonal + 1,
        time_y=inputs.time_y + 1,
    )
    assert torch.equal(forecast(module, inputs).mean, forecast(module, other).mean)


# --- Candidates -----------------------------------------------------------------------------------------


def test_candidates_are_the_dependencies_and_the_most_correlated():
    up, down = [0.0, 1, 2, 4], [4.0, 2, 1, 0]
    series = unit_series(*observed(up, [1.0, 2, 3, 5], down, [0.0, 1, 2, 3]))
    edges = Edges(torch.tensor([[2, 3, 3, 1], [0, 0, 0, 1]]), torch.tensor([1.0, 0.5, 1.5, 9.0]))
    found = relevance(Candidates.union(edges, series, neighbours=1))
    r = np.corrcoef(up, [0, 1, 2, 3])[0, 1]
    # 0 and 1 move alike, so they are equals to 3, and to 2, which moves against all, least against these.
    assert found.keys() == {(1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (0, 3)}
    assert found[1, 0] == pytest.approx(1)  # correlation alone
    assert found[2, 0] == pytest.approx(1 / 2)  # half the weight of the largest, and no positive correlation
    assert found[3, 0] == pytest.approx(1)  # the largest, of two rows
    assert found[0, 3] == pytest.approx(r)
    assert found[0, 2] == 0


def test_of_equally_correlated_entities_the_first_are_candidates():
    spike = [0.0, 0, 1, 0]
    series = unit_series(*observed(*[spike] * 6))
    assert most_correlated(series, 2).tolist() == [[[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]]


def test_blocks_of_rows_give_the_same_candidates(monkeypatch):
    inputs = batch(2, 30)
    series = unit_series(inputs.x, inputs.mask)
    whole = most_correlated(series, 4)
    monkeypatch.setattr(fusion, "_BLOCK", 7 * 60)
    assert torch.equal(most_correlated(series, 4), whole)


def test_only_observed_values_correlate():
    with_gaps = unit_series(*observed([1.0, 2, 3, None], [5.0, 6, 7, None], [2.0, 1, 0, None]))
    without = unit_series(*observed([1.0, 2, 3], [5.0, 6, 7], [2.0, 1, 0]))
    torch.testing.assert_close(with_gaps @ with_gaps.mT, without @ without.mT)
    assert (with_gaps @ with_gaps.mT)[0, 0].tolist() == pytest.approx([1, 1, -1])


def test_the_correlation_is_the_mean_over_the_metrics_that_vary():
    x = torch.tensor([[[1.0, 3], [1, 3]], [[2, 1], [2, 4]], [[3, 2], [3, 1]]])[None]  # cpu alike, memory not
    both = unit_series(x, torch.ones_like(x, dtype=torch.bool))
    r = np.corrcoef([3, 1, 2], [3, 4, 1])[0, 1]
    assert (both @ both.mT)[0, 0, 1] == pytest.approx((1 + r) / 2)
    still = x.clone()
    still[..., 1] = 5
    one = unit_series(still, torch.ones_like(x, dtype=torch.bool))
    assert (one @ one.mT)[0, 0, 1] == pytest.approx(1)


def test_series_without_change_or_observation_are_relevant_to_none():
    series = unit_series(*observed([0.1] * 7, [100.1] * 7, [None] * 7, [0.0, 1, 2, 3, 4, 5, 6]))
    assert set(relevance(Candidates.union(NO_EDGES, series, 3)).values()) == {0}


def test_a_window_without_any_observation_is_forecast():
    module, inputs = model(), batch()
    nothing = dataclasses.replace(inputs, mask=torch.zeros_like(inputs.mask))
    output = module(nothing)
    (output.mean.sum() + output.quantiles.sum()).backward()
    assert output.mean.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_a_shuffled_graph_is_the_true_one_between_other_nodes():
    inputs = batch(2, 12)
    true, shuffled = (model(graph=kind, neighbours=3).candidates(inputs) for kind in ("true", "shuffled"))
    torch.testing.assert_close(shuffled.relevance.sort().values, true.relevance.sort().values)
    assert shuffled.sizes == true.sizes
    assert relevance(shuffled).keys() != relevance(true).keys()
    degrees = [sorted(torch.bincount(c.index[0], minlength=24)[:12].tolist()) for c in (true, shuffled)]
    assert degrees[0] == degrees[1]


def test_a_learned_graph_is_the_same_in_all_windows_and_knows_no_edges():
    module, inputs = model(graph="learned", neighbours=2), batch(2)
    found = relevance(module.candidates(inputs))
    assert found == relevance(module.candidates(dataclasses.replace(inputs, edges=NO_EDGES)))
    first = {pair: value for pair, value in found.items() if pair[1] < NODES}
    assert found == first | {(i + NODES, j + NODES): value for (i, j), value in first.items()}
    weight = NODES * module.graph.weight(inputs).detach()
    for receiver in range(NODES):
        strongest = sorted((float(weight[j, receiver]) for j in range(NODES) if j != receiver), reverse=True)
        assert sorted((v for (_, i), v in first.items() if i == receiver), reverse=True) == strongest[:2]


# --- The adjacency of each step -------------------------------------------------------------------------


def adjacency(inputs: Batch, sparsity: float) -> DynamicAdjacency:
    module = model(neighbours=3, sparsity=sparsity)
    steps = torch.randn(4, 2 * NODES, 5, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    attention = AdditiveAttention(5, module.config)
    return attention(steps, module.candidates(inputs))


def weights(of: DynamicAdjacency) -> list[dict[tuple[int, int], float]]:
    """Of each step, the mean over heads by sender and receiver."""
    index, mean = of.routes.index, of.weight.mean(0).view(4, -1)
    steps = zip(index.unbind(1), mean, strict=True)
    return [dict(zip(zip(*pairs.tolist(), strict=True), w.tolist(), strict=True)) for pairs, w in steps]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_each_step_keeps_the_strongest_edges_of_each_window(sparsity):
    inputs = batch(2)
    first = inputs.edges.index[0] < NODES
    few = Edges(inputs.edges.index[:, first], inputs.edges.weight[first])  # of the first window only
    inputs = dataclasses.replace(inputs, edges=few)
    sizes = model(neighbours=3).candidates(inputs).sizes
    assert sizes[0] > sizes[1] == 3 * NODES
    kept, every = weights(adjacency(inputs, sparsity)), weights(adjacency(inputs, 0))
    for step in range(4):
        for b in range(2):
            inside = {pair: w for pair, w in every[step].items() if pair[0] // NODES == b}
            assert len(inside) == sizes[b]
            strongest = sorted(inside.items(), key=lambda item: -item[1])[: kept_edges(sparsity, sizes[b])]
            found = {pair: w for pair, w in kept[step].items() if pair[0] // NODES == b and w > 0}
            assert found == pytest.approx({pair: w for pair, w in strongest if w > 0})
        assert len(kept[step]) == sum(kept_edges(sparsity, size) for size in sizes)


def test_how_many_edges_are_kept():
    assert [kept_edges(s, 10) for s in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)] == [10, 9, 7, 5, 3, 1, 1, 1]
    assert kept_edges(0.29, 100) == 71
    assert kept_edges(0.5, 0) == 0


def test_weights_differ_from_step_to_step_and_head_to_head():
    found = adjacency(batch(2), 0)
    by_step = found.weight.view(4, 4, -1)
    positive = by_step[0, 0] > 0
    assert (by_step.std(1)[:, positive] > 0).all()
    assert (by_step.std(0)[:, positive] > 0).all()


def test_information_moves_along_the_edges_one_edge_a_layer():
    options = {"neighbours": 0, "sparsity": 0}
    assert affected(model(layers=1, **options), PATH, 2) == {2, 3}
    assert affected(model(layers=2, **options), PATH, 2) == {2, 3, 4}
    assert affected(model(layers=2, **options), PATH, 4) == {4}
    assert affected(model(layers=2, neighbours=0, graph="identity"), PATH, 2) == {2}


def test_a_window_does_not_depend_on_what_the_others_keep():
    module = model(neighbours=2)
    inputs = batch(3)
    inside = inputs.edges.index[0] // NODES != 1  # the second window has no dependency
    inputs = dataclasses.replace(
        inputs, edges=Edges(inputs.edges.index[:, inside], inputs.edges.weight[inside])
    )
    together = forecast(module, inputs)
    for b in range(3):
        alone = forecast(module, window(inputs, b))
        assert_same(
            dataclasses.replace(
                together, mean=together.mean[b : b + 1], quantiles=together.quantiles[b : b + 1]
            ),
            alone,
        )


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation within it makes."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **kwargs or {})
        dense = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and t.layout == torch.strided]
        self.numbers = max(self.numbers, *(t.untyped_storage().nbytes() // t.itemsize for t in dense), 0)
        return made


def test_memory_grows_with_the_edges_not_with_the_pairs(monkeypatch):
    monkeypatch.setattr(fusion, "_BLOCK", 100_000)
    nodes = 1000
    module = model(neighbours=4)
    inputs = dataclasses.replace(batch(1, nodes), nodes=torch.full((nodes,), -1))
    with Largest() as largest:
        module(inputs).mean.sum().backward()
    assert 0 < largest.numbers < 500_000 < nodes**2


def test_heads_share_the_width():
    with pytest.raises(
        InputError, match=r"model fusion: option heads: .*expected a divisor of hidden \(10\)"
    ):
        model(hidden=10, heads=4)


# --- Learning -------------------------------------------------------------------------------------------


def geometry_of(nodes: int) -> Geometry:
    return Geometry(
        history=8,
        horizon=2,
        metrics=("cpu",),
        lags=(),
        calendar=1,
        quantiles=(),
        entities=tuple("abc"[:nodes]),
    )


def windows_of(series: torch.Tensor, mask: torch.Tensor, pairs: list[tuple[int, int]]) -> Batch:
    """[B, 10, N] series: 8 steps to look back at and 2 targets; the same dependencies in every window."""
    windows, _, nodes = series.shape
    index = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    index = (index[:, None] + nodes * torch.arange(windows)[:, None]).flatten(1)
    whole = batch(windows, nodes, geometry_of(nodes), Edges(index, torch.ones(index.shape[1])))
    return dataclasses.replace(
        whole,
        x=series[:, :8, :, None],
        mask=mask[:, :8, :, None],
        y=series[:, 8:, :, None],
        y_mask=torch.ones_like(whole.y_mask),
        time_x=torch.zeros_like(whole.time_x),
        time_y=torch.zeros_like(whole.time_y),
    )


def error_after_training(training: Batch, test: Batch, node: int, steps: int, **options) -> float:
    torch.manual_seed(0)
    module = FusionConfig(hidden=16, layers=1, **options).build(geometry_of(training.x.shape[2]))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (module(training).mean - training.y).square().mean().backward()
        optimizer.step()
    assert 0 < module.alpha < 1
    assert module.alpha != 0.5
    return float((forecast(module, test).mean - test.y)[:, :, node].square().mean())


@pytest.mark.parametrize("options", [{}, PLAIN | {"sequence": True}])
def test_it_learns_what_travels_along_a_dependency(options):
    def follower(pairs: list[tuple[int, int]], seed: int) -> Batch:
        """Node 1 repeats node 0, which is noise, three steps later."""
        noise = torch.randn(256, 13, generator=torch.Generator().manual_seed(seed))
        series = torch.stack([noise[:, 3:], noise[:, :-3]], dim=2)
        return windows_of(series, torch.ones_like(series, dtype=torch.bool), pairs)

    def error(pairs: list[tuple[int, int]]) -> float:
        options_ = {"neighbours": 0, "sparsity": 0, **options}
        return error_after_training(follower(pairs, 3), follower(pairs, 4), 1, 150, **options_)

    assert error([]) > 0.9  # noise of variance 1: alone there is nothing to learn
    assert error([(0, 1)]) < 0.4


def test_it_learns_from_the_correlated_what_no_dependency_tells():
    def twins(seed: int) -> Batch:
        """Random walks. Node 1 is node 0 without its last three steps; node 2 is another."""
        random = torch.Generator().manual_seed(seed)
        walks = torch.randn(256, 10, 2, generator=random).cumsum(1)
        series = walks[..., [0, 0, 1]]
        mask = torch.ones_like(series, dtype=torch.bool)
        mask[:, 5:8, 1] = False
        return windows_of(torch.where(mask, series, 0), mask, [])

    def error(neighbours: int) -> float:
        options = {"neighbours": neighbours, "sparsity": 0}
        return error_after_training(twins(3), twins(4), 1, 100, **options)

    assert error(neighbours=1) < 0.7 * error(neighbours=0)

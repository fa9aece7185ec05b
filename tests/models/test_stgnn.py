"""stgnn: what it must be whatever it has learnt, and that it learns what travels along the edges."""

import dataclasses

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.models import MODELS, build
from fleetcast.models.base import Geometry, Model, Output
from fleetcast.models.layers import Adjacency, NaiveBlend
from fleetcast.models.stgnn import Stgnn
from fleetcast.windows.batch import Batch, Edges

GEOMETRY = Geometry(
    history=6, horizon=4, metrics=("cpu", "memory"), lags=(8, 16), calendar=3, quantiles=(0.1, 0.5, 0.9)
)
NODES = 5
PLAIN = {"seasonal": False, "residual": False, "own": False}
NO_EDGES = Edges(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0))


def model(geometry: Geometry = GEOMETRY, **options) -> Model:
    torch.manual_seed(0)
    return build("stgnn", {"hidden": 8, **options}, geometry)


def batch(
    windows: int = 3, nodes: int = NODES, geometry: Geometry = GEOMETRY, edges: Edges | None = None
) -> Batch:
    """Random windows; each with random edges of its own unless `edges` of the whole batch are given."""
    random = torch.Generator().manual_seed(1)
    past = (windows, geometry.history, nodes, len(geometry.metrics))
    future = (windows, geometry.horizon, nodes, len(geometry.metrics))
    seasonal = (*future, len(geometry.lags))
    if edges is None:
        pairs = torch.randint(nodes, (2, windows, 2 * nodes), generator=random)
        index = (pairs + nodes * torch.arange(windows)[:, None]).flatten(1)
        edges = Edges(index, torch.rand(index.shape[1], generator=random) + 0.1)
    return Batch(
        x=torch.randn(past, generator=random),
        mask=torch.rand(past, generator=random) < 0.8,
        time_x=torch.randn(windows, geometry.history, geometry.calendar, generator=random),
        time_y=torch.randn(windows, geometry.horizon, geometry.calendar, generator=random),
        seasonal=torch.randn(seasonal, generator=random),
        seasonal_mask=torch.rand(seasonal, generator=random) < 0.8,
        edges=edges,
        y=torch.randn(future, generator=random),
        y_mask=torch.rand(future, generator=random) < 0.8,
        origins=torch.arange(windows),
    )


def window(whole: Batch, b: int) -> Batch:
    """Window b of a batch, alone."""
    nodes = whole.x.shape[2]
    inside = whole.edges.index[0] // nodes == b
    edges = Edges(whole.edges.index[:, inside] - b * nodes, whole.edges.weight[inside])
    tensors = {
        field.name: getattr(whole, field.name)[b : b + 1]
        for field in dataclasses.fields(Batch)
        if field.name != "edges"
    }
    return Batch(edges=edges, **tensors)


def forecast(module: Model, inputs: Batch) -> Output:
    with torch.no_grad():
        return module.eval()(inputs)


def assert_same(a: Output, b: Output) -> None:
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.quantiles, b.quantiles, rtol=0, atol=1e-5)


def affected(module: Model, edges: Edges, node: int) -> set[int]:
    """The nodes whose forecast moves when one node's look-back does, in one window of five nodes."""
    before = batch(1, edges=edges)
    x = before.x.clone()
    x[:, :-1, node] += 1  # not the last value, which the blend reads
    after = dataclasses.replace(before, x=x)
    moved = (forecast(module, before).mean - forecast(module, after).mean).abs().amax((0, 1, 3))
    return set(torch.nonzero(moved).flatten().tolist())


PATH = Edges(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]), torch.tensor([1.0, 0.5, 2.0, 1.0]))


@pytest.mark.parametrize("options", [{}, PLAIN, {"seasonal": False}, {"residual": False}, {"gru_layers": 2}])
@pytest.mark.parametrize("geometry", [GEOMETRY, GEOMETRY.model_copy(update={"quantiles": (), "lags": ()})])
def test_shapes_and_no_parameter_without_a_gradient(geometry, options):
    module = model(geometry, **options)
    output = module(batch(geometry=geometry))
    assert output.mean.shape == (3, 4, NODES, 2)
    loss = output.mean.square().sum()
    if geometry.quantiles:
        assert output.quantiles.shape == (3, 4, NODES, 2, 3)
        loss = loss + output.quantiles.square().sum()
    else:
        assert output.quantiles is None
    loss.backward()
    dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead


def test_evaluation_is_deterministic_and_training_drops_out():
    module = model(dropout=0.5)
    assert torch.equal(forecast(module, batch()).mean, forecast(module, batch()).mean)
    module.train()
    assert not torch.equal(module(batch()).mean, module(batch()).mean)


def test_the_seed_fixes_the_initial_weights():
    a, b = (model().state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_window_gets_the_same_answer_alone_as_among_others():
    module, whole = model(), batch(4)
    together = forecast(module, whole)
    for b in range(4):
        alone = forecast(module, window(whole, b))
        assert_same(Output(together.mean[b : b + 1], together.quantiles[b : b + 1]), alone)


def test_no_target_reaches_an_output():
    module, inputs = model(), batch()
    changed = dataclasses.replace(inputs, y=inputs.y + 1, y_mask=~inputs.y_mask, origins=inputs.origins + 7)
    assert torch.equal(forecast(module, inputs).mean, forecast(module, changed).mean)
    assert torch.equal(forecast(module, inputs).quantiles, forecast(module, changed).quantiles)


def test_relabelling_the_nodes_permutes_the_output():
    module, inputs = model(), batch(2)
    new = torch.tensor([3, 0, 4, 1, 2])  # node n of the relabelled batch is node new[n] of the first
    old = torch.argsort(new)
    index = inputs.edges.index
    relabelled = Batch(
        **{
            name: getattr(inputs, name)[:, :, new]
            for name in ("x", "mask", "seasonal", "seasonal_mask", "y", "y_mask")
        },
        time_x=inputs.time_x,
        time_y=inputs.time_y,
        origins=inputs.origins,
        edges=Edges(index // NODES * NODES + old[index % NODES], inputs.edges.weight),
    )
    first, second = forecast(module, inputs), forecast(module, relabelled)
    assert_same(Output(first.mean[:, :, new], first.quantiles[:, :, new]), second)


def test_information_moves_along_and_against_the_edges_one_edge_a_layer():
    assert affected(model(layers=1), PATH, 2) == {1, 2, 3}
    assert affected(model(layers=2), PATH, 2) == {0, 1, 2, 3, 4}
    assert affected(model(layers=2), PATH, 0) == {0, 1, 2}


@pytest.mark.parametrize(("silenced", "reached"), [("against", {2, 3, 4}), ("along", {0, 1, 2})])
def test_each_direction_moves_information_its_own_way(silenced, reached):
    module = model(layers=2)
    for layer in module.graph:
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
    layer = model().graph[0]
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
    torch.testing.assert_close(layer(x, Adjacency.of(PATH, NODES))[:, 0], expected)


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
    other = dataclasses.replace(inputs, seasonal=inputs.seasonal + 1, seasonal_mask=~inputs.seasonal_mask)
    assert torch.equal(forecast(module, inputs).mean, forecast(module, other).mean)


def test_the_blend_is_convex_over_what_was_observed():
    geometry = GEOMETRY.model_copy(update={"metrics": ("cpu",)})
    blend, inputs = NaiveBlend(geometry), batch(1, 1, geometry)
    x = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1, 1)
    mask = torch.tensor([True, True, True, True, False, False]).view(1, 6, 1, 1)
    seasonal = torch.tensor([7.0, 13.0]).expand(1, 4, 1, 1, 2)
    there = torch.tensor([[True, True], [True, False], [False, True], [False, False]]).view(1, 4, 1, 1, 2)

    def blended(mask):
        inputs_ = dataclasses.replace(inputs, x=x, mask=mask, seasonal=seasonal, seasonal_mask=there)
        return blend(inputs_).flatten().tolist()

    assert blended(mask) == pytest.approx([(4 + 7 + 13) / 3, (4 + 7) / 2, (4 + 13) / 2, 4])
    assert blended(torch.zeros_like(mask)) == pytest.approx([10, 7, 13, 0])


def test_bfloat16_autocast_runs_and_stays_close():
    module, inputs = model(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs)
    (output.mean.mean() + output.quantiles.mean()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert output.mean.dtype == torch.float32
    torch.testing.assert_close(output.mean, forecast(module, inputs).mean, rtol=0, atol=0.05)


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"batch: x of shape \(3, 6, 5, 1\), expected \(3, 6, 5, 2\)"):
        model()(dataclasses.replace(batch(), x=torch.zeros(3, 6, NODES, 1)))
    with pytest.raises(InputError, match=f"model 'gru', expected one of {', '.join(sorted(MODELS))}"):
        build("gru", {}, GEOMETRY)
    with pytest.raises(InputError, match=r"model stgnn: option hidden: .*greater than or equal to 1"):
        build("stgnn", {"hidden": 0}, GEOMETRY)
    with pytest.raises(InputError, match="model stgnn: option depth: "):
        build("stgnn", {"depth": 2}, GEOMETRY)


def follower_batch(windows: int, edges_of_window: list[tuple[int, int]], seed: int) -> Batch:
    """Two nodes; node 1 repeats node 0, which is noise, three steps later. Two targets."""
    geometry = Geometry(history=8, horizon=2, metrics=("cpu",), lags=(), calendar=1, quantiles=())
    noise = torch.randn(windows, 8 + 2 + 3, generator=torch.Generator().manual_seed(seed))
    series = torch.stack([noise[:, 3:], noise[:, :-3]], dim=2)[..., None]
    pairs = torch.tensor(edges_of_window, dtype=torch.long).reshape(-1, 2).T
    index = (pairs[:, None] + 2 * torch.arange(windows)[:, None]).flatten(1)
    whole = batch(windows, 2, geometry, Edges(index, torch.ones(index.shape[1])))
    seen = torch.ones(windows, 10, 2, 1, dtype=torch.bool)
    return dataclasses.replace(
        whole,
        x=series[:, :8],
        mask=seen[:, :8],
        y=series[:, 8:],
        y_mask=seen[:, 8:],
        time_x=torch.zeros_like(whole.time_x),
        time_y=torch.zeros_like(whole.time_y),
    )


@pytest.mark.parametrize("options", [{}, PLAIN])
def test_it_learns_what_travels_along_the_edge(options):
    geometry = Geometry(history=8, horizon=2, metrics=("cpu",), lags=(), calendar=1, quantiles=())

    def error_of_the_follower(edges: list[tuple[int, int]]) -> float:
        torch.manual_seed(0)
        module = Stgnn(MODELS["stgnn"](hidden=24, layers=1, **options), geometry)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        training = follower_batch(256, edges, seed=3)
        for _ in range(150):
            optimizer.zero_grad()
            (module(training).mean - training.y).square().mean().backward()
            optimizer.step()
        test = follower_batch(256, edges, seed=4)
        return float((forecast(module, test).mean - test.y)[:, :, 1].square().mean())

    alone = error_of_the_follower([])
    assert alone > 0.9  # noise of variance 1: alone there is nothing to learn
    assert error_of_the_follower([(0, 1)]) < 0.4

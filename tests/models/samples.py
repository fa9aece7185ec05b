"""Batches that the tests of all models share, and what they ask of a model."""

import dataclasses

import torch
from fleetcast.models.base import Model, Output
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch, Edges

GEOMETRY = Geometry(
    history=6,
    horizon=4,
    metrics=("cpu", "memory"),
    lags=(8, 16),
    calendar=3,
    quantiles=(0.1, 0.5, 0.9),
    entities=tuple("abcde"),
)
NODES = 5
NO_EDGES = Edges(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0))
PATH = Edges(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]), torch.tensor([1.0, 0.5, 2.0, 1.0]))


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
        nodes=torch.arange(nodes),
        y=torch.randn(future, generator=random),
        y_mask=torch.rand(future, generator=random) < 0.8,
        seasonal_x=torch.randn(*past, len(geometry.lags), generator=random),
        seasonal_x_mask=torch.rand(*past, len(geometry.lags), generator=random) < 0.8,
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
        if field.name not in ("edges", "nodes")
    }
    return Batch(edges=edges, nodes=whole.nodes, **tensors)


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


#: Two nodes; node 1 repeats node 0, which is noise, three steps later.
FOLLOWER = Geometry(
    history=8, horizon=2, metrics=("cpu",), lags=(), calendar=1, quantiles=(), entities=("a", "b")
)


def follower_batch(windows: int, edges_of_window: list[tuple[int, int]], seed: int) -> Batch:
    """Windows of FOLLOWER with these edges."""
    noise = torch.randn(windows, 8 + 2 + 3, generator=torch.Generator().manual_seed(seed))
    series = torch.stack([noise[:, 3:], noise[:, :-3]], dim=2)[..., None]
    pairs = torch.tensor(edges_of_window, dtype=torch.long).reshape(-1, 2).T
    index = (pairs[:, None] + 2 * torch.arange(windows)[:, None]).flatten(1)
    whole = batch(windows, 2, FOLLOWER, Edges(index, torch.ones(index.shape[1])))
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


def error_of_the_follower(
    module: Model, edges: list[tuple[int, int]], steps: int, learning_rate: float, windows: int = 256
) -> float:
    """Squared error of node 1, of variance 1, after a training: below it only if node 0 was heard."""
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    training = follower_batch(windows, edges, seed=3)
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (module(training).mean - training.y).square().mean().backward()
        optimizer.step()
    test = follower_batch(256, edges, seed=4)
    return float((forecast(module, test).mean - test.y)[:, :, 1].square().mean())

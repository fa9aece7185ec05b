"""Neighbours on the border of a group: seen by models that look around, never learnt, scored or counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from fleetcast import models
from fleetcast.evaluation import backtest, levels
from fleetcast.evaluation.backtest import Measured
from fleetcast.models.geometry import Geometry
from fleetcast.schemas import QUANTILES
from fleetcast.store import Store
from fleetcast.training.loop import Run, train
from fleetcast.training.options import FitOptions
from fleetcast.windows import order
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest
from fleetcast.windows.views import OpenShard

START, STEPS, HOUR, STEP = 1_514_765_700, 160, 3600, 900
METRICS = ("cpu", "request_rate")
GROUPS, BORDERS = [["e0", "e1"], ["e2", "e3"], ["e4"]], [["e2"], ["e1", "e4"], []]
#: e2 sends its load to e0, and e4 to e3.
LINKS = [("e2", "e0"), ("e4", "e3"), ("e0", "e1")]

Made = tuple[Store, Manifest]


@pytest.fixture
def values() -> np.ndarray:
    """[T, N, F], a tenth missing."""
    random = np.random.default_rng(7)
    found = random.gamma(2, [0.1, 50], (STEPS, 5, 2)).astype(np.float32)
    return np.where(random.random(found.shape) < 0.1, np.float32(np.nan), found)


@pytest.fixture
def make(dataset) -> Callable[..., Made]:
    """The same telemetry with and without borders."""

    def made(values: np.ndarray, borders=None, **options) -> Made:
        start = START // HOUR * HOUR
        edges = [
            (start + HOUR * hour, source, target, 1.0)
            for hour in range(STEPS * STEP // HOUR)
            for source, target in LINKS
        ]
        shape = {"history": 6, "horizon": 4, "lags": (8,), "metrics": METRICS, "width": 60}
        return dataset(values, edges, **{"groups": GROUPS, "borders": borders} | shape | options)

    return made


def scores(made: Made, ladder: dict[str, backtest.Rung]) -> dict[str, Measured]:
    store, m = made
    batches = Shards(store, m).batches(order.evaluation(m, "val", 16))
    limits = np.tile(np.float32(m.scaler.mean), (m.entities, 1))
    return backtest.measure(batches, ladder, m.scaler, QUANTILES, m.horizon, None, limits)


def model(m: Manifest, name: str, **options) -> models.Model:
    torch.manual_seed(0)
    return models.build(name, options, Geometry.of(m, QUANTILES)).eval()


def same(one: Measured, other: Measured) -> None:
    assert one.scores.to_json() == other.scores.to_json()
    assert one.by_origin.keys() == other.by_origin.keys()
    for origin, sums in one.by_origin.items():
        np.testing.assert_array_equal(sums, other.by_origin[origin])
    for part in ("residuals", "peaks", "entities"):
        mine, theirs = (vars(getattr(found, part)) for found in (one, other))
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


@pytest.mark.parametrize("scale", ["metric", "entity"])
def test_statistics_and_scores_of_what_looks_at_no_neighbours_are_those_without_borders(make, values, scale):
    plain, bordered = (make(values, borders, scale=scale) for borders in (None, BORDERS))
    for name in ("scaler", "seasonal_error", "observed", "entities", "names"):
        assert getattr(plain[1], name) == getattr(bordered[1], name)
    found, expected = (
        scores(made, backtest.rungs(made[1], model(made[1], "stid"), "stid")) for made in (bordered, plain)
    )
    assert len(found) > 3
    for rung, measured in found.items():
        same(measured, expected[rung])


@pytest.mark.parametrize("name", ["ridge", "lightgbm", "stid"])
def test_models_that_look_at_no_neighbours_learn_the_same_with_borders(make, values, name):
    fitted = []
    for borders in (None, BORDERS):
        store, m = make(values, borders)
        small = {"lightgbm": {"trees": 3}}.get(name, {})
        run = Run.start(model(m, name, **small), Shards(store, m), FitOptions(epochs=1, steps_per_epoch=3))
        train(run, lambda run, figures: None)
        fitted.append((run.best, run.progress.best_loss))
    assert fitted[0][1] == fitted[1][1]
    for key, tensor in fitted[0][0].items():
        assert torch.equal(tensor, fitted[1][0][key]), key


def test_the_rate_of_the_cluster_counts_every_entity_once(make, values):
    plain, bordered = (levels.cluster_rate(*make(values, borders)) for borders in (None, BORDERS))
    np.testing.assert_array_equal(plain, bordered)


def test_a_forecast_is_of_own_entities_alone(make, values):
    store, m = make(values, BORDERS)
    batch = OpenShard.read(store, m, m.shards[0]).batch(np.array([20, 30]))
    assert (batch.own, batch.x.shape[2], batch.nodes.tolist()) == (2, 3, [0, 1, 2])
    for name in ("stgnn", "fusion", "graph_wavenet", "itransformer", "dlinear"):
        output = model(m, name)(batch)
        assert output.mean.shape == batch.y.shape == batch.y_mask.shape
        assert output.quantiles.shape == (*batch.y.shape, len(QUANTILES))


@pytest.mark.parametrize("graph", ["true", "identity", "shuffled", "learned"])
@pytest.mark.parametrize("borders", [None, BORDERS], ids=["no border", "borders"])
def test_what_a_neighbour_in_another_group_does_is_seen_over_the_border_alone(make, values, graph, borders):
    """e2 sends load to e0, which is in another group; of two entities each, a shuffle changes nothing or
    turns them around, so that e2 reaches one of them."""
    other = values.copy()
    other[:, 2] = values[::-1, 2]
    moved = []
    for given in (values, other):
        store, m = make(given, borders)
        batch = OpenShard.read(store, m, m.shards[0], scaler=make(values)[1].scaler).batch(np.array([40]))
        with torch.no_grad():
            moved.append(model(m, "stgnn", graph=graph, layers=1)(batch).mean)
    assert (not torch.equal(*moved)) == (borders is not None and graph != "identity")


def test_a_shuffled_graph_has_as_many_edges_into_the_group_from_its_border(make, values):
    store, m = make(values, BORDERS)
    for shard in m.shards[:6]:
        batch = OpenShard.read(store, m, shard).batch(np.arange(shard.start + 20, shard.start + 24))
        nodes = batch.x.shape[2]
        kinds = []
        for graph in ("true", "shuffled"):
            index = model(m, "stgnn", graph=graph).graph.edges(batch).index % nodes
            kinds.append(sorted(map(tuple, (index >= batch.own).T.tolist())))
        assert kinds[0] == kinds[1]


def test_with_one_group_nothing_is_another(make, values):
    store, m = make(values, groups=[[f"e{n}" for n in range(5)]])
    batch = OpenShard.read(store, m, m.shards[0]).batch(np.array([20]))
    assert batch.alone() is batch
    assert m.members(0) == m.names

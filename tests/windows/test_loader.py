"""The loader: batches in the order of a plan, few shards at once."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fleetcast.windows import order
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Scaler
from fleetcast.windows.views import OpenShard


@pytest.fixture
def shards_of_nine(dataset):
    """Three groups of three shards."""
    values = np.random.default_rng(0).normal(size=(90, 3, 2)).astype(np.float32)
    return dataset(values, groups=(("e0",), ("e1",), ("e2",)), width=30)


@pytest.fixture
def opened(monkeypatch) -> SimpleNamespace:
    """Shards that were opened, and the most that lived at once."""

    alive: weakref.WeakSet[OpenShard] = weakref.WeakSet()
    counts = SimpleNamespace(opened=0, most=0)

    read = OpenShard.read

    def count(*args) -> OpenShard:
        shard = read(*args)
        alive.add(shard)
        counts.opened += 1
        counts.most = max(counts.most, len(alive))
        return shard

    monkeypatch.setattr(OpenShard, "read", count)
    return counts


def test_batches_come_in_the_order_of_the_plan(shards_of_nine):
    store, m = shards_of_nine
    plan = order.training(m, 4, seed=0, epoch=0)
    batches = list(Shards(store, m).batches(plan))
    assert len(batches) == len(plan) > 10
    for (index, origins), batch in zip(plan, batches, strict=True):
        alone = OpenShard.read(store, m, m.shards[index]).batch(origins)
        assert torch.equal(batch.origins, alone.origins)
        assert torch.equal(batch.x, alone.x)
        assert torch.equal(batch.y, alone.y)
    assert list(Shards(store, m).batches([])) == []


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_shards_are_held_than_allowed(shards_of_nine, opened, most):
    store, m = shards_of_nine
    shards = Shards(store, m, most=most)
    for _ in shards.batches(order.training(m, 4, seed=0, epoch=0)):
        pass
    assert opened.most == most
    assert shards.nbytes <= most * max(OpenShard.read(store, m, shard).nbytes for shard in m.shards)


def test_a_plan_in_order_opens_each_shard_once(shards_of_nine, opened):
    store, m = shards_of_nine
    plan = order.evaluation(m, "train", 4)
    assert len(list(Shards(store, m, most=1).batches(plan))) == len(plan)
    assert opened.opened == len({index for index, _ in plan})


def test_a_shard_that_is_gone_is_named(shards_of_nine):
    store, m = shards_of_nine
    plan = order.evaluation(m, "train", 4)
    lost = plan[-1][0]
    store.remove(m.shards[lost].path)
    with pytest.raises(FileNotFoundError, match=m.shards[lost].path):
        list(Shards(store, m).batches(plan))


def test_a_shard_is_opened_when_its_first_window_is_due(shards_of_nine, opened):
    store, m = shards_of_nine
    plan = [(index, m.origins(shard, "train")[:1]) for index, shard in enumerate(m.shards)]
    next(Shards(store, m).batches(plan))
    assert opened.opened == 1


def test_another_scaler_replaces_the_datasets_own(shards_of_nine):
    store, m = shards_of_nine
    plan = order.evaluation(m, "test", 4)[:1]
    [own] = Shards(store, m).batches(plan)
    [raw] = Shards(store, m, Scaler(mean=(0, 0), std=(1, 1))).batches(plan)
    mean, std = np.array(m.scaler.mean), np.array(m.scaler.std)
    assert np.allclose((raw.x.numpy() - mean) / std, own.x.numpy(), atol=1e-6)

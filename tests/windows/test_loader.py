"""The loader: batches in the order of a plan, few shards at once, no thread left behind."""

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fleetcast.windows import loader, order
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

    def count(*args) -> OpenShard:
        shard = OpenShard(*args)
        alive.add(shard)
        counts.opened += 1
        counts.most = max(counts.most, len(alive))
        return shard

    monkeypatch.setattr(loader, "OpenShard", count)
    return counts


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("windows")]


def test_batches_come_in_the_order_of_the_plan(shards_of_nine):
    store, m = shards_of_nine
    plan = order.training(m, 4, seed=0, epoch=0)
    batches = list(Shards(store, m).batches(plan))
    assert len(batches) == len(plan) > 10
    for (index, origins), batch in zip(plan, batches, strict=True):
        alone = OpenShard(store, m, m.shards[index]).batch(origins)
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
    assert shards.nbytes <= most * max(OpenShard(store, m, shard).nbytes for shard in m.shards)


def test_a_plan_in_order_opens_each_shard_once(shards_of_nine, opened):
    store, m = shards_of_nine
    plan = order.evaluation(m, "train", 4)
    assert len(list(Shards(store, m, most=1).batches(plan))) == len(plan)
    assert opened.opened == len({index for index, _ in plan})


def test_an_error_while_loading_reaches_the_caller_and_ends_the_thread(shards_of_nine):
    store, m = shards_of_nine
    plan = order.evaluation(m, "train", 4)
    lost = plan[-1][0]
    store.remove(m.shards[lost].path)
    batches = Shards(store, m).batches(plan)
    with pytest.raises(FileNotFoundError, match=m.shards[lost].path):
        for _ in batches:
            assert threads()
    assert not threads()


def test_a_caller_that_stops_early_ends_the_thread(shards_of_nine, opened):
    store, m = shards_of_nine
    plan = [(index, m.origins(shard, "train")[:1]) for index, shard in enumerate(m.shards)]
    batches = Shards(store, m).batches(plan)
    next(batches)
    assert threads()
    batches.close()
    assert not threads()
    assert opened.opened <= 3  # the one taken and the two ahead


def test_another_scaler_replaces_the_datasets_own(shards_of_nine):
    store, m = shards_of_nine
    plan = order.evaluation(m, "test", 4)[:1]
    [own] = Shards(store, m).batches(plan)
    [raw] = Shards(store, m, Scaler(mean=(0, 0), std=(1, 1))).batches(plan)
    mean, std = m.scaler.arrays()
    assert np.allclose((raw.x.numpy() - mean) / std, own.x.numpy(), atol=1e-6)

"""The loader: batches in the order of a plan whatever the timing, few shards at once, read ahead."""

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fleetcast.store import Store
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest, Scaler
from fleetcast.windows.order import POOL, Item
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
    counts = SimpleNamespace(opened=0, most=0, alive=alive, changed=threading.Condition())

    read = OpenShard.read

    def count(*args) -> OpenShard:
        shard = read(*args)
        with counts.changed:
            alive.add(shard)
            counts.opened += 1
            counts.most = max(counts.most, len(alive))
            counts.changed.notify_all()
        return shard

    monkeypatch.setattr(OpenShard, "read", count)
    return counts


class Gated(Store):
    """A store that is as slow as a test wants it: a table is read only with leave."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.leave = threading.Semaphore(0)

    def read_table(self, *args, **kwargs):
        assert self.leave.acquire(timeout=30)
        return super().read_table(*args, **kwargs)


def same(ours: Batch, theirs: Batch) -> bool:
    flat = [
        [getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "edges"] for one in (ours, theirs)
    ]
    edges = [[one.edges.index, one.edges.weight] for one in (ours, theirs)]
    return all(map(torch.equal, flat[0] + edges[0], flat[1] + edges[1]))


def expected(store: Store, m: Manifest, plan: Sequence[Item]) -> list[Batch]:
    """Each batch of a shard opened for it alone."""
    return [OpenShard.read(store, m, m.shards[index]).batch(origins) for index, origins in plan]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


# -- order -------------------------------------------------------------------------------------------------


def test_batches_come_in_the_order_of_the_plan(shards_of_nine):
    store, m = shards_of_nine
    plan = order.training(m, 4, seed=0, epoch=0)
    batches = list(Shards(store, m).batches(plan))
    assert len(batches) == len(plan) > 10
    assert all(map(same, batches, expected(store, m, plan)))
    assert list(Shards(store, m).batches([])) == []


def test_a_store_that_is_always_late_gives_the_same_batches(shards_of_nine):
    store, m = shards_of_nine
    plan = order.training(m, 4, seed=0, epoch=0)
    slow, seen, found = Gated(store.uri), set(), []
    batches = Shards(slow, m).batches(plan)
    for index, _ in plan:  # its shard, values and edges, is there only when the batch is asked for
        if index not in seen:
            slow.leave.release(2)
        seen.add(index)
        found.append(next(batches))
    assert len(seen) > POOL
    assert all(map(same, found, expected(store, m, plan)))


def test_a_store_on_s3_gives_the_same_batches(shards_of_nine, on_s3):
    store, m = shards_of_nine
    plan = order.training(m, 4, seed=0, epoch=0)
    batches = list(Shards(on_s3(store), m).batches(plan))
    assert len(batches) == len(plan)
    assert all(map(same, batches, expected(store, m, plan)))


def test_plans_that_are_read_by_turns_do_not_disturb_each_other(shards_of_nine):
    store, m = shards_of_nine
    shards = Shards(store, m, most=2)
    plans = [order.training(m, 4, seed=seed, epoch=0) for seed in range(2)]
    pairs = list(zip(*map(shards.batches, plans), strict=True))
    for plan, batches in zip(plans, zip(*pairs, strict=True), strict=True):
        assert all(map(same, batches, expected(store, m, plan)))


# -- ahead, within bounds ----------------------------------------------------------------------------------


def test_the_shards_of_the_next_pool_are_read_while_the_first_batch_is_used(shards_of_nine, opened):
    store, m = shards_of_nine
    batches = Shards(store, m, most=2).batches(order.training(m, 4, seed=0, epoch=0))
    next(batches)
    with opened.changed:
        assert opened.changed.wait_for(lambda: opened.opened >= 3, timeout=30)
    batches.close()


@pytest.mark.parametrize("most", [1, 2, 4])
def test_twice_as_many_shards_as_are_held_are_open_at_most(shards_of_nine, opened, most):
    store, m = shards_of_nine
    shards = Shards(store, m, most=most)
    for _ in shards.batches(order.training(m, 4, seed=0, epoch=0)):
        pass
    assert opened.most <= 2 * most
    assert len(opened.alive) == most
    assert shards.nbytes <= most * max(OpenShard.read(store, m, shard).nbytes for shard in m.shards)


def test_a_plan_in_order_opens_each_shard_once(shards_of_nine, opened):
    store, m = shards_of_nine
    plan = order.evaluation(m, "train", 4)
    assert len(list(Shards(store, m, most=1).batches(plan))) == len(plan)
    assert opened.opened == len({index for index, _ in plan})


def test_shards_that_are_still_open_are_not_read_again(shards_of_nine, opened):
    store, m = shards_of_nine
    shards = Shards(store, m)
    plan = order.evaluation(m, "train", 4)[:3]
    for _ in range(2):
        assert len(list(shards.batches(plan))) == 3
    assert opened.opened == len({index for index, _ in plan})


def test_where_all_is_open_nothing_is_read_and_no_thread_runs(shards_of_nine, opened):
    store, m = shards_of_nine
    shards = Shards(store, m).open_all()
    assert opened.opened == len(m.shards)
    for _ in shards.batches(order.training(m, 4, seed=0, epoch=0)):
        assert threads() == []
    assert opened.opened == len(m.shards)


# -- errors, and ends before the end -----------------------------------------------------------------------


def test_a_shard_that_is_gone_is_named_where_its_first_batch_is_due(shards_of_nine):
    store, m = shards_of_nine
    plan = order.evaluation(m, "train", 4)
    lost = plan[-1][0]
    before = [index for index, _ in plan].index(lost)
    store.remove(m.shards[lost].path)
    batches = Shards(store, m).batches(plan)
    found = [next(batches) for _ in range(before)]
    assert all(map(same, found, expected(store, m, plan[:before])))
    with pytest.raises(FileNotFoundError, match=m.shards[lost].path):
        next(batches)
    assert threads() == []


@pytest.mark.parametrize("how", ["break", "exception", "close"])
def test_threads_and_what_was_read_ahead_go_with_an_iterator_that_is_abandoned(shards_of_nine, opened, how):
    store, m = shards_of_nine
    shards = Shards(store, m, most=2)
    plan = order.training(m, 4, seed=0, epoch=0)

    def use() -> None:
        batches = shards.batches(plan)
        for _ in batches:
            assert threads() != []
            if how == "exception":
                raise KeyError
            if how == "close":
                batches.close()
            break

    with pytest.raises(KeyError) if how == "exception" else nullcontext():
        use()
    assert threads() == []
    assert len(opened.alive) <= 2
    assert all(map(same, shards.batches(plan), expected(store, m, plan))), "and it can be begun anew"


def test_another_scaler_replaces_the_datasets_own(shards_of_nine):
    store, m = shards_of_nine
    plan = order.evaluation(m, "test", 4)[:1]
    [own] = Shards(store, m).batches(plan)
    [raw] = Shards(store, m, Scaler(mean=(0, 0), std=(1, 1))).batches(plan)
    mean, std = np.array(m.scaler.mean), np.array(m.scaler.std)
    assert np.allclose((raw.x.numpy() - mean) / std, own.x.numpy(), atol=1e-6)

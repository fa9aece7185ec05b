"""The order of windows: what each rank sees, and when."""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
from fleetcast.windows import order
from fleetcast.windows.manifest import PARTS

GROUPS = (("a", "b"), ("c",), ("d",))


@pytest.fixture
def manifest(plan):
    """Three groups of seven shards each."""
    return plan(200, GROUPS, width=30)


def windows(items, manifest) -> list[tuple[int, int]]:
    """(group, origin) of every window of some items."""
    return [(manifest.shards[index].group, int(t)) for index, origins in items for t in origins]


def all_windows(manifest, part) -> list[tuple[int, int]]:
    return sorted((shard.group, int(t)) for shard in manifest.shards for t in manifest.origins(shard, part))


def as_lists(items) -> list[tuple[int, list[int]]]:
    return [(index, origins.tolist()) for index, origins in items]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("part", PARTS)
def test_evaluation_covers_every_window_once_for_any_number_of_ranks_and_batch_size(manifest, world, part):
    for batch_size in (1, 5, 1000):
        found = [
            window
            for rank in range(world)
            for window in windows(order.evaluation(manifest, part, batch_size, rank, world), manifest)
        ]
        assert sorted(found) == all_windows(manifest, part)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_an_epoch_of_one_rank_is_every_training_window_once(manifest, batch_size):
    found = windows(order.training(manifest, batch_size, seed=1, epoch=0), manifest)
    assert sorted(found) == all_windows(manifest, "train")


@pytest.mark.parametrize("world", [2, 3, 7, 50])
def test_ranks_take_as_many_steps_and_together_every_window(manifest, world):
    whole = order.training(manifest, 5, seed=1, epoch=0)
    plans = [order.training(manifest, 5, 1, 0, rank, world) for rank in range(world)]
    steps = {len(plan) for plan in plans}
    assert steps == {-(-len(whole) // world)}
    together = [item for plan in plans for item in plan]
    assert as_lists(together[: len(whole)]) == as_lists(whole)
    assert as_lists(together[len(whole) :]) == as_lists(whole[: len(together) - len(whole)])


@pytest.mark.parametrize("plan_of", [order.training, order.evaluation])
def test_ranks_share_few_shards_so_that_more_of_them_do_not_read_more(manifest, plan_of):
    def shards(world: int) -> list[set[int]]:
        arguments = (0, 0) if plan_of is order.training else ()
        first = (manifest, 5) if plan_of is order.training else (manifest, "train", 5)
        plans = [plan_of(*first, *arguments, rank=rank, world=world) for rank in range(world)]
        return [{index for index, _ in plan} for plan in plans]

    (alone,) = shards(1)
    for world in (2, 3):
        # Where a stretch ends, its last pool may be the next one's first.
        assert sum(len(each) for each in shards(world)) <= len(alone) + order.POOL * world


def test_more_ranks_than_batches_share_what_there_is(plan):
    manifest = plan(30)
    plans = [order.training(manifest, 1000, 0, 0, rank, 3) for rank in range(3)]
    assert [len(plan) for plan in plans] == [1, 1, 1]
    assert as_lists(plans[0]) == as_lists(plans[1]) == as_lists(plans[2])


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(manifest):
    first = as_lists(order.training(manifest, 5, seed=1, epoch=3))
    np.random.default_rng().random(10)
    assert as_lists(order.training(manifest, 5, seed=1, epoch=3)) == first
    assert as_lists(order.training(manifest, 5, seed=1, epoch=4)) != first
    assert as_lists(order.training(manifest, 5, seed=2, epoch=3)) != first


def test_a_batch_is_shuffled_within_one_shard_and_batches_of_several_shards_mix(manifest):
    plan = order.training(manifest, 5, seed=1, epoch=0)
    for index, origins in plan:
        assert set(origins) <= set(manifest.origins(manifest.shards[index], "train"))
    assert any(np.any(np.diff(origins) < 0) for _, origins in plan)
    shards = [index for index, _ in plan]
    assert sum(a != b for a, b in pairwise(shards)) > len(set(shards))


def test_an_epoch_can_be_cut_short_and_then_draws_other_windows_each_time(manifest):
    plans = [order.training(manifest, 5, 0, epoch, rank=1, world=2, most=4) for epoch in range(2)]
    assert [len(plan) for plan in plans] == [4, 4]
    assert as_lists(plans[0]) == as_lists(order.training(manifest, 5, 0, 0, rank=1, world=2))[:4]
    assert set(windows(plans[0], manifest)) != set(windows(plans[1], manifest))
    assert len(order.training(manifest, 5, 0, 0, most=10_000)) == len(order.training(manifest, 5, 0, 0))


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_opens_each_shard_once_while_a_pool_of_them_is_held(manifest, world):
    plan = order.training(manifest, 5, seed=1, epoch=0, world=world)
    held: OrderedDict[int, None] = OrderedDict()
    opened = []
    for index, _ in plan:
        if index not in held:
            opened.append(index)
            if len(held) == order.POOL:
                held.popitem(last=False)
        held[index] = None
        held.move_to_end(index)
    assert len(opened) == len(set(opened)) > order.POOL

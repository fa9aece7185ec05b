"""Which windows each rank sees, and in which order.

Training: within a shard windows are shuffled and cut into batches; shards are visited in a shuffled order, a
few at a time (a pool), and the batches of a pool are shuffled again. Of all these batches each rank takes one
stretch, as long as any other's, so ranks do not read each other's shards. So the order depends on seed, epoch
and world size only, and a rank uses no more than a pool of shards at once; as the loader reads those of the
next pool meanwhile, it holds two.

Evaluation: every window once, in order, a stretch for each rank; nothing is dropped and nothing repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fleetcast.windows.manifest import Manifest, Part

#: A shard's position in the manifest, and the origins of one batch of its windows.
Item = tuple[int, NDArray[np.int64]]

#: Shards whose batches are mixed; a rank that trains holds these and as many that come next.
POOL = 4


def evaluation(manifest: Manifest, part: Part, batch_size: int, rank: int = 0, world: int = 1) -> list[Item]:
    """All windows of a part that are this rank's, each exactly once over all ranks."""
    plan = list(_batches(manifest, part, batch_size))
    stretch = -(-len(plan) // world)
    return plan[rank * stretch : (rank + 1) * stretch]


def training(
    manifest: Manifest,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    most: int | None = None,
) -> list[Item]:
    """One epoch of the training part for a rank: at most `most` batches, the same number on every rank.

    Where the batches do not divide by the ranks, the first ones are taken again, as a step needs every rank.
    """
    rng = np.random.default_rng([seed, epoch])
    shards = rng.permutation(len(manifest.shards))
    plan: list[Item] = []
    for first in range(0, len(shards), POOL):
        pool: list[Item] = []
        for index in shards[first : first + POOL]:
            origins = rng.permutation(manifest.origins(manifest.shards[index], "train"))
            pool += [(int(index), chunk) for chunk in _cut(origins, batch_size)]
        plan += [pool[i] for i in rng.permutation(len(pool))]
    stretch = -(-len(plan) // world)
    steps = stretch if most is None else min(stretch, most)
    return [plan[(rank * stretch + step) % len(plan)] for step in range(steps)]


def _batches(manifest: Manifest, part: Part, batch_size: int) -> Iterator[Item]:
    for index, shard in enumerate(manifest.shards):
        for origins in _cut(manifest.origins(shard, part), batch_size):
            yield index, origins


def _cut(origins: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [origins[i : i + size] for i in range(0, len(origins), size)]

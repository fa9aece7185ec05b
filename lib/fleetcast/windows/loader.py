"""Batches of windows from shards that are read while the ones before them are in use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

import torch

from fleetcast.store import Store
from fleetcast.windows.ahead import ahead
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler
from fleetcast.windows.order import POOL, Item
from fleetcast.windows.views import OpenShard

_CPU = torch.device("cpu")
#: Batches that are assembled before they are asked for.
_BATCHES = 2

Entry = TypeVar("Entry")


class Shards:
    """The shards of a dataset, of which the `most` last used are held open.

    While batches are taken, up to `most` further shards are open or being read for those that follow.
    """

    def __init__(
        self, store: Store, manifest: Manifest, scaler: Scaler | None = None, most: int = POOL
    ) -> None:
        self.store = store
        self.manifest = manifest
        self.scaler = scaler
        self.most = most
        self._open: OrderedDict[int, OpenShard] = OrderedDict()

    def __getitem__(self, index: int) -> OpenShard:
        """The shard at a position of the manifest."""
        return self._keep(self._open, index, self._read)

    def open_all(self) -> Shards:
        """Opens every shard of the dataset and keeps it open."""
        self.most = len(self.manifest.shards)
        for index in range(self.most):
            self[index]
        return self

    @property
    def nbytes(self) -> int:
        """Bytes held by the open shards."""
        return sum(shard.nbytes for shard in self._open.values())

    def batches(self, items: Sequence[Item], device: torch.device = _CPU) -> Generator[Batch, None, None]:
        """The batches of a plan in its order, in memory that `device` can copy from.

        One thread reads the shards that follow, another assembles the next batches. Where all shards are open
        there is nothing to wait for, and no thread unless the batches are for a GPU. An error in a thread is
        raised here, where the batch is due; the threads end with the iterator, however it ends.
        """
        held, missing = self._open.copy(), self._missing(items)
        if missing:
            self._open = OrderedDict()  # what is open goes with this iterator, and comes back at its end
        with closing(ahead(self._read, missing, self.most)) as opened:

            def assemble(item: Item) -> Batch:
                index, origins = item
                batch = self._keep(held, index, lambda _: next(opened)).batch(origins)
                return batch.pinned(device) if device.type == "cuda" else batch

            try:
                if missing or device.type == "cuda":
                    with closing(ahead(assemble, items, _BATCHES)) as made:
                        yield from made
                else:
                    yield from map(assemble, items)
            finally:
                self._open = held

    def _read(self, index: int) -> OpenShard:
        return OpenShard.read(self.store, self.manifest, self.manifest.shards[index], self.scaler)

    def _missing(self, items: Sequence[Item]) -> list[int]:
        """The shards that must be opened for a plan, in the order in which they are due."""
        missing: list[int] = []
        held: OrderedDict[int, None] = OrderedDict.fromkeys(self._open)
        for index, _ in items:
            self._keep(held, index, missing.append)
        return missing

    def _keep(self, held: OrderedDict[int, Entry], index: int, make: Callable[[int], Entry]) -> Entry:
        """The entry of a shard; a new one takes the place of the longest unused if `most` are held."""
        if index not in held:
            while len(held) >= self.most:
                held.popitem(last=False)
            held[index] = make(index)
        held.move_to_end(index)
        return held[index]

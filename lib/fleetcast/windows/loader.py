"""Batches of windows from shards that are opened as they are needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from fleetcast.store import Store
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler
from fleetcast.windows.order import POOL, Item
from fleetcast.windows.views import OpenShard


class Shards:
    """The shards of a dataset, of which the `most` last used are held open."""

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
        if index not in self._open:
            while len(self._open) >= self.most:
                self._open.popitem(last=False)
            self._open[index] = OpenShard.read(
                self.store, self.manifest, self.manifest.shards[index], self.scaler
            )
        self._open.move_to_end(index)
        return self._open[index]

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

    def batches(self, items: Sequence[Item]) -> Iterator[Batch]:
        """The batches of a plan in its order."""
        for index, origins in items:
            yield self[index].batch(origins)

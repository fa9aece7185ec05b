"""Batches of windows from shards that are opened as they are needed and prepared ahead of the model."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from fleetcast.store import Store
from fleetcast.windows.batch import Batch
from fleetcast.windows.manifest import Manifest, Scaler
from fleetcast.windows.order import POOL, Item
from fleetcast.windows.views import OpenShard

#: Batches that are ready before they are asked for.
_AHEAD = 2


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
            self._open[index] = OpenShard(self.store, self.manifest, self.manifest.shards[index], self.scaler)
        self._open.move_to_end(index)
        return self._open[index]

    @property
    def nbytes(self) -> int:
        """Bytes held by the open shards."""
        return sum(shard.nbytes for shard in self._open.values())

    def batches(self, items: Sequence[Item]) -> Iterator[Batch]:
        """The batches of a plan in its order, assembled by a thread while the caller works on others."""
        plan = iter(items)
        with ThreadPoolExecutor(1, thread_name_prefix="windows") as thread:
            ready = deque(thread.submit(self._batch, item) for item in islice(plan, _AHEAD))
            while ready:
                batch = ready.popleft().result()
                ready.extend(thread.submit(self._batch, item) for item in islice(plan, 1))
                yield batch

    def _batch(self, item: Item) -> Batch:
        index, origins = item
        return self[index].batch(origins)

"""What came before a forecast, and the graph at its beginning.

All of it is read with the forecast, not when it is asked for: the next night replaces the windows while the
forecast of this one still answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast.errors import InputError
from fleetcast.store import Store
from fleetcast.windows import manifest as manifests
from fleetcast.windows.edges import last_complete
from fleetcast.windows.manifest import Manifest, Shard
from fleetcast.windows.views import read_edges, read_values

log = logging.getLogger("fleetcast")

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
#: Ends and weights of a graph without edges.
NO_EDGES: tuple[Places, Floats] = np.zeros((2, 0), np.int64), np.zeros(0, np.float32)


@dataclass(frozen=True)
class Past:
    """The last steps before a forecast, and its graph; N entities and F metrics as the forecast has them."""

    values: Floats
    """[T, N, F], NaN where nothing was observed or the windows have it no more."""
    ends: Places
    """[2, E] places of entities: where load comes from, and where it goes."""
    weights: Floats
    """[E]."""

    @classmethod
    def read(
        cls,
        store: Store,
        windows: str,
        entities: Sequence[str],
        metrics: Sequence[str],
        issued: int,
        step: int,
        steps: int,
    ) -> Past:
        """The `steps` steps of `step` seconds before the Unix time `issued`, and the graph then.

        What the windows do not have, or not any more, is missing here; a forecast is no worse for it.
        """
        found = np.full((steps, len(entities), len(metrics)), np.nan, np.float32)
        ends, weights, outward = [NO_EDGES[0]], [NO_EDGES[1]], [np.zeros(0, bool)]
        try:
            data = manifests.load(store, windows)
            if data.step == step:
                places = {name: place for place, name in enumerate(entities)}
                for shard in data.last_shards:
                    nodes = np.array([places.get(name, -1) for name in data.members(shard.group)])
                    own = len(data.groups[shard.group])
                    before = _before(store, data, shard, issued, steps)
                    _place(found, before, nodes[:own], data.metrics, metrics)
                    index, weight = graph_at(store, data, shard, issued)
                    known = (nodes[index] >= 0).all(0)
                    ends.append(nodes[index][:, known])
                    weights.append(weight[known])
                    outward.append(index[1, known] >= own)
        except (InputError, OSError) as error:
            log.warning("serve: no history and no graph of the forecast: %s", error)
        graph, once = np.concatenate(ends, axis=1), ~np.concatenate(outward)
        # An edge between two groups may be in both: it counts where it ends.
        pair = graph[0] * len(entities) + graph[1]
        once |= ~np.isin(pair, pair[once])
        return cls(found, graph[:, once], np.concatenate(weights)[once])


def graph_at(store: Store, data: Manifest, shard: Shard, time: int) -> tuple[Places, Floats]:
    """[2, E] places among the group's members, and [E] weights: the graph that is known at a Unix time."""
    slices = read_edges(store, data, shard)
    chosen = last_complete(torch.tensor([time]), slices.starts, data.slice)
    edges = slices.batch(chosen, len(data.members(shard.group)))
    return edges.index.numpy(), edges.weight.numpy()


def _before(store: Store, data: Manifest, shard: Shard, issued: int, steps: int) -> Floats:
    """[up to `steps`, own entities of the group, F of the windows] before a time."""
    stop = max(0, (issued - data.start) // data.step - shard.first)
    return read_values(store, data, shard)[:stop][-steps:]


def _place(found: Floats, values: Floats, own: Places, there: Sequence[str], metrics: Sequence[str]) -> None:
    """Puts a group's values where its entities and the metrics are in the forecast."""
    known = own >= 0
    for f, metric in enumerate(metrics):
        if metric in there and len(values):
            found[-len(values) :, own[known], f] = values[:, known, there.index(metric)]

"""Cutting the graph into groups of entities that are sharded, batched and forecast together.

The cut follows weak edges. What they carry into a group is not lost: the entities that send the most are its
border, which it sees and does not forecast.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from heapq import heappop, heappush

import numpy as np
import polars as pl
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse import coo_array, csr_array

from fleetcast.errors import InputError


def cut(entities: list[str], edges: pl.DataFrame, size: int) -> list[list[str]]:
    """Groups of at most `size` entities; every entity is in exactly one; all is sorted by name.

    `edges` holds `source`, `target` and `weight` (summed over time); direction does not matter here, and
    edges of other entities are ignored. Clusters grow along the heaviest edges first, passing over an edge
    that would make one too large; then clusters, largest first, are packed into groups. The limit is
    ⌈N / ⌈N / size⌉⌉, so that groups are of even size; of any two at least one is over half full. The same
    input gives the same groups, in whatever order it comes. Raises InputError if `size` is below 1.
    """
    if size < 1:
        raise InputError(f"group size {size}, expected at least 1")
    names = sorted(set(entities))
    if not names:
        return []
    limit = -(-len(names) // -(-len(names) // size))
    groups = _fill(_grow(_adjacency(names, edges), limit), limit)
    return sorted([names[i] for i in sorted(group)] for group in groups)


def border(groups: list[list[str]], edges: pl.DataFrame, most: int) -> list[list[str]]:
    """Of each group the entities of other groups that send the most weight into it: at most `most`, by name.

    `edges` holds `source`, `target` and `weight` (summed over time); load flows from source to target, so an
    edge out of a group gives it no border. Of equal weights the first names are taken. The same input gives
    the same borders, in whatever order it comes.
    """
    place = pl.DataFrame(
        {
            "name": [name for group in groups for name in group],
            "group": np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        },
        schema={"name": pl.String, "group": pl.Int64},
    )
    chosen = (
        edges.select(pl.col("source", "target").cast(pl.String), pl.col("weight").cast(pl.Float64))
        .join(place.rename({"name": "source", "group": "home"}), on="source")
        .join(place.rename({"name": "target"}), on="target")
        .filter((pl.col("home") != pl.col("group")) & (pl.col("weight") > 0))
        .sort("group", "source", "target", "weight")  # so that sums do not depend on the order of the rows
        .group_by("group", "source", maintain_order=True)
        .agg(pl.col("weight").sum())
        .sort("group", "weight", "source", descending=[False, True, False])
        .filter(pl.int_range(pl.len()).over("group") < most)
    )
    found: list[list[str]] = [[] for _ in groups]
    for group, name in chosen.sort("group", "source").select("group", "source").iter_rows():
        found[group].append(name)
    return found


def _adjacency(names: list[str], edges: pl.DataFrame) -> csr_array:
    """[N, N] symmetric sparse weights without a diagonal."""
    index = pl.DataFrame({"name": names}).with_row_index("index")
    pairs = (
        edges.select(pl.col("source", "target").cast(pl.String), pl.col("weight").cast(pl.Float64))
        .filter(pl.col("source") != pl.col("target"))
        .join(index.rename({"name": "source", "index": "row"}), on="source")
        .join(index.rename({"name": "target", "index": "column"}), on="target")
        .sort("row", "column", "weight")  # so that sums do not depend on the order of the rows
    )
    shape = (len(names), len(names))
    directed = coo_array(
        (pairs["weight"].to_numpy(), (pairs["row"].to_numpy(), pairs["column"].to_numpy())), shape
    )
    return csr_array(directed + directed.T)


def _grow(adjacency: csr_array, limit: int) -> list[list[int]]:
    """Clusters of at most `limit` nodes, joined along edges the heaviest first; largest cluster first."""
    upper = coo_array(adjacency)
    once = upper.row < upper.col
    row, column, weight = upper.row[once], upper.col[once], upper.data[once]
    sets = DisjointSet(range(adjacency.shape[0]))
    for i in np.lexsort((column, row, -weight)):
        a, b = int(row[i]), int(column[i])
        if not sets.connected(a, b) and sets.subset_size(a) + sets.subset_size(b) <= limit:
            sets.merge(a, b)
    return sorted((sorted(subset) for subset in sets.subsets()), key=lambda nodes: (-len(nodes), nodes))


def _fill(clusters: list[list[int]], limit: int) -> list[list[int]]:
    """Clusters packed into groups of at most `limit` nodes, each into the fullest group with room for it.

    Weight need not be looked at: clusters that share an edge would be one already if both fitted in a group.
    """
    groups: list[list[int]] = []
    of_size: dict[int, list[int]] = defaultdict(list)  # heaps: of equally full groups the first is taken
    sizes: list[int] = []
    for nodes in clusters:
        at = bisect_right(sizes, limit - len(nodes)) - 1
        if at < 0:
            number = len(groups)
            groups.append([])
        else:
            number = heappop(of_size[sizes[at]])
            if not of_size[sizes[at]]:
                sizes.pop(at)
        groups[number].extend(nodes)
        size = len(groups[number])
        if not of_size[size]:
            insort(sizes, size)
        heappush(of_size[size], number)
    return groups

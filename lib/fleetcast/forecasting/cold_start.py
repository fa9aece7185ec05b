"""Entities that have only just begun: what they would have done before is told by their kin.

A replica that a rollout has started has no look-back, but those of its service do the same work; a service
that is new has callers and callees, whose load it shares. Where such are known, its past is theirs, at its
own level; the model then forecasts it as any other. Without either, the model sees that nothing is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fleetcast.store import Store
from fleetcast.windows.manifest import Manifest

Kind = Literal["siblings", "neighbours"]
#: All kinds, in the order in which they are asked.
KINDS: tuple[Kind, ...] = ("siblings", "neighbours")
#: A new entity's load is at most so many times its kin's, and at least such a part.
_MOST = 10.0


@dataclass(frozen=True)
class Kin:
    """Entities whose past may stand in for another's."""

    kind: Kind
    places: NDArray[np.int64]
    """Among the members of a group."""
    weight: NDArray[np.float64]
    """How much each counts."""


def kin_of(
    store: Store,
    data: Manifest,
    group: int,
    ends: NDArray[np.int64],
    weight: NDArray[np.float32],
    kinds: Sequence[Kind] = KINDS,
) -> list[list[Kin]]:
    """Of each of a group's own entities its kin, the first kind first.

    Siblings are the other containers of its service; neighbours are those that the edges `ends` [2, E] join
    it to, in either direction, by their `weight` [E].
    """
    own = range(len(data.groups[group]))
    found: list[list[Kin]] = [[] for _ in own]
    for kind in kinds:
        of_kind = _siblings(store, data, group) if kind == "siblings" else _neighbours(own, ends, weight)
        for n, (places, shares) in enumerate(of_kind):
            if places:
                found[n].append(Kin(kind, np.array(places, np.int64), np.array(shares, np.float64)))
    return found


def _siblings(store: Store, data: Manifest, group: int) -> list[tuple[list[int], list[float]]]:
    own, members = data.groups[group], data.members(group)
    if data.level != "container" or not store.exists("entities/entities.parquet"):
        return [([], []) for _ in own]
    table: Any = pl.from_arrow(store.read_table("entities/entities.parquet", ["entity", "kind", "service"]))
    known = table.filter((pl.col("kind") == "container") & pl.col("entity").is_in(members)).drop_nulls(
        "service"
    )
    service = dict(known.select("entity", "service").iter_rows())
    found = []
    for name in own:
        others = [
            n
            for n, other in enumerate(members)
            if name in service and other != name and service.get(other) == service[name]
        ]
        found.append((others, [1.0] * len(others)))
    return found


def _neighbours(
    own: range, ends: NDArray[np.int64], weight: NDArray[np.float32]
) -> list[tuple[list[int], list[float]]]:
    found: list[dict[int, float]] = [{} for _ in own]
    for source, target, w in zip(*ends.tolist(), weight.tolist(), strict=True):
        for one, other in ((source, target), (target, source)):
            if one in own and one != other:
                found[one][other] = found[one].get(other, 0.0) + w
    return [(list(one), list(one.values())) for one in found]


def begin_earlier(
    values: NDArray[np.float32], kin: Sequence[Sequence[Kin]], history: int
) -> tuple[NDArray[np.float32], dict[int, Kind]]:
    """[T, N, F] with the past of those that were first observed within the last `history` steps filled by the
    mean of their kin that were there before, and by which kind of kin each was.

    The mean is scaled by what the entity has been to it since it began. Neighbours are of any size, so each
    counts as share of its own level since then.
    """
    seen = np.isfinite(values).any(2)
    first = np.where(seen.any(0), seen.argmax(0), len(values))
    begun = len(values) - history
    filled, new = values.copy(), dict[int, Kind]()
    for n, families in enumerate(kin):
        if not begun < first[n] < len(values):
            continue
        for one in families:
            older = first[one.places] < begun
            if older.any():
                past = _past(values, n, one.places[older], one.weight[older], one.kind == "neighbours")
                filled[: first[n], n] = past[: first[n]]
                new[n] = one.kind
                break
    return filled, new


def _past(
    values: NDArray[np.float32],
    n: int,
    places: NDArray[np.int64],
    weight: NDArray[np.float64],
    of_any_size: bool,
) -> NDArray[np.float64]:
    """[T, F] the weighted mean of some entities at the level of entity `n`."""
    own, theirs = values[:, n].astype(np.float64), values[:, places].astype(np.float64)
    with warnings.catch_warnings():  # steps in which none was observed
        warnings.simplefilter("ignore", RuntimeWarning)
        if of_any_size:
            theirs = theirs / np.nanmean(np.where(np.isfinite(own)[:, None], theirs, np.nan), 0)
        known = np.where(np.isfinite(theirs), weight[:, None], 0)
        mean = np.nansum(np.where(known > 0, theirs, 0) * known, 1) / known.sum(1)
        both = np.isfinite(own) & np.isfinite(mean)
        scale = np.nanmean(np.where(both, own, np.nan), 0) / np.nanmean(np.where(both, mean, np.nan), 0)
    if not of_any_size:
        scale = np.clip(np.nan_to_num(scale, nan=1.0, posinf=_MOST), 1 / _MOST, _MOST)
    return np.asarray(mean * scale, np.float64)

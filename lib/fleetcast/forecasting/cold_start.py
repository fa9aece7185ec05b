"""Entities that have only just begun: what they would have done before is told by their siblings.

A replica that a rollout has started has no look-back, but those of its service do the same work. Where they
are known, its past is theirs, at its own level; the model then forecasts it as any other.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fleetcast.store import Store
from fleetcast.windows.manifest import Manifest

#: A new entity's load is at most so many times its siblings', and at least such a part.
_MOST = 10.0


def siblings(store: Store, data: Manifest, group: int) -> list[list[int]]:
    """Of each of a group's own entities, the places among its members of the others of the same service."""
    own, members = data.groups[group], data.members(group)
    if data.level != "container" or not store.exists("entities/entities.parquet"):
        return [[] for _ in own]
    table: Any = pl.from_arrow(store.read_table("entities/entities.parquet", ["entity", "kind", "service"]))
    known = table.filter((pl.col("kind") == "container") & pl.col("entity").is_in(members)).drop_nulls(
        "service"
    )
    service = dict(known.select("entity", "service").iter_rows())
    return [
        [n for n, other in enumerate(members) if other != name and service.get(other) == service[name]]
        if name in service
        else []
        for name in own
    ]


def begin_earlier(
    values: NDArray[np.float32], kin: list[list[int]], history: int
) -> tuple[NDArray[np.float32], list[int]]:
    """[T, N, F] with the past of those that were first observed within the last `history` steps filled by the
    mean of their `kin` that were there before, and which entities these are.

    The mean is scaled by what the entity has been to it since it began.
    """
    observed = np.isfinite(values)
    seen = observed.any(2)
    first = np.where(seen.any(0), seen.argmax(0), len(values))
    begun = len(values) - history
    filled = values.copy()
    new = []
    for n, others in enumerate(kin):
        older = [other for other in others if first[other] < begun]
        if not older or not begun < first[n] < len(values):
            continue
        with warnings.catch_warnings():  # steps in which none was observed
            warnings.simplefilter("ignore", RuntimeWarning)
            theirs = np.nanmean(values[:, older], axis=1)
            both = np.where(observed[:, n] & np.isfinite(theirs), theirs, np.nan)
            scale = np.nanmean(np.where(np.isfinite(both), values[:, n], np.nan), 0) / np.nanmean(both, 0)
        scale = np.clip(np.nan_to_num(scale, nan=1.0, posinf=_MOST), 1 / _MOST, _MOST)
        filled[: first[n], n] = theirs[: first[n]] * scale
        new.append(n)
    return filled, new

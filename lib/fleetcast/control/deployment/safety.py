"""What of a policy's wishes may be done.

    replicas, reasons = guard(SafetyOptions(), before, proposed, reactive, least, most)

A policy may add replicas before they are needed. It never takes away what the reactive rule wants: a service
scales in only where that rule, after its stabilisation window, would scale in as well. What it adds beyond
the rule is limited, per service and for all together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fleetcast.config import Options

Ints = NDArray[np.int64]

REACTIVE, SERVICE_LIMIT, TOTAL_LIMIT, BOUNDS = (
    "the reactive rule wants more",
    "at most so many replicas are added to a service at once",
    "at most so many replicas are added at once",
    "outside of the least and most replicas",
)


class SafetyOptions(Options):
    """How far a policy may go beyond the reactive rule."""

    most_added: int = Field(4, ge=0)
    """Replicas that it may add to a service in a decision, beyond those that there are or the rule wants."""
    most_added_share: float = Field(0.2, ge=0)
    """The same of all services together, as share of all replicas; at least one."""


def guard(
    options: SafetyOptions, before: Ints, proposed: Ints, reactive: Ints, least: Ints, most: Ints
) -> tuple[Ints, list[list[str]]]:
    """[S] replicas from now on, and for each service why they are not what was proposed.

    The services that ask for the most get less first where all together ask for too much.
    """
    reasons: list[list[str]] = [[] for _ in before]

    def note(changed: NDArray[np.bool_], why: str) -> None:
        for n in np.flatnonzero(changed):
            reasons[n].append(why)

    wanted = np.clip(proposed, least, most)
    note(wanted != proposed, BOUNDS)
    floor = np.clip(reactive, least, most)
    note(wanted < floor, REACTIVE)
    wanted = np.maximum(wanted, floor)

    base = np.maximum(before, floor)
    added = np.maximum(wanted - base, 0)
    note(added > options.most_added, SERVICE_LIMIT)
    added = np.minimum(added, options.most_added)
    room = max(1, int(options.most_added_share * before.sum()))
    if added.sum() > room:
        level = _level(added, room)
        note(added > level, TOTAL_LIMIT)
        added = np.minimum(added, level)
    return np.where(wanted > base, base + added, wanted), reasons


def _level(added: Ints, room: int) -> Ints:
    """[S] to how many each is cut so that all fit: as even as whole replicas allow, the first first."""
    level: Ints = np.zeros_like(added)
    while True:
        more = (added > level) & (np.cumsum(added > level) <= room - np.minimum(added, level).sum())
        if not more.any():
            return level
        level = level + more

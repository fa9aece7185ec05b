"""A simulated cluster at the other end of the stream: it sends scrapes, and does as it is told."""

from __future__ import annotations

import torch

from fleetcast.control.deployment.broker import BEGINNING, RedisStreams
from fleetcast.control.deployment.messages import Description, Entry, Scrape
from fleetcast.control.interface import Action, Engine, Outcome
from fleetcast.errors import InputError


def play(
    broker: RedisStreams,
    engine: Engine,
    about: Description,
    intervals: int,
    start: float = 0,
    wait: float = 30,
) -> list[Outcome]:
    """Lets a cluster of one environment go on for some decision intervals, as fast as decisions come; what
    came of each. Its time begins at `start` [Unix s].

    Raises InputError if no action comes within `wait` seconds.
    """
    outcomes, last = [], BEGINNING
    for _ in range(intervals):
        seen = engine.observe()
        offset = broker.send(Scrape.of(seen, about, start).model_dump_json(exclude_none=False).encode())
        found = broker.next_action(last, wait)
        while found is not None and found[0] != offset:  # of earlier scrapes
            found = broker.next_action(found[0], wait)
        if found is None:
            raise InputError(f"no action came within {wait:g} s of scrape {offset}; does a consumer run?")
        last = offset
        outcomes.append(engine.step(told(Entry.model_validate_json(found[1]), about)))
    return outcomes


def told(entry: Entry, about: Description) -> Action:
    """The actions of an entry for one environment; services without one keep their least replicas."""
    place = {name: n for n, name in enumerate(about.services)}
    replicas = torch.tensor(about.scales.least, dtype=torch.float32)
    weights = torch.zeros(len(place), len(about.zones))
    restart = torch.zeros(len(place), dtype=torch.bool)
    for one in entry.actions:
        at = place[one.service]
        replicas[at] = one.replicas
        restart[at] = one.restart
        if one.weights:
            weights[at] = torch.tensor(one.weights)
    routed = bool(weights.any())
    return Action(replicas.unsqueeze(0), weights.unsqueeze(0) if routed else None, restart.unsqueeze(0))

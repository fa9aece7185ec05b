"""Experience from many processes: each collector is a Ray actor. The only file here that knows Ray.

The same seeds give the same experience as `InProcess` does with as many collectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from fleetcast.control.bidrl.collect import Collector, Rollout, join
from fleetcast.control.bidrl.model import Agent, AgentOptions


@ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2)
class _Actor:
    """A collector and a copy of the agent. Nothing is kept between two episodes, so one that died is
    started anew and asked again."""

    def __init__(self, collector: Collector, options: AgentOptions) -> None:
        torch.set_num_threads(1)
        self._collector, self._agent = collector, Agent(options)

    def collect(self, weights: dict[str, Tensor], seed: list[int]) -> Rollout:
        self._agent.load_state_dict(weights)
        return self._collector.collect(self._agent, seed)


class Distributed:
    """Collectors side by side, as Ray actors; needs a connected Ray."""

    def __init__(self, collectors: Sequence[Collector], options: AgentOptions) -> None:
        self._actors: list[Any] = [
            _Actor.remote(one, options)  # type: ignore[attr-defined]
            for one in collectors
        ]

    def collect(self, agent: Agent, seed: Sequence[int]) -> Rollout:
        """One episode in all environments."""
        weights = ray.put({name: one.detach().clone() for name, one in agent.state_dict().items()})
        asked = [actor.collect.remote(weights, [*seed, number]) for number, actor in enumerate(self._actors)]
        return join(ray.get(asked))

    def close(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)

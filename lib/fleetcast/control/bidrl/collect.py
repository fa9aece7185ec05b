"""Experience: episodes of many environments side by side, as what the learner takes.

A `Collector` runs them in this process. `rollouts` has the same from many processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.cluster import Cluster
from fleetcast.control.environment import EnvironmentOptions, Environments
from fleetcast.control.interface import Outcome
from fleetcast.control.traffic import Traffic

#: Where nothing is held, all services are to blame alike.
_NONE = 1e-9


@dataclass(frozen=True)
class Rollout:
    """An episode of E environments and L decisions."""

    telemetry: Tensor
    """[E, T − 1 + L, S, F]. The window of decision l begins at l."""
    requests: Tensor
    """[E, T − 1 + L, K, 3]."""
    mask: Tensor
    """[E, L, S, C]."""
    change: Tensor
    """[E, L, S]. What was chosen; likewise the next two."""
    routing: Tensor
    restart: Tensor
    log_prob: Tensor
    """[E, L, S]. Of what was chosen, by the agent as it was."""
    value: Tensor
    """[E, L + 1, S]. As the agent told it, the last of what the episode ended with."""
    reward: Tensor
    """[E, L]. Of the environment."""
    credit: Tensor
    """[E, L, S]. Of it, what a service is credited with."""


def join(parts: Sequence[Rollout]) -> Rollout:
    """Their environments side by side."""
    return Rollout(*(torch.cat([getattr(one, f.name) for one in parts]) for f in fields(Rollout)))


class Rollouts(Protocol):
    """Gives experience; the same arguments, the same experience."""

    def collect(self, agent: Agent, seed: Sequence[int]) -> Rollout:
        """One episode in all environments."""


class Collector:
    """Runs episodes in this process."""

    def __init__(
        self,
        cluster: Cluster,
        training: Traffic,
        options: EnvironmentOptions,
        environments: int,
    ) -> None:
        self._environments = Environments(cluster, training, options, environments)
        most = cluster.max_replicas @ cluster.cores
        self._prices = options.cost_weight * torch.as_tensor(cluster.cores / most, dtype=torch.float32)
        """[S]. What a replica costs in reward."""

    @torch.no_grad()
    def collect(self, agent: Agent, seed: Sequence[int]) -> Rollout:
        """One episode."""
        first, second = np.random.SeedSequence(list(seed)).generate_state(2).tolist()
        generator = torch.Generator().manual_seed(second)
        environments = self._environments
        seen = environments.reset(first)
        telemetry, requests = list(seen["telemetry"].unbind(1)), list(seen["requests"].unbind(1))
        steps: list[tuple[Tensor, ...]] = []
        over = False
        while not over:
            decision = agent.decide(agent.encode(seen["telemetry"], seen["requests"]), seen["mask"])
            choice = decision.sample(generator)
            now, reward, over, outcome = environments.step(choice.change, choice.weights, choice.restart)
            steps.append(
                (
                    *(seen["mask"], choice.change, choice.routing, choice.restart),
                    *(decision.log_prob(choice), decision.value, reward, self._credit(outcome)),
                )
            )
            seen = now
            telemetry.append(seen["telemetry"][:, -1])
            requests.append(seen["requests"][:, -1])
        last = agent.decide(agent.encode(seen["telemetry"], seen["requests"]), seen["mask"]).value
        mask, change, routing, restart, log_prob, value, reward, credit = (
            torch.stack(one, 1) for one in zip(*steps, strict=True)
        )
        return Rollout(
            telemetry=torch.stack(telemetry[:-1], 1),
            requests=torch.stack(requests[:-1], 1),
            mask=mask,
            change=change,
            routing=routing,
            restart=restart,
            log_prob=log_prob,
            value=torch.cat((value, last.unsqueeze(1)), 1),
            reward=reward,
            credit=credit,
        )

    def _credit(self, outcome: Outcome) -> Tensor:
        """[E, S]. What its own replicas cost, and of what users lost the share of the time that their
        requests spent in this service. All together it is the reward, less what it can be at most."""
        environments = self._environments
        most = environments.options.throughput_weight
        lost = (most - environments.performance(outcome)).unsqueeze(1)
        held = outcome.held + _NONE
        return -lost * held / held.sum(1, keepdim=True) - self._prices * environments.seen.wanted


class InProcess:
    """Some collectors one after the other, each with its share of the environments."""

    def __init__(self, collectors: Sequence[Collector]) -> None:
        self._collectors = collectors

    def collect(self, agent: Agent, seed: Sequence[int]) -> Rollout:
        """One episode in all environments."""
        return join([one.collect(agent, [*seed, number]) for number, one in enumerate(self._collectors)])


def for_agent(options: EnvironmentOptions, agent: AgentOptions) -> EnvironmentOptions:
    """The environment as this agent sees it and acts in it."""
    return options.model_copy(update={"window": agent.window, "changes": agent.changes, "rule": agent.rule})

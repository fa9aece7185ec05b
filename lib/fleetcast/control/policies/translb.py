"""TransLB: attention over what is measured of each class of nodes, to weights of the balancer.

Replicas are scaled by another policy (the rule of Kubernetes), so what differs from it is the routing alone.
It learns by imitation of least response time: from telemetry under random routing, which shares of calls, in
inverse proportion to the time of a call in a replica, would have been right when the weights took effect.
Measurements are old by then, so there is something to learn. It needs no reward, hence no simulator either.
"""

from __future__ import annotations

from collections import deque

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.config import Options
from fleetcast.control.cluster import Cluster
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import Action, Observation, Policy
from fleetcast.control.traffic import Traffic

#: Of a class of nodes: share of the ready replicas, CPU, time of a call, whether it was measured, queue.
_FEATURES = 5


class TranslbOptions(Options):
    """The balancer and its training."""

    width: int = Field(16, ge=2, multiple_of=2)
    heads: int = Field(2, ge=1)
    """Of attention; they divide `width`."""
    layers: int = Field(1, ge=1)
    intervals: int = Field(120, ge=10)
    """Decisions of the telemetry that it learns from."""
    steps: int = Field(300, ge=1)
    """Training steps."""
    rate: float = Field(3e-3, gt=0)
    """Learning rate."""
    exponent: float = Field(1, ge=0)
    """Power of the weights that is used: 1 follows them, 0 ignores them."""
    seed: int = Field(0, ge=0)


class AttentionBalancer(nn.Module):
    """[…, Z, features] → weights […, Z] that add up to 1, whatever the order of the classes."""

    def __init__(self, options: TranslbOptions) -> None:
        super().__init__()
        self.first = nn.Linear(_FEATURES, options.width)
        layer = nn.TransformerEncoderLayer(
            options.width, options.heads, 2 * options.width, dropout=0, batch_first=True
        )
        self.attention = nn.TransformerEncoder(layer, options.layers, enable_nested_tensor=False)
        self.last = nn.Linear(options.width, 1)

    def forward(self, features: Tensor, there: Tensor) -> Tensor:
        """`there` […, Z]: classes with ready replicas; the others get 0, all 0 where there are none."""
        flat, mask = features.flatten(0, -3), ~there.flatten(0, -2)
        # Attention over nothing is no number; where no class is there, all are looked at and none is used.
        mask = mask & ~mask.all(1, keepdim=True)
        tokens = self.attention(self.first(flat), src_key_padding_mask=mask)
        weights = self.last(tokens).squeeze(-1).masked_fill(mask, -torch.inf).softmax(1)
        return weights.view(there.shape) * there


class TranslbPolicy:
    """Another policy's replicas, the balancer's routing; its weights to the power of `exponent`."""

    def __init__(self, balancer: AttentionBalancer, replicas: Policy, exponent: float = 1) -> None:
        self._balancer, self._replicas, self._exponent = balancer.eval(), replicas, exponent

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self._demand = torch.as_tensor(cluster.demand, dtype=torch.float32)
        self._replicas.reset(cluster, environments)

    @torch.no_grad()
    def act(self, observation: Observation) -> Action:
        """Replicas and routing."""
        there = observation.ready_by_class > 0
        weights = self._balancer(_features(observation, self._demand), there) ** self._exponent * there
        return Action(self._replicas.act(observation).replicas, weights)


def train(
    options: TranslbOptions, replicas: Policy, training: Traffic, cluster: Cluster
) -> AttentionBalancer:
    """Learns from a run with `replicas` and random routing on training traffic."""
    torch.manual_seed(options.seed)
    features, there, target = _telemetry(options, replicas, training, cluster)
    balancer = AttentionBalancer(options)
    optimiser = torch.optim.Adam(balancer.parameters(), options.rate)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        pick = torch.randint(len(features), (512,), generator=generator)
        weights = balancer(features[pick].unsqueeze(1), there[pick].unsqueeze(1)).squeeze(1)
        loss = -(target[pick] * weights.clamp(min=1e-9).log()).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return balancer


def _telemetry(
    options: TranslbOptions, replicas: Policy, training: Traffic, cluster: Cluster
) -> tuple[Tensor, Tensor, Tensor]:
    """[P, Z, features], [P, Z] and [P, Z]: what was seen, which classes were there, and the right weights."""
    engine = FluidEngine(cluster, training, step=cluster.measure.interval / 3, seed=options.seed)
    replicas.reset(cluster, engine.environments)
    demand = torch.as_tensor(cluster.demand, dtype=torch.float32)
    generator = torch.Generator().manual_seed(options.seed)
    # What is decided now shows in what is seen so many decisions later.
    waiting: deque[Observation] = deque(maxlen=2 + round(cluster.measure.lag / cluster.measure.interval))
    parts = []
    for _ in range(options.intervals):
        seen = engine.observe()
        waiting.append(seen)
        if len(waiting) == waiting.maxlen:
            before = waiting[0]
            there = before.ready_by_class > 0
            usable = ((seen.latency_by_class > 0) | ~there).all(2) & (there.sum(2) > 1)
            speed = torch.where(there, 1 / seen.latency_by_class, 0)
            parts.append(
                (
                    _features(before, demand)[usable],
                    there[usable],
                    (speed / speed.sum(2, keepdim=True))[usable],
                )
            )
        routing = torch.rand(seen.ready_by_class.shape, generator=generator) + 0.5
        engine.step(Action(replicas.act(seen).replicas, routing))
    features, classes, targets = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(classes), torch.cat(targets)


def _features(seen: Observation, demand: Tensor) -> Tensor:
    """[E, S, Z, features], mostly from −1 to 1."""
    time = (seen.latency_by_class / demand.unsqueeze(1)).clamp(min=0.1).log() / 3
    queue = torch.log1p(seen.queue / seen.ready.clamp(min=1)).unsqueeze(2).expand_as(time) / 5
    features = torch.stack(
        (
            seen.ready_by_class / seen.ready.clamp(min=1).unsqueeze(2),
            seen.cpu_by_class,
            time,
            (~seen.latency_by_class.isnan()).float(),
            queue,
        ),
        -1,
    )
    return features.nan_to_num(0)

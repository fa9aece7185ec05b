"""The agent: z = GRU(Conv(X)), and what it decides by z.

    z = agent.encode(telemetry, requests)    # [E, S, D]
    decision = agent.decide(z, mask)         # distributions of the actions, and the value
    choice = decision.best()

To encode and to decide are two calls, since live they go on at their own pace with a cache of z between them.
Weights are shared by all services, so one agent works on clusters of any size; of the others a service knows
the mean latent state, and of the users the mean over the classes of requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fleetcast.config import Options
from fleetcast.control.features import CHANGES, REQUEST_FEATURES, Changes, features
from fleetcast.control.policies.kubernetes import KubernetesOptions

#: Log-odds of a restart, and deviation of the routing's logits, before anything is learned.
_RESTART, _SPREAD = -7.0, 0.1
#: The same of the sharpness of the choice among changes, before its softplus: two in three are no change.
_KEEP = 1.0
#: Bounds of the sharpness of the choice among changes.
_SHARP = (0.05, 20.0)


class AgentOptions(Options):
    """What is built."""

    window: int = Field(16, ge=1)
    """T: measurements that it sees."""
    patch: int = Field(4, ge=1)
    """Measurements that the convolution takes together; it divides `window`."""
    zones: int = Field(3, ge=1)
    """Z: classes of nodes."""
    changes: Changes = CHANGES
    """C changes of a service's replicas to choose from, as shares."""
    rule: KubernetesOptions | None = None
    """The rule whose replicas are changed: an agent that has learned nothing does as it does. Without one,
    the replicas that are wanted now."""
    latent: int = Field(32, ge=1)
    """D."""
    hidden: int = Field(64, ge=1)
    """Width of what decides."""
    encoder: Literal["conv_gru", "last"] = "conv_gru"
    """How the latent state is made: of the window, or of the last measurement alone."""

    @model_validator(mode="after")
    def _whole(self) -> AgentOptions:
        if self.window % self.patch:
            raise ValueError(f"patch {self.patch}, expected to divide the window {self.window}")
        return self


@dataclass(frozen=True)
class Choice:
    """An action of every service."""

    change: Tensor
    """[E, S], int64. Places in the agent's changes."""
    routing: Tensor
    """[E, S, Z]. Logits of the balancer's weights."""
    restart: Tensor
    """[E, S], bool."""

    @property
    def weights(self) -> Tensor:
        """[E, S, Z]. Weights of the balancer, which add up to 1."""
        return self.routing.softmax(2)


@dataclass(frozen=True)
class Decision:
    """Distributions of the actions, independent of each other by service and kind."""

    changes: Tensor
    """[E, S, C]. Logits; −∞ where the mask forbids it."""
    routing: Tensor
    """[E, S, Z]. Means of the logits of the balancer's weights."""
    spread: Tensor
    """[Z]. Their standard deviation."""
    restart: Tensor
    """[E, S]. Log-odds."""
    value: Tensor
    """[E, S]. Discounted reward to come, as each service is credited with it."""

    def best(self) -> Choice:
        """The most likely of each."""
        return Choice(self.changes.argmax(2), self.routing, self.restart > 0)

    def sample(self, generator: torch.Generator) -> Choice:
        """One at random."""
        device = self.changes.device
        chances = self.changes.softmax(2)
        change = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view(chances.shape[:2])
        noise = torch.randn(self.routing.shape, generator=generator, device=device)
        odds = torch.rand(self.restart.shape, generator=generator, device=device)
        return Choice(change, self.routing + self.spread * noise, odds < self.restart.sigmoid())

    def log_prob(self, choice: Choice) -> Tensor:
        """[E, S]."""
        change = self.changes.log_softmax(2).gather(2, choice.change.unsqueeze(2)).squeeze(2)
        scaled = (choice.routing - self.routing) / self.spread
        routing = (-0.5 * scaled**2 - self.spread.log() - 0.5 * math.log(2 * math.pi)).sum(2)
        signed = torch.where(choice.restart, self.restart, -self.restart)
        return change + routing + nn.functional.logsigmoid(signed)

    def entropy(self) -> Tensor:
        """[E, S]. Of the choice among changes and of the restart; that of the routing is its spread's."""
        changes = self.changes.log_softmax(2)
        restart = nn.functional.binary_cross_entropy_with_logits(
            self.restart, self.restart.sigmoid(), reduction="none"
        )
        return -(changes.exp() * changes.clamp(min=-1e4)).sum(2) + restart


class Agent(nn.Module):
    """Encoder, policy and value."""

    def __init__(self, options: AgentOptions) -> None:
        super().__init__()
        self.options = options
        width, latent, hidden = features(options.zones), options.latent, options.hidden
        length = options.patch if options.encoder == "conv_gru" else 1
        self.conv = nn.Conv1d(width, latent, length, stride=length)
        self.context = nn.Conv1d(len(REQUEST_FEATURES), latent, length, stride=length)
        self.gru = nn.GRU(latent, latent, batch_first=True) if options.encoder == "conv_gru" else None
        self.policy = nn.Sequential(
            nn.Linear(2 * latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.critic = nn.Sequential(nn.Linear(2 * latent, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.change, self.restart = nn.Linear(hidden, 2), nn.Linear(hidden, 1)
        self.routing = nn.Linear(hidden, options.zones)
        self.log_spread = nn.Parameter(torch.full((options.zones,), math.log(_SPREAD)))
        places = torch.arange(len(options.changes)) - options.changes.index(0)
        self.register_buffer("places", places.float(), persistent=False)
        for head in (self.change, self.restart, self.routing):
            nn.init.orthogonal_(head.weight, 0.01)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.restart.bias, _RESTART)
        with torch.no_grad():
            self.change.bias[1] = _KEEP

    def encode(self, telemetry: Tensor, requests: Tensor) -> Tensor:
        """[E, T, S, F] and [E, T, K, 3] → z [E, S, D], each from −1 to 1."""
        environments, services = telemetry.shape[0], telemetry.shape[2]
        if self.gru is None:
            telemetry, requests = telemetry[:, -1:], requests[:, -1:]
        patches = self.conv(telemetry.permute(0, 2, 3, 1).flatten(0, 1)).unflatten(
            0, (environments, services)
        )
        context = self.context(requests.mean(2).transpose(1, 2)).unsqueeze(1)
        tokens = (patches + context).tanh().flatten(0, 1).transpose(1, 2)
        if self.gru is None:
            return cast(Tensor, tokens[:, 0].unflatten(0, (environments, services)))
        return cast(Tensor, self.gru(tokens)[1][0].unflatten(0, (environments, services)))

    def decide(self, z: Tensor, mask: Tensor) -> Decision:
        """z [E, S, D] and which changes may be chosen [E, S, C] → the actions' distributions and the value.

        Changes lie in a row: how likely one is falls with its distance from the change that is aimed at.
        """
        state = torch.cat((z, z.mean(1, keepdim=True).expand_as(z)), 2)
        hidden = self.policy(state)
        aim, sharp = self.change(hidden).split(1, 2)
        sharp = nn.functional.softplus(sharp).clamp(*_SHARP)
        changes = -sharp * (cast(Tensor, self.places) - aim) ** 2
        return Decision(
            changes=changes.masked_fill(~mask, -torch.inf),
            routing=self.routing(hidden),
            spread=self.log_spread.exp(),
            restart=self.restart(hidden).squeeze(2),
            value=self.critic(state).squeeze(2),
        )

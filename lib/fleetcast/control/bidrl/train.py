"""Training by PPO, the encoder and the policy together.

    trained = train(options, agent_options, cluster, traffic, store, "_work/bidrl/…")

    loss = policy + ½ value − entropy + smoothness · E|z(t+1) − z(t)|²

An iteration is one episode in all environments and some epochs over it, so nothing of the simulator has to
outlive it: a checkpoint holds weights, optimiser and progress, and a resumed run equals an uninterrupted one.

PPO is written out here. Of the libraries for it, Stable-Baselines3 (MaskablePPO) and RLlib take one action of
fixed size with one advantage, and keep experience in NumPy or in processes of their own; here every service
has an action, an advantage and a ratio of its own, their number varies, the environments are tensors already,
and the loss needs the latent states of consecutive steps. What could be taken over were some forty lines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.config import Options
from fleetcast.control.bidrl.checkpoint import Checkpoint
from fleetcast.control.bidrl.collect import Collector, InProcess, Rollout, Rollouts, for_agent
from fleetcast.control.bidrl.model import Agent, AgentOptions, Choice
from fleetcast.control.cluster import Cluster
from fleetcast.control.environment import EnvironmentOptions
from fleetcast.control.traffic import Traffic
from fleetcast.store import Store

log = logging.getLogger(__name__)


class TrainOptions(Options):
    """How an agent is trained. A decision is one of one environment."""

    decisions: int = Field(100_000, ge=1)
    """Budget: whole episodes, rounded up."""
    environments: int = Field(16, ge=1)
    """Side by side."""
    collectors: int = Field(1, ge=1)
    """Parts in which experience is collected; they divide `environments`."""
    environment: EnvironmentOptions = EnvironmentOptions(step=5, episode=60)
    """Reward, length of an episode and step of the simulator."""
    epochs: int = Field(4, ge=1)
    """Over each episode."""
    stretch: int = Field(6, ge=2)
    """Consecutive decisions of an environment that are learned from together; it divides an episode."""
    batch: int = Field(64, ge=1)
    """Stretches of a gradient step."""
    rate: float = Field(3e-3, gt=0)
    """Learning rate; it falls to a tenth."""
    discount: float = Field(0.95, ge=0, lt=1)
    trace: float = Field(0.9, ge=0, le=1)
    """λ of the generalised advantage estimate."""
    clip: float = Field(0.2, gt=0)
    """How far a step may change the odds of what was done."""
    divergence: float = Field(0.02, gt=0)
    """Epochs over an episode end when the policy is so far from the one that collected it [nats]."""
    entropy: float = Field(0.003, ge=0)
    smoothness: float = Field(0.1, ge=0)
    """Weight of the distance of consecutive latent states, mean square; 0: no term for the representation."""
    seed: int = Field(0, ge=0)

    @property
    def iterations(self) -> int:
        """Episodes of all environments."""
        return -(-self.decisions // (self.environments * self.environment.episode))


@dataclass
class Progress:
    """What a run knows besides weights; JSON."""

    iteration: int = 0
    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0
    """Of all credits so far: their number, mean, and summed squares around it."""
    history: list[dict[str, float]] = field(default_factory=list)

    def take(self, credit: Tensor) -> None:
        """More credits for mean and deviation (Chan's update)."""
        count, mean = credit.numel(), float(credit.double().mean())
        total, gap = self.count + count, mean - self.mean
        self.square += float(credit.double().var(correction=0)) * count + gap**2 * self.count * count / total
        self.mean, self.count = self.mean + gap * count / total, total

    def normalised(self, credit: Tensor) -> Tensor:
        """With mean 0 and deviation 1 over the run."""
        return (credit - self.mean) / max((self.square / max(self.count, 1)) ** 0.5, 1e-6)


def train(
    options: TrainOptions,
    agent_options: AgentOptions,
    cluster: Cluster,
    training: Traffic,
    store: Store,
    work: str,
    *,
    rollouts: Rollouts | None = None,
    on_iteration: Callable[[int], None] = lambda iteration: None,
) -> Agent:
    """The trained agent. `work` is a folder of the store for its checkpoint: called again it goes on there.

    `rollouts` collects experience elsewhere; by default it is collected here. `on_iteration` is told each
    number of iterations that is safe in the checkpoint.
    """
    torch.manual_seed(options.seed)
    agent = Agent(agent_options)
    optimiser = torch.optim.Adam(agent.parameters(), options.rate)
    progress = Progress()
    checkpoint = Checkpoint(store, work)
    saved = checkpoint.read(agent, optimiser)
    if saved is not None:
        progress = Progress(**saved)
    rollouts = rollouts or InProcess(collectors(options, agent_options, cluster, training))
    for iteration in range(progress.iteration, options.iterations):
        rollout = rollouts.collect(agent, (options.seed, iteration))
        for group in optimiser.param_groups:
            group["lr"] = options.rate * (1 - 0.9 * iteration / options.iterations)
        figures = _learn(agent, optimiser, rollout, progress, options, iteration)
        progress.iteration = iteration + 1
        progress.history.append(figures)
        checkpoint.write(agent, optimiser, vars(progress), progress.iteration)
        log.info(
            "iteration %d/%d: reward %.4f, %s",
            iteration + 1,
            options.iterations,
            figures["reward"],
            ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "reward"),
        )
        on_iteration(progress.iteration)
    return agent.eval()


def collectors(
    options: TrainOptions, agent_options: AgentOptions, cluster: Cluster, training: Traffic
) -> list[Collector]:
    """One for each part of the environments."""
    environment = for_agent(options.environment, agent_options)
    each = -(-options.environments // options.collectors)
    return [Collector(cluster, training, environment, each) for _ in range(options.collectors)]


def advantages(credit: Tensor, value: Tensor, discount: float, trace: float) -> Tensor:
    """[E, L, S]. Generalised advantage estimate of credits [E, L, S], by values [E, L + 1, S]; what comes
    after the episode is the last value's to tell, as it ends by the clock alone."""
    gain = torch.zeros_like(value[:, 0])
    gains = []
    for step in reversed(range(credit.shape[1])):
        surprise = credit[:, step] + discount * value[:, step + 1] - value[:, step]
        gain = surprise + discount * trace * gain
        gains.append(gain)
    return torch.stack(gains[::-1], 1)


def smoothness(z: Tensor) -> Tensor:
    """Mean square of the step from one latent state to the next, of [B, L, S, D]."""
    return (z[:, 1:] - z[:, :-1]).square().mean()


def _learn(
    agent: Agent,
    optimiser: torch.optim.Optimizer,
    rollout: Rollout,
    progress: Progress,
    options: TrainOptions,
    iteration: int,
) -> dict[str, float]:
    """Some epochs over an episode; what it was like."""
    progress.take(rollout.credit)
    # What is to come is of the size of what comes now, so that values do not drown the rest of the loss.
    credit = (1 - options.discount) * progress.normalised(rollout.credit)
    gain = advantages(credit, rollout.value, options.discount, options.trace)
    target = gain + rollout.value[:, :-1]
    gain = (gain - gain.mean()) / gain.std().clamp(min=1e-6)
    generator = torch.Generator().manual_seed(options.seed * 100_003 + iteration)
    environments, decisions = rollout.reward.shape
    places = torch.cartesian_prod(
        torch.arange(environments), torch.arange(0, decisions - options.stretch + 1, options.stretch)
    )
    sums: dict[str, float] = {}
    steps = 0
    for _ in range(options.epochs):
        divergence = 0.0
        batches = places[torch.randperm(len(places), generator=generator)].split(options.batch)
        for rows in batches:
            part = _Part.of(agent, rollout, gain, target, rows, options.stretch)
            losses = part.reinforcement(options)
            losses["value"] = part.value()
            losses["smooth"] = smoothness(part.z)
            weights = {"value": 0.5, "smooth": options.smoothness, "divergence": 0.0}
            loss = sum((weights.get(name, 1.0) * one for name, one in losses.items()), torch.zeros(()))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimiser.step()
            for name, one in losses.items():
                sums[name] = sums.get(name, 0.0) + float(one.detach())
            steps += 1
            divergence += float(losses.get("divergence", torch.zeros(())).detach()) / len(batches)
        if divergence > options.divergence:
            break
    return {
        "reward": float(rollout.reward.mean()),
        "changed": float((rollout.change != agent.options.changes.index(0)).float().mean()),
        "restarts": float(rollout.restart.float().mean()),
        "steps": steps,
    } | {name: one / steps for name, one in sums.items()}


@dataclass
class _Part:
    """Some stretches of a rollout [B, L], and what the agent now makes of them."""

    agent: Agent
    z: Tensor
    """[B, L, S, D]."""
    rows: dict[str, Tensor]
    """[B · L, …]. Of the rollout, the advantage and the target."""

    @classmethod
    def of(
        cls, agent: Agent, rollout: Rollout, gain: Tensor, target: Tensor, places: Tensor, stretch: int
    ) -> _Part:
        which, start = places.unbind(1)
        window = agent.options.window
        at = (which.unsqueeze(1), start.unsqueeze(1) + torch.arange(stretch))
        seen = (which.unsqueeze(1), start.unsqueeze(1) + torch.arange(stretch + window - 1))

        def windows(values: Tensor) -> Tensor:
            """[B · L, T, …]."""
            return values[seen].unfold(1, window, 1).movedim(-1, 2).flatten(0, 1)

        z = agent.encode(windows(rollout.telemetry), windows(rollout.requests))
        names = ("mask", "change", "routing", "restart", "log_prob")
        rows = {name: getattr(rollout, name)[at].flatten(0, 1) for name in names}
        rows |= {"gain": gain[at].flatten(0, 1), "target": target[at].flatten(0, 1)}
        return cls(agent, z.unflatten(0, (len(places), stretch)), rows)

    def __post_init__(self) -> None:
        self.decision = self.agent.decide(self.z.flatten(0, 1), self.rows["mask"])

    def reinforcement(self, options: TrainOptions) -> dict[str, Tensor]:
        """PPO's clipped objective, each service with a ratio of its own."""
        rows = self.rows
        choice = Choice(rows["change"], rows["routing"], rows["restart"])
        log_ratio = self.decision.log_prob(choice) - rows["log_prob"]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - options.clip, 1 + options.clip)
        policy = -torch.minimum(ratio * rows["gain"], clipped * rows["gain"]).mean()
        return {
            "policy": policy,
            "entropy": -options.entropy * self.decision.entropy().mean(),
            "divergence": (ratio - 1 - log_ratio).mean(),
        }

    def value(self) -> Tensor:
        """Mean square error of the value."""
        return (self.decision.value - self.rows["target"]).square().mean()

"""The cluster as a reinforcement-learning environment: many at once in tensors, or one by Gymnasium's API.

    telemetry [T, S, F], requests [T, K, 3], mask [S, C]  →  change [S], routing [S, Z], restart [S]

A step is one decision interval. The reward is

    R = α₁ T / T_max − α₂ L / L_max − α₃ P

with T the requests answered in time and T_max those that users made, L the mean latency (at most L_max) and
L_max the mean deadline, and P the CPU that replicas request as share of what the most replicas would.
"""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control import traffic
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.events import EventEngine
from fleetcast.control.features import CHANGES, LARGEST, REQUEST_FEATURES, Changes, Scales, Window, features
from fleetcast.control.interface import Action, Outcome
from fleetcast.control.policies.kubernetes import KubernetesOptions
from fleetcast.control.traffic import Traffic, TrafficOptions
from fleetcast.errors import InputError


class EnvironmentOptions(Options):
    """What an agent sees and may do, and what it is rewarded for."""

    window: int = Field(16, ge=1)
    """T: measurements that are seen at once."""
    changes: Changes = CHANGES
    """Changes of a service's replicas to choose from, as shares."""
    rule: KubernetesOptions | None = None
    """A rule whose replicas are changed; those that are wanted now without one."""
    routing: bool = True
    """Whether weights of the classes of nodes are chosen too."""
    restarts: bool = True
    """Whether replicas may be restarted."""
    episode: int = Field(240, ge=1)
    """Decisions of an episode."""
    throughput_weight: float = Field(1, ge=0)
    latency_weight: float = Field(0.5, ge=0)
    cost_weight: float = Field(0.5, ge=0)
    """α₁, α₂ and α₃."""
    engine: Literal["fluid", "events"] = "fluid"
    """The vectorised engine, or the event-driven one for a single environment."""
    step: float = Field(1, gt=0)
    """Step of the vectorised engine [s]."""


class Environments:
    """Environments side by side, as tensors: for training.

    Episodes begin at random times of the traffic, each environment's own. All end together.
    """

    def __init__(
        self,
        cluster: Cluster,
        rates: Traffic,
        options: EnvironmentOptions,
        environments: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """`rates` are those of some environments; each episode takes a stretch of one of them."""
        self._length = round(options.episode * cluster.measure.interval / rates.step)
        if rates.rates.shape[1] < self._length:
            raise InputError(
                f"traffic of {rates.rates.shape[1] * rates.step:.0f} s, expected at least an episode of "
                f"{options.episode} decisions: {self._length * rates.step:.0f} s"
            )
        if options.engine == "events" and environments != 1:
            raise InputError(f"{environments} environments of the event-driven engine, expected 1")
        self.cluster, self.options, self.environments = cluster, options, environments
        self._pool, self._device = rates, torch.device(device)
        self._window = Window(Scales.of(cluster), options.window, options.changes, options.rule, self._device)
        self._longest = float(cluster.share @ cluster.deadline)
        self._cores = float(cluster.max_replicas @ cluster.cores)
        self.edges = torch.as_tensor(np.stack((cluster.caller, cluster.callee)), device=self._device)
        """[2, L]. Callers and callees."""
        self.edge_weights = torch.as_tensor(
            cluster.share @ cluster.calls, dtype=torch.float32, device=self._device
        )
        """[L]. Calls along each edge for a call of its caller, on average over the classes."""

    @property
    def features(self) -> int:
        """F."""
        return features(len(self.cluster.node_classes))

    def reset(self, seed: int) -> dict[str, Tensor]:
        """Begins an episode; the same seed, the same episode."""
        generator = torch.Generator().manual_seed(seed)
        rates, step = self._pool.rates, self._pool.step
        which = torch.randint(len(rates), (self.environments,), generator=generator)
        starts = torch.randint(rates.shape[1] - self._length + 1, (self.environments,), generator=generator)
        places = starts.unsqueeze(1) + torch.arange(self._length)
        part = Traffic(rates[which.unsqueeze(1), places], step)
        self.engine: FluidEngine | EventEngine
        if self.options.engine == "events":
            self.engine = EventEngine(self.cluster, part, seed=seed)
        else:
            self.engine = FluidEngine(
                self.cluster, part, step=self.options.step, seed=seed, device=self._device
            )
        self._window.reset(self.environments)
        self._done = 0
        return self._see()

    def step(
        self, change: Tensor, routing: Tensor | None = None, restart: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor, bool, Outcome]:
        """Lets one decision interval pass.

        `change` [E, S] are places in `options.changes`; `routing` [E, S, Z] are weights, and `restart` [E, S]
        says which services restart a replica. Returns what is seen, the reward [E], whether the episode is
        over, and what came of the interval.
        """
        replicas = self._window.changed(change)
        outcome = self.engine.step(
            Action(
                replicas,
                routing if self.options.routing else None,
                restart if self.options.restarts else None,
            )
        )
        self._done += 1
        return self._see(), self.reward(outcome), self._done >= self.options.episode, outcome

    def reward(self, outcome: Outcome) -> Tensor:
        """[E]. R of some time."""
        cost = outcome.cpu_allocated / (outcome.seconds * self._cores)
        return self.performance(outcome) - self.options.cost_weight * cost

    def performance(self, outcome: Outcome) -> Tensor:
        """[E]. Of R what users notice: α₁ T / T_max − α₂ L / L_max."""
        options = self.options
        in_time = torch.where(outcome.offered > 0, outcome.good / outcome.offered.clamp(min=1e-9), 1)
        latency = outcome.latency / outcome.answered.clamp(min=1e-9) / self._longest
        latency = torch.where(outcome.answered > 0, latency.clamp(max=1), (outcome.offered > 0).float())
        return options.throughput_weight * in_time.clamp(max=1) - options.latency_weight * latency

    def mask(self) -> Tensor:
        """[E, S, C]. Which changes keep within the least and the most replicas."""
        return self._window.mask()

    def _see(self) -> dict[str, Tensor]:
        self.seen = self.engine.observe()
        return self._window.push(self.seen)


class ClusterEnv(gymnasium.Env[Any, Any]):
    """One environment by Gymnasium's API, with `Environments` inside.

    `info` holds `mask` [S, C], and after a step `outcome`: sums of `Outcome` by name.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (as Gymnasium declares it)

    def __init__(
        self,
        cluster: ClusterOptions | None = None,
        requests: TrafficOptions | None = None,
        options: EnvironmentOptions | None = None,
    ) -> None:
        made, options = generate(cluster or ClusterOptions()), options or EnvironmentOptions()
        rates = traffic.generate(requests or TrafficOptions(), made)
        self._inside = Environments(made, rates, options, 1)
        self._seed = 0
        services, zones = len(made.names), len(made.node_classes)
        shapes = {
            "telemetry": (options.window, services, self._inside.features),
            "requests": (options.window, len(made.entry), len(REQUEST_FEATURES)),
        }
        self.observation_space = spaces.Dict(
            {name: spaces.Box(-LARGEST, LARGEST, shape, np.float32) for name, shape in shapes.items()}
            | {"mask": spaces.MultiBinary((services, len(options.changes)))}
        )
        self.action_space = spaces.Dict(
            {"change": spaces.MultiDiscrete([len(options.changes)] * services)}
            | ({"routing": spaces.Box(0, 1, (services, zones), np.float32)} if options.routing else {})
            | ({"restart": spaces.MultiBinary(services)} if options.restarts else {})
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        super().reset(seed=seed)
        self._seed = self._seed + 1 if seed is None else seed
        seen = self._as_arrays(self._inside.reset(self._seed))
        return seen, {"mask": seen["mask"]}

    def step(
        self, action: dict[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        routing, restart = action.get("routing"), action.get("restart")
        seen, reward, over, outcome = self._inside.step(
            torch.as_tensor(action["change"]).unsqueeze(0),
            None if routing is None else torch.as_tensor(routing).unsqueeze(0),
            None if restart is None else torch.as_tensor(restart).unsqueeze(0).bool(),
        )
        arrays = self._as_arrays(seen)
        sums = {name: value[0].numpy() for name, value in vars(outcome).items()}
        return arrays, float(reward), False, over, {"mask": arrays["mask"], "outcome": sums}

    def _as_arrays(self, seen: dict[str, Tensor]) -> dict[str, NDArray[Any]]:
        arrays = {name: value[0].numpy() for name, value in seen.items()}
        return arrays | {"mask": arrays["mask"].astype(np.int8)}

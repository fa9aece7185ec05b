"""An agent as a policy, and in the store: `models/bidrl/<version>/` with its options, scales and weights.

    policy = BidrlPolicy.load(store, "v1")
    policy.reset(cluster, environments)            # in the simulator, or
    policy.begin(environments=1)                   # live, by the scales that it was saved with
    action = policy.act(observation)

`act` is `see`, `encode` and `decide` in a row; who wants a cache of latent states calls them apart.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.cluster import Cluster
from fleetcast.control.features import Scales, Window
from fleetcast.control.interface import Action, Observation
from fleetcast.errors import InputError
from fleetcast.models.saving import CONFIG, WEIGHTS, load_weights, save_weights
from fleetcast.provenance import provenance
from fleetcast.store import MANIFEST, Store


class BidrlPolicy:
    """What an agent holds to be best."""

    def __init__(self, agent: Agent, scales: Scales) -> None:
        if scales.zones != agent.options.zones:
            raise InputError(
                f"a cluster of {scales.zones} classes of nodes, expected the agent's {agent.options.zones}"
            )
        self.agent, self.scales = agent.eval(), scales

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins, on any cluster with as many classes of nodes as the agent knows."""
        self.scales = Scales.of(cluster)
        self.begin(environments)

    def begin(self, environments: int = 1) -> None:
        """A new episode begins, by the scales that there are."""
        options = self.agent.options
        self._window = Window(self.scales, options.window, options.changes, options.rule)
        self._window.reset(environments)

    def see(self, observation: Observation) -> dict[str, Tensor]:
        """`telemetry`, `requests` and `mask` with this observation as the last one of the window."""
        return self._window.push(observation)

    @torch.no_grad()
    def encode(self, seen: dict[str, Tensor]) -> Tensor:
        """[E, S, D]. The latent states of what `see` gave."""
        return self.agent.encode(seen["telemetry"], seen["requests"])

    @torch.no_grad()
    def decide(self, z: Tensor) -> Action:
        """The best action from latent states, for what was seen last."""
        choice = self.agent.decide(z, self._window.mask()).best()
        return Action(self._window.changed(choice.change), choice.weights, choice.restart)

    def act(self, observation: Observation) -> Action:
        """Replicas, routing and restarts."""
        return self.decide(self.encode(self.see(observation)))

    def save(self, store: Store, version: str, about: dict[str, Any] | None = None) -> None:
        """Writes `models/bidrl/<version>/`, whole or not at all; `about` goes into its manifest."""
        staging, folder = f"_work/bidrl/{version}", f"models/bidrl/{version}"
        config = {
            "agent": self.agent.options.model_dump(mode="json"),
            "scales": self.scales.model_dump(mode="json"),
        }
        store.write_json(f"{staging}/{CONFIG}", config)
        save_weights(store, f"{staging}/{WEIGHTS}", self.agent.state_dict())
        store.write_json(f"{staging}/{MANIFEST}", {**(about or {}), **provenance()})
        store.publish(staging, folder)

    @classmethod
    def load(cls, store: Store, version: str) -> BidrlPolicy:
        """As it was saved. Raises InputError naming the file that is missing or not as expected."""
        folder = f"models/bidrl/{version}"
        config = store.read_json(f"{folder}/{CONFIG}")
        if not isinstance(config, dict) or set(config) != {"agent", "scales"}:
            raise InputError(f"{store.uri}/{folder}/{CONFIG}: expected an object of agent and scales")
        try:
            agent = Agent(AgentOptions.model_validate(config["agent"]))
            scales = Scales.model_validate(config["scales"])
        except ValidationError as error:
            wrong = error.errors()[0]
            raise InputError(
                f"{store.uri}/{folder}/{CONFIG}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
            ) from error
        agent.load_state_dict(load_weights(store, f"{folder}/{WEIGHTS}", agent.state_dict()))
        return cls(agent, scales)

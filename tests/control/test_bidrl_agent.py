"""The agent: one for clusters of any size, never a forbidden change, the same from the store as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.cluster import ClusterOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.features import Scales, features
from fleetcast.control.interface import run, total
from fleetcast.errors import InputError
from fleetcast.store import Store
from torch import nn

_CLUSTER = ClusterOptions(services=5, classes=2, rate=100, max_replicas=4)


def _policy(options: AgentOptions | None = None) -> BidrlPolicy:
    """Untrained, with heads large enough to do something."""
    torch.manual_seed(0)
    agent = Agent(options or AgentOptions(window=8, latent=8, hidden=16))
    for head in (agent.change, agent.routing):
        nn.init.normal_(head.weight)
    return BidrlPolicy(agent, Scales.of(generate(_CLUSTER)))


def _engine(services: int = 5) -> FluidEngine:
    cluster = generate(_CLUSTER.model_copy(update={"services": services}))
    rates = traffic.generate(traffic.TrafficOptions(hours=0.2), cluster, 2)
    return FluidEngine(cluster, rates, step=5)


@pytest.mark.parametrize("encoder", ["conv_gru", "last"])
def test_an_agent_of_5_services_runs_on_12(encoder: str) -> None:
    policy = _policy(AgentOptions(window=8, latent=8, hidden=16, encoder=encoder))  # type: ignore[arg-type]
    outcome = total(run(_engine(12), policy, 20))
    assert (outcome.answered > 0).all()
    seen = policy.see(_engine(12).observe())
    assert policy.encode(seen).shape == (2, 12, 8)


def test_encode_then_decide_is_act() -> None:
    whole, apart, engine = _policy(), _policy(), _engine()
    whole.reset(engine.cluster, 2)
    apart.reset(engine.cluster, 2)
    for _ in range(5):
        seen = engine.observe()
        action = whole.act(seen)
        other = apart.decide(apart.encode(apart.see(seen)))
        assert torch.equal(action.replicas, other.replicas)
        assert action.routing is not None and other.routing is not None
        assert torch.equal(action.routing, other.routing)
        assert torch.allclose(action.routing.sum(2), torch.ones(2, 5))
        engine.step(action)


@pytest.mark.parametrize("changes", [(-4, -1, 0, 1, 4), (-0.2, 0.2), (0.2, 0, -0.2)])
def test_changes_that_are_no_shares_are_refused_in_an_agent_that_was_saved(changes, tmp_path) -> None:
    store = Store(str(tmp_path)).open_or_create()
    _policy().save(store, "v1")
    config = store.read_json("models/bidrl/v1/config.json")
    config["agent"]["changes"] = changes
    store.write_json("models/bidrl/v1/config.json", config)
    with pytest.raises(InputError, match="expected rising shares above -1 with 0 among them"):
        BidrlPolicy.load(store, "v1")


def test_masked_changes_are_never_taken() -> None:
    agent = _policy().agent
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(64, 5, len(agent.options.changes), generator=generator) < 0.3
    mask[:, :, 3] = True
    decision = agent.decide(torch.randn(64, 5, 8, generator=generator), mask)
    for choice in (decision.best(), *(decision.sample(generator) for _ in range(20))):
        assert mask.gather(2, choice.change.unsqueeze(2)).all()
    assert decision.entropy().isfinite().all()


def test_another_order_of_services_gives_the_same_decisions_in_that_order() -> None:
    agent = _policy().agent
    generator = torch.Generator().manual_seed(1)
    telemetry, requests = torch.rand(2, 8, 5, features(3), generator=generator), torch.rand(2, 8, 2, 3)
    mask, order = torch.ones(2, 5, len(agent.options.changes)).bool(), torch.tensor([3, 0, 4, 1, 2])
    plain = agent.decide(agent.encode(telemetry, requests), mask)
    other = agent.decide(agent.encode(telemetry[:, :, order], requests), mask)
    assert torch.allclose(plain.changes[:, order], other.changes, atol=1e-5)


def test_a_saved_agent_is_the_same_when_loaded(tmp_path: Path) -> None:
    store, policy = Store(str(tmp_path)).open_or_create(), _policy()
    policy.save(store, "v1", {"seed": 0})
    loaded = BidrlPolicy.load(store, "v1")
    ran, again = (total(run(_engine(), one, 20)) for one in (policy, loaded))
    assert all(torch.equal(a, b) for a, b in zip(vars(ran).values(), vars(again).values(), strict=True))
    assert loaded.scales == Scales.of(_engine().cluster)
    assert store.read_json("models/bidrl/v1/manifest.json")["seed"] == 0
    assert not [name for name in store.list("models") if name.endswith((".pkl", ".pt"))]


def test_an_agent_that_is_not_there_and_one_of_other_nodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"models/bidrl/v1/config.json: expected an object of agent"):
        BidrlPolicy.load(Store(str(tmp_path)).open_or_create(), "v1")
    with pytest.raises(InputError, match=r"3 classes of nodes, expected the agent's 2"):
        BidrlPolicy(Agent(AgentOptions(zones=2)), Scales.of(generate(_CLUSTER)))

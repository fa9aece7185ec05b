"""Training: better than nothing, resumable, the same wherever experience is collected, smoother if asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.bidrl.collect import InProcess
from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.bidrl.train import TrainOptions, advantages, collectors, smoothness, train
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.environment import EnvironmentOptions, Environments
from fleetcast.control.features import Scales
from fleetcast.control.interface import Policy, run, total
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.control.traffic import Traffic
from fleetcast.store import Store

from tests.control.policies import Keep

_AGENT = AgentOptions(window=4, patch=2, latent=8, hidden=16)
_OPTIONS = TrainOptions(
    decisions=4 * 8 * 16,
    environments=8,
    collectors=2,
    environment=EnvironmentOptions(step=5, episode=16),
    batch=8,
    stretch=4,
    epochs=2,
)


@pytest.fixture(scope="module")
def small() -> tuple[Cluster, Traffic]:
    cluster = generate(ClusterOptions(services=4, classes=1, rate=200, max_replicas=6, utilisation=0.9))
    options = traffic.TrafficOptions(patterns=("sine",), hours=1, period=1)
    return cluster, traffic.generate(options, cluster, 4)


def _trained(options: TrainOptions, small: tuple[Cluster, Traffic], folder: Path, **more: object) -> Agent:
    store = Store(str(folder)).open_or_create()
    return train(options, _AGENT, *small, store, "_work/bidrl", **more)  # type: ignore[arg-type]


def _same(first: Agent, second: Agent) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reinforcement_alone_beats_doing_nothing(small: tuple[Cluster, Traffic], tmp_path: Path) -> None:
    longer = EnvironmentOptions(step=5, episode=40)
    options = _OPTIONS.model_copy(
        update={
            "decisions": 16 * 40 * 16,
            "environments": 16,
            "environment": longer,
            "rate": 3e-3,
            "epochs": 4,
        }
    )
    agent = _trained(options, small, tmp_path)

    def reward(policy: Policy) -> float:
        cluster, rates = small
        of = Environments(cluster, rates, longer, 4).reward
        outcomes = run(FluidEngine(cluster, rates, step=5, seed=9), policy, 120)
        return float(torch.stack([of(one) for one in outcomes]).mean())

    assert reward(BidrlPolicy(agent, Scales.of(small[0]))) > reward(Keep()) + 0.05


class _Killed(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one(small: tuple[Cluster, Traffic], tmp_path: Path) -> None:
    def die(iteration: int) -> None:
        if iteration in (1, 3):
            raise _Killed

    whole = _trained(_OPTIONS, small, tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(_Killed):
            _trained(_OPTIONS, small, tmp_path / "killed", on_iteration=die)
    assert _same(whole, _trained(_OPTIONS, small, tmp_path / "killed"))
    assert not _same(whole, _trained(_OPTIONS.model_copy(update={"seed": 1}), small, tmp_path / "other"))


def test_actors_collect_what_one_process_collects(small: tuple[Cluster, Traffic], ray_cluster: None) -> None:
    from fleetcast.control.bidrl.rollouts import Distributed

    agent = Agent(_AGENT)
    parts = collectors(_OPTIONS, _AGENT, *small)
    actors = Distributed(parts, _AGENT)
    here, there = (one.collect(agent, (1, 2)) for one in (InProcess(parts), actors))
    actors.close()
    assert here.reward.shape == (8, 16)
    for name, value in vars(here).items():
        assert torch.equal(value, getattr(there, name)), name


def test_nothing_forbidden_is_chosen_and_a_service_pays_for_its_own_replicas(
    small: tuple[Cluster, Traffic],
) -> None:
    parts = collectors(_OPTIONS, _AGENT, *small)
    rollout = InProcess(parts).collect(Agent(_AGENT), (1, 2))
    assert rollout.mask.gather(3, rollout.change.unsqueeze(3)).all()
    prices = 0.5 * torch.tensor(small[0].cores / (small[0].max_replicas @ small[0].cores)).float()
    grown = rollout.change[:, 0] == _AGENT.changes.index(1)
    assert grown.any()
    others = (rollout.credit - rollout.reward.unsqueeze(2)).sum(2)[:, 0]
    wanted = torch.tensor(small[0].initial) + torch.tensor(_AGENT.changes)[rollout.change[:, 0]]
    assert torch.allclose(others, 3 * (prices * wanted).sum(1), atol=1e-5)


def test_the_smoothness_term_brings_consecutive_latent_states_together(
    small: tuple[Cluster, Traffic], tmp_path: Path
) -> None:
    distances = []
    for weight in (0.0, 10.0):
        options = _OPTIONS.model_copy(update={"smoothness": weight})
        agent = _trained(options, small, tmp_path / str(weight))
        parts = collectors(_OPTIONS, _AGENT, *small)
        seen = InProcess(parts).collect(agent, (7,))
        windows = seen.telemetry.unfold(1, 4, 1).movedim(-1, 2), seen.requests.unfold(1, 4, 1).movedim(-1, 2)
        z = agent.encode(*(one.flatten(0, 1) for one in windows)).unflatten(0, (8, 16))
        distances.append(float(smoothness(z)) / float(z.var()))
    assert distances[1] < 0.8 * distances[0]


def test_an_agent_that_has_learned_nothing_does_as_its_rule(small: tuple[Cluster, Traffic]) -> None:
    cluster, rates = small
    rule = KubernetesOptions(target=45)
    torch.manual_seed(0)
    policy = BidrlPolicy(Agent(_AGENT.model_copy(update={"rule": rule})), Scales.of(cluster))
    untaught, told = (
        total(run(FluidEngine(cluster, rates, step=5, seed=9), one, 60))
        for one in (policy, KubernetesPolicy(rule))
    )
    assert torch.equal(untaught.replica_seconds, told.replica_seconds)
    assert (told.changes > 0).all()


def test_advantages_by_hand() -> None:
    credit, value = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.5], [1.0], [3.0]]])
    last = 2 + 0.9 * 3 - 1
    first = 1 + 0.9 * 1 - 0.5
    found = advantages(credit, value, 0.9, 0.8)
    assert found.flatten().tolist() == pytest.approx([first + 0.9 * 0.8 * last, last])

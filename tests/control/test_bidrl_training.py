"""Training: better than nothing, resumable, the same wherever experience is collected, smoother if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
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


def test_reinforcement_alone_improves_on_a_wasteful_rule(tmp_path: Path) -> None:
    cluster = generate(ClusterOptions(services=4, classes=1, rate=400, max_replicas=16))
    rates = traffic.generate(
        traffic.TrafficOptions(patterns=("sine",), hours=1, period=1), cluster, environments=4
    )
    rule = KubernetesOptions(metric="rate", target=25)
    longer = EnvironmentOptions(step=5, episode=40)
    options = _OPTIONS.model_copy(
        update={
            "decisions": 16 * 40 * 30,
            "environments": 16,
            "environment": longer,
            "batch": 32,
            "rate": 5e-3,
            "epochs": 4,
        }
    )
    built = _AGENT.model_copy(update={"rule": rule})
    agent = train(options, built, cluster, rates, Store(str(tmp_path)).open_or_create(), "_work/bidrl")

    def judged(policy: Policy) -> tuple[float, float]:
        of = Environments(cluster, rates, longer, 4).reward
        outcomes = run(FluidEngine(cluster, rates, step=5, seed=9), policy, 120)
        reward = torch.stack([of(one) for one in outcomes]).mean()
        return float(reward), float(total(outcomes).cpu_allocated.sum())

    (ours, cost), (theirs, before) = (
        judged(one) for one in (BidrlPolicy(agent, Scales.of(cluster)), KubernetesPolicy(rule))
    )
    assert ours > theirs + 0.015
    assert cost < 0.95 * before


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


def test_nothing_forbidden_is_chosen_and_credits_add_up_to_the_reward(
    small: tuple[Cluster, Traffic],
) -> None:
    parts = collectors(_OPTIONS, _AGENT, *small)
    rollout = InProcess(parts).collect(Agent(_AGENT), (1, 2))
    assert rollout.mask.gather(3, rollout.change.unsqueeze(3)).all()
    # A replica that is wanted costs from its place on a node on, so that the sums differ by starts and ends.
    together = 1 + rollout.credit.sum(2)
    assert torch.allclose(together.mean(), rollout.reward.mean(), atol=0.02)
    assert (rollout.credit < 0).all()


def test_a_slow_service_is_to_blame_for_what_users_lost() -> None:
    cluster = generate(ClusterOptions(services=4, classes=1, rate=50, max_replicas=6))
    slow = replace(cluster, demand=np.where(np.arange(4) == 1, 3, 1) * cluster.demand)
    rates = traffic.generate(traffic.TrafficOptions(patterns=("sine",), hours=1, period=1), slow, 4)
    credit = collectors(_OPTIONS, _AGENT, slow, rates)[0].collect(Agent(_AGENT), (1,)).credit.mean((0, 1))
    assert credit.argmin() == 1
    assert credit[1] < 2 * credit.sort().values[1]


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

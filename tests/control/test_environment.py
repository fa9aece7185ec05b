"""The reinforcement-learning environment keeps Gymnasium's contract, its seeds, its masks and the reward."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from fleetcast.control import traffic
from fleetcast.control.cluster import ClusterOptions, generate
from fleetcast.control.environment import ClusterEnv, EnvironmentOptions, Environments
from fleetcast.control.features import Scales, Window
from fleetcast.control.policies.kubernetes import KubernetesOptions
from fleetcast.control.traffic import TrafficOptions
from fleetcast.errors import InputError
from gymnasium.utils.env_checker import check_env

_CLUSTER = ClusterOptions(services=6, rate=100, max_replicas=4)
_TRAFFIC = TrafficOptions(hours=0.2)
_OPTIONS = EnvironmentOptions(episode=8, window=4)


@pytest.mark.parametrize("engine", ["fluid", "events"])
def test_gymnasiums_own_check(engine: str) -> None:
    environment = ClusterEnv(_CLUSTER, _TRAFFIC, _OPTIONS.model_copy(update={"engine": engine}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(environment, skip_render_check=True)


def _environments(count: int = 3) -> Environments:
    cluster = generate(_CLUSTER)
    return Environments(cluster, traffic.generate(_TRAFFIC, cluster, 2), _OPTIONS, count)


def _zero(environments: Environments) -> torch.Tensor:
    shape = (environments.environments, len(environments.cluster.names))
    return torch.full(shape, _OPTIONS.changes.index(0))


def test_an_episode_ends_after_its_decisions_and_repeats_by_its_seed() -> None:
    environments = _environments()

    def episode(seed: int) -> list[torch.Tensor]:
        seen = [environments.reset(seed)["telemetry"]]
        for number in range(_OPTIONS.episode):
            now, reward, over, _ = environments.step(_zero(environments))
            assert over == (number == _OPTIONS.episode - 1)
            seen += [now["telemetry"], reward]
        return seen

    first, again, other = episode(1), episode(1), episode(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1], other[-1])


def test_telemetry_begins_unknown_and_comes_after_its_lag() -> None:
    environments = _environments()
    seen = environments.reset(0)["telemetry"]
    assert seen[:, :, :, 0].sum() == 0
    lag = round(environments.cluster.measure.lag / environments.cluster.measure.interval)
    for _ in range(lag + 1):
        assert seen[:, -1, :, 0].sum() == 0
        seen = environments.step(_zero(environments))[0]["telemetry"]
    assert seen[:, -1, :, 0].mean() > 0.8


def test_a_mask_forbids_what_the_bounds_would_cut_off() -> None:
    environments = _environments()
    environments.reset(0)
    grow = torch.full_like(_zero(environments), len(_OPTIONS.changes) - 1)
    for _ in range(4):
        environments.step(grow)
    mask = environments.mask()  # all have 4 replicas, of 2 to 4
    for number, change in enumerate(_OPTIONS.changes):
        assert bool(mask[:, :, number].all()) == bool(mask[:, :, number].any()) == (change <= 0)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (KubernetesOptions(), ([2, 3, 6, 12], [2, 4, 9, 18], [2, 4, 10, 20], [3, 5, 12, 23])),
        (None, ([1, 2, 6, 12], [1, 3, 9, 18], [2, 4, 10, 20], [3, 5, 12, 23])),
    ],
)
def test_changes_are_shares_of_a_rules_replicas_or_at_least_one(rule, expected) -> None:
    window = Window(Scales.of(generate(_CLUSTER)), 4, (-0.4, -0.1, 0.0, 0.15), rule)
    window.base = torch.tensor([[2.0, 4.0, 10.0, 20.0]])
    for place, replicas in enumerate(expected):
        assert window.changed(torch.full((1, 4), place)).tolist() == [replicas]


def test_the_reward_is_the_papers_by_its_three_weights() -> None:
    environments = _environments(1)
    environments.reset(0)
    outcome = environments.step(_zero(environments))[3]
    share, cluster = environments.cluster.share, environments.cluster
    throughput = float(outcome.good / outcome.offered)
    latency = float(outcome.latency / outcome.answered) / float(share @ cluster.deadline)
    cost = float(outcome.cpu_allocated) / (15 * float(cluster.max_replicas @ cluster.cores))
    assert 0 < latency < 1
    assert float(environments.reward(outcome)) == pytest.approx(throughput - latency / 2 - cost / 2, rel=1e-5)


def test_the_call_graph_is_given_as_edges() -> None:
    environments = _environments()
    assert environments.edges.shape == (2, len(environments.edge_weights))
    assert (environments.edges[0] < environments.edges[1]).all()
    assert np.isclose(
        float(environments.edge_weights[0]), environments.cluster.share @ environments.cluster.calls[:, 0]
    )


def test_traffic_that_is_shorter_than_an_episode_is_refused() -> None:
    cluster = generate(_CLUSTER)
    rates = traffic.generate(TrafficOptions(hours=0.02), cluster)
    with pytest.raises(InputError, match=r"traffic of 70 s, expected .* 8 decisions: 120 s"):
        Environments(cluster, rates, _OPTIONS, 1)

"""Correlation edges: from what moves first to what follows."""

from datetime import UTC, datetime

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.graphs import correlation

NINE = datetime(2018, 1, 1, 9, tzinfo=UTC)


def walk(steps: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, columns)).cumsum(axis=0).astype(np.float32)


def delayed(lag: int = 2) -> np.ndarray:
    """a, b = a delayed, c = −a delayed, d = something else."""
    a, d = walk(400, 2).T
    b = np.roll(a, lag)
    return np.stack([a, b, -b, d], axis=1)[lag:]


def pairs(edges):
    return dict(zip(zip(edges["source"], edges["target"], strict=True), edges["weight"], strict=True))


def test_the_leader_is_the_source_and_the_follower_the_target():
    found = pairs(correlation.edges(delayed(), ["a", "b", "c", "d"], NINE, lag=2))
    assert found == {("a", "b"): pytest.approx(1, abs=0.02)}


def test_a_shared_daily_cycle_joins_nothing():
    cycle = 5 * np.sin(np.arange(600) / 288 * 2 * np.pi)[:, None]
    noise = np.random.default_rng(1).normal(size=(600, 6))
    assert correlation.edges((cycle + noise).astype(np.float32), list("abcdef"), NINE).is_empty()


def test_each_target_keeps_its_k_strongest_sources():
    leader = walk(500, 1)
    noise = np.random.default_rng(2).normal(size=(500, 6)) * np.linspace(0.1, 0.6, 6)
    sources = leader + noise
    follower = np.roll(leader, 1, axis=0)
    values = np.concatenate([sources, follower], axis=1)[1:].astype(np.float32)
    found = correlation.edges(values, [*"abcdef", "z"], NINE, k=2, minimum=0.1)
    assert found.filter(target="z")["source"].to_list() == ["a", "b"]
    assert found.group_by("target").len()["len"].max() <= 2


def test_columns_that_are_constant_empty_or_a_straight_line_have_no_edges():
    line = np.linspace(0, 1, 398, dtype=np.float32)
    still = np.stack([np.full(398, 0.3), np.full(398, np.nan), line, line + 1], axis=1)
    values = np.concatenate([delayed(), still], axis=1).astype(np.float32)
    found = pairs(correlation.edges(values, list("abcdefgh"), NINE, lag=2, minimum=0.0))
    assert not {name for pair in found for name in pair} & set("efgh")


def test_missing_values_weaken_an_edge_and_never_make_one():
    values = delayed()
    values[100:200, 0] = np.nan
    full, gappy = (pairs(correlation.edges(v, list("abcd"), NINE, lag=2)) for v in (delayed(), values))
    assert set(gappy) == set(full)
    assert 0.6 < gappy["a", "b"] < full["a", "b"]
    values[5:, 0] = np.nan
    assert ("a", "b") not in pairs(correlation.edges(values, list("abcd"), NINE, lag=2))


def test_blocks_of_targets_give_what_one_block_gives(monkeypatch):
    values = walk(60, 23)
    names = [f"m{i:02}" for i in range(23)]
    whole = correlation.edges(values, names, NINE, k=3, minimum=0.05)
    monkeypatch.setattr(correlation, "_BLOCK", 5)
    parts = correlation.edges(values, names, NINE, k=3, minimum=0.05)
    assert whole.height == 23 * 3
    assert parts.drop("weight").equals(whole.drop("weight"))
    assert np.allclose(parts["weight"], whole["weight"], atol=1e-6)


@pytest.mark.parametrize("wrong", [{"names": ["a"]}, {"lag": -1}, {"lag": 396}])
def test_what_does_not_fit_together_is_an_error(wrong):
    with pytest.raises(InputError, match="expected"):
        correlation.edges(delayed(), **{"names": list("abcd"), "time": NINE} | wrong)

"""Decisions: the policy's own where nothing is against it, the rule's where something is."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.deployment.broker import RedisStreams
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.decider import KILLED, STALE, Decider, DeciderOptions
from fleetcast.control.deployment.messages import Description, Entry
from fleetcast.control.deployment.simulated import play
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import run, total
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.errors import InputError
from fleetcast.store import Store


@pytest.fixture
def store(about: Description, tmp_path) -> Store:
    found = Store(str(tmp_path / "store")).open_or_create()
    torch.manual_seed(1)
    agent = Agent(AgentOptions(zones=len(about.zones), window=4, latent=8, hidden=16))
    BidrlPolicy(agent, about.scales).save(found, "v1")
    return found


@pytest.fixture
def by_agent(about: Description, store: Store) -> Decider:
    return Decider(about, DeciderOptions(policy="bidrl", agent="v1", wait=None), store)


def answers(decider: Decider, bodies: list[bytes], killed: bool = False) -> list[Entry]:
    found = [decider.answer(f"{n}-0", body, killed) for n, body in enumerate(bodies)]
    assert all(isinstance(one, Entry) for one in found)
    return found  # type: ignore[return-value]


def test_a_cluster_told_over_the_stream_does_as_one_with_the_rule_inside(
    broker: RedisStreams, engine: Callable[[], FluidEngine], about: Description
) -> None:
    rule = KubernetesOptions(target=40)
    consumer = Consumer(broker, Decider(about, DeciderOptions(mode="act", rule=rule)))
    thread = consumer.start()
    outcomes = play(broker, engine(), about, 40)
    consumer.stop()
    thread.join()
    inside = run(engine(), KubernetesPolicy(rule), 40)
    np.testing.assert_allclose(total(outcomes).cpu_used, total(inside).cpu_used)
    np.testing.assert_allclose(total(outcomes).replica_seconds, total(inside).replica_seconds)
    assert total(outcomes).changes > 0


def test_nobody_who_decides_is_an_error_that_says_so(
    broker: RedisStreams, engine: Callable[[], FluidEngine], about: Description
) -> None:
    with pytest.raises(InputError, match=r"no action came within 0.01 s of scrape .*; does a consumer run"):
        play(broker, engine(), about, 1, wait=0.01)


def test_an_agents_wishes_are_its_own_in_a_process(
    by_agent: Decider, about: Description, store: Store, scrapes: list[bytes]
) -> None:
    alone = BidrlPolicy.load(store, "v1")
    alone.begin()
    from fleetcast.control.deployment.messages import Scrape

    for entry, body in zip(answers(by_agent, scrapes[:10]), scrapes, strict=False):
        seen, _ = Scrape.model_validate_json(body).observation(about)
        wish = alone.act(seen)
        assert [a.proposed for a in entry.actions] == wish.replicas[0].int().tolist()
        assert wish.routing is not None
        np.testing.assert_allclose([a.weights for a in entry.actions], wish.routing[0], atol=1e-4)
        assert entry.latent_age == 0
        assert entry.fallback is None


def test_the_kill_switch_leaves_the_rule_alone(by_agent: Decider, scrapes: list[bytes]) -> None:
    for entry in answers(by_agent, scrapes[:5], killed=True):
        assert entry.fallback == KILLED
        assert all(a.replicas == a.reactive for a in entry.actions)
        assert all(a.weights == () and not a.restart for a in entry.actions)


def test_a_slow_encoder_does_not_hold_decisions_up_and_its_states_grow_old(
    about: Description, store: Store, scrapes: list[bytes]
) -> None:
    """The interval is 15 s; states of up to 30 s may be used."""
    options = DeciderOptions(policy="bidrl", agent="v1", wait=0.001, latent_age=30)
    decider = Decider(about, options, store)
    first = answers(Decider(about, options.model_copy(update={"wait": None}), store), scrapes[:1])
    assert first[0].fallback is None
    go, policy = threading.Event(), decider.policy
    assert policy is not None
    encode = policy.encode

    def slow(seen):
        go.wait()
        return encode(seen)

    policy.encode = slow
    nothing = answers(decider, scrapes[:1])[0]
    assert (nothing.fallback, nothing.latent_age) == (STALE, None)
    go.set()
    assert decider._encoding is not None
    decider._encoding.result()
    go.clear()
    found = answers(decider, scrapes[1:5])
    assert [one.latent_age for one in found] == [15, 30, 45, 60]
    assert [one.fallback for one in found] == [None, None, STALE, STALE]
    go.set()


def test_an_agent_that_is_not_there_is_named(about: Description, store: Store) -> None:
    with pytest.raises(InputError, match="policy bidrl: expected the version of an agent"):
        Decider(about, DeciderOptions(policy="bidrl"), store)
    with pytest.raises(InputError, match=r"models/bidrl/v2/config.json"):
        Decider(about, DeciderOptions(policy="bidrl", agent="v2"), store)

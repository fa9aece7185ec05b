"""A consumer that is killed: no action is lost or given twice, and all are what they would have been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filling import fill
from fleetcast.control.bidrl.model import Agent, AgentOptions
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.deployment.broker import Moved, RedisStreams
from fleetcast.control.deployment.consumer import Consumer
from fleetcast.control.deployment.decider import Decider, DeciderOptions
from fleetcast.control.deployment.messages import Description, Entry
from fleetcast.control.policies.kubernetes import KubernetesOptions
from fleetcast.control.policies.limits import Behaviour
from fleetcast.store import Store

PROGRAM = Path(__file__).with_name("killed_consumer.py")
WRONG = b'{"time": 5, "services": []}'


@pytest.fixture(scope="module")
def store(about: Description, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An agent that knows nothing, above a rule that remembers longer than the one underneath."""
    found = Store(str(tmp_path_factory.mktemp("agent"))).open_or_create()
    torch.manual_seed(0)
    down = Behaviour().down.model_copy(update={"window": 1200.0})
    rule = KubernetesOptions(metric="rate", target=25, behaviour=Behaviour(down=down))
    agent = Agent(AgentOptions(zones=len(about.zones), window=8, latent=8, hidden=16, rule=rule))
    with torch.no_grad():
        for weights in agent.parameters():
            weights += 0.3 * torch.randn_like(weights)
    BidrlPolicy(agent, about.scales).save(found, "v1")
    return found


OPTIONS = DeciderOptions(policy="bidrl", agent="v1", mode="act", wait=None, rule=KubernetesOptions(target=40))


def test_killed_again_and_again_it_gives_the_actions_of_one_that_was_not(
    broker: RedisStreams, redis_url: str, about: Description, scrapes: list[bytes], store: Store,
    tmp_path: Path,
) -> None:  # fmt: skip
    bodies = [*scrapes[:50], WRONG, *scrapes[50:]]
    cluster = tmp_path / "cluster.json"
    cluster.write_text(about.model_dump_json())
    told = OPTIONS.model_dump_json()
    command = [sys.executable, str(PROGRAM), redis_url, broker.prefix, str(cluster), told, store.uri]
    random = np.random.default_rng(3)
    offsets: list[str] = []
    for some in (bodies[:40], bodies[40:80], bodies[80:]):
        offsets += fill(broker, some)
        process = subprocess.Popen(command)
        done = len(broker.actions())
        after = done + int(random.integers(10, 35)) if len(offsets) < len(bodies) else len(scrapes)
        while len(broker.actions()) < after:
            assert process.poll() is None, "it goes on until it is killed"
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    undisturbed = _answers(Decider(about, OPTIONS, store), offsets, bodies)
    given = broker.actions()
    assert [offset for offset, _ in given] == [o for o, b in zip(offsets, bodies, strict=True) if b != WRONG]
    assert [Entry.model_validate_json(body) for _, body in given] == undisturbed
    assert [offset for offset, _ in broker.rejected()] == [offsets[50]]
    assert any(a.replicas != a.before for entry in undisturbed for a in entry.actions)


@pytest.mark.parametrize("wanted", [None, 8], ids=["as it was", "what both rules would take away"])
def test_what_a_decision_depends_on_is_seen_again(
    about: Description, scrapes: list[bytes], store: Store, wanted: int | None
) -> None:
    if wanted is not None:
        scrapes = [json.dumps(json.loads(one) | {"wanted": [wanted] * 6}).encode() for one in scrapes]
    offsets = [f"{n}-0" for n in range(len(scrapes))]
    decider = Decider(about, OPTIONS, store)
    expected = _answers(decider, offsets, scrapes)
    for at in (1, 50, 80, 100):
        again = Decider(about, OPTIONS, store)
        again.replay(scrapes[max(0, at - again.memory) : at])
        assert _answers(again, offsets[at:], scrapes[at:]) == expected[at:]


def _answers(decider: Decider, offsets: list[str], bodies: list[bytes]) -> list[Entry]:
    found = [decider.answer(offset, body, False) for offset, body in zip(offsets, bodies, strict=True)]
    return [one for one in found if isinstance(one, Entry)]


def test_of_two_consumers_one_answers_for_a_message(
    broker: RedisStreams, about: Description, scrapes: list[bytes]
) -> None:
    first, second = (Consumer(broker, Decider(about, DeciderOptions())) for _ in range(2))
    fill(broker, scrapes[:3])
    assert first.step(0.01) == 3
    with pytest.raises(Moved):
        second.step(0.01)
    assert len(broker.actions()) == 3
    second.rehydrate()
    fill(broker, scrapes[3:4])
    assert second.step(0.01) == 1
    assert len(broker.actions()) == 4


def test_a_new_consumer_knows_the_last_action_and_the_kill_switch(
    broker: RedisStreams, about: Description, scrapes: list[bytes]
) -> None:
    consumer = Consumer(broker, Decider(about, DeciderOptions()))
    fill(broker, scrapes[:2])
    consumer.step(0.01)
    broker.kill(True)
    again = Consumer(broker, Decider(about, DeciderOptions()))
    assert again.last == consumer.last
    fill(broker, scrapes[2:3])
    again.step(0.01)
    assert again.last is not None
    assert again.last.fallback == "the kill switch is on"

"""From scrapes to actions: the window that the encoder sees, latent states, the policy, the rule underneath.

    decider = Decider(description, options)
    decider.replay(bodies)                    # what came before, to have the same windows again
    answer = decider.answer(offset, body)     # an Entry, or why the message cannot be used

Decisions depend on the last messages alone, and on no clock, so the same messages give the same actions. The
encoder runs in a thread of its own; a decision waits for it for a moment, and rests on the latent states that
are there.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.deployment.messages import Description, Entry, Mode, Scrape, ServiceAction, read_scrape
from fleetcast.control.deployment.safety import SafetyOptions, guard
from fleetcast.control.interface import Action, Observation
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.errors import InputError
from fleetcast.store import Store

#: Reasons for which the reactive rule decides alone.
KILLED, STALE = "the kill switch is on", "latent states are too old"
#: Strangers that are told apart.
_STRANGERS = 1000
#: Why a message is not used.
REPEATED = "not newer than the last one"


class DeciderOptions(Options):
    """Who decides."""

    policy: Literal["rule", "bidrl"] = "rule"
    """The reactive rule alone, or a learned agent above it."""
    agent: str | None = None
    """Version of the agent: `models/bidrl/<version>` of the store."""
    mode: Mode = "observe"
    """observe: actions are recorded and given to nobody. recommend: they are given to people. act: also to
    KEDA and the router."""
    rule: KubernetesOptions = KubernetesOptions()
    """The reactive rule underneath."""
    safety: SafetyOptions = SafetyOptions()
    wait: float | None = Field(0.03, gt=0)
    """How long a decision waits for the encoder [s]; for as long as it takes if None."""
    latent_age: float = Field(60, gt=0)
    """Latent states that are older do not count [s]."""


@dataclass(frozen=True)
class Latent:
    """What the encoder made of a window."""

    z: Tensor
    """[1, S, D]."""
    time: float
    """Of the scrape that it ends with."""


class Decider:
    """One cluster's decisions, one after the other."""

    def __init__(self, about: Description, options: DeciderOptions, store: Store | None = None) -> None:
        """Raises InputError if the agent is missing or does not fit the cluster."""
        self.about, self.options = about, options
        self.policy: BidrlPolicy | None = None
        if options.policy == "bidrl":
            if options.agent is None or store is None:
                raise InputError("policy bidrl: expected the version of an agent, and the store that has it")
            loaded = BidrlPolicy.load(store, options.agent)
            self.policy = BidrlPolicy(loaded.agent, about.scales)
        self.strangers: Counter[str] = Counter()
        """Services in scrapes that are not of the cluster."""
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._least = np.array(about.scales.least)
        self._most = np.array(about.scales.most)
        self.begin()

    def begin(self) -> None:
        """Forgets all that was seen."""
        self._rule = KubernetesPolicy(self.options.rule)
        scales = self.about.scales
        self._rule.begin(torch.tensor(scales.least), torch.tensor(scales.most), torch.tensor(scales.capacity))
        self._last = -np.inf
        self.latent: Latent | None = None
        self._encoding: Future[None] | None = None
        if self.policy is not None:
            self.policy.begin()

    @property
    def memory(self) -> int:
        """Messages on which a decision may depend: those of a rule's windows, which depend on as many before
        them, and those of the encoder's, of which each knows what the agent's own rule wanted."""

        def of(rule: KubernetesOptions | None) -> int:
            seconds = 0 if rule is None else rule.behaviour.memory
            return 2 * int(np.ceil(seconds / self.about.interval)) + 2

        if self.policy is None:
            return of(self.options.rule)
        agent = self.policy.agent.options
        return max(of(self.options.rule), of(agent.rule) + agent.window)

    def replay(self, bodies: list[bytes]) -> None:
        """Sees what was seen before, and gives no action."""
        self.begin()
        for body in bodies:
            self.answer("", body, killed=False)
        if self._encoding is not None:
            self._encoding.result()

    def answer(self, offset: str, body: bytes, killed: bool) -> Entry | str:
        """The actions that a message leads to, or in one line why it cannot be used."""
        scrape = read_scrape(body)
        if isinstance(scrape, str):
            return scrape
        if scrape.time <= self._last:
            return REPEATED
        try:
            seen, strangers = scrape.observation(self.about)
        except ValueError as error:
            return str(error)
        self._last = scrape.time
        if len(self.strangers) < _STRANGERS:
            self.strangers.update(strangers)
        self._encode(seen)
        reactive = self._rule.act(seen).replicas
        proposed, fallback = self._propose(seen, killed)
        return self._entry(offset, scrape, seen, reactive, proposed, fallback)

    def _encode(self, seen: Observation) -> None:
        """Begins to make latent states of the window that ends now."""
        policy = self.policy
        if policy is None:
            return
        window = policy.see(seen)

        def work() -> None:
            self.latent = Latent(policy.encode(window), seen.time)

        self._encoding = self._encoder.submit(work)

    def _propose(self, seen: Observation, killed: bool) -> tuple[Action | None, str | None]:
        """What the policy would have, or why it is not asked."""
        if self.policy is None or self._encoding is None:
            return None, KILLED if killed else None
        with contextlib.suppress(TimeoutError):  # the states that are there count, for as long as they may
            self._encoding.result(self.options.wait)
        if killed:
            return None, KILLED
        if self.latent is None or seen.time - self.latent.time > self.options.latent_age:
            return None, STALE
        return self.policy.decide(self.latent.z), None

    def _entry(
        self,
        offset: str,
        scrape: Scrape,
        seen: Observation,
        reactive: Tensor,
        proposed: Action | None,
        fallback: str | None,
    ) -> Entry:
        before, by_rule = (one[0].round().long().numpy() for one in (seen.wanted, reactive))
        wish = by_rule if proposed is None else proposed.replicas[0].round().long().numpy()
        replicas, reasons = guard(self.options.safety, before, wish, by_rule, self._least, self._most)
        known = set(scrape.services) - scrape.unknown
        routing = None if proposed is None or proposed.routing is None else proposed.routing[0].tolist()
        restart = None if proposed is None or proposed.restart is None else proposed.restart[0].tolist()
        actions = tuple(
            ServiceAction(
                service=name,
                before=int(before[n]),
                replicas=int(replicas[n]),
                proposed=int(wish[n]),
                reactive=int(by_rule[n]),
                reasons=tuple(reasons[n]),
                weights=() if routing is None else tuple(round(one, 4) for one in routing[n]),
                restart=bool(restart and restart[n]),
            )
            for n, name in enumerate(self.about.services)
            if name in known
        )
        latent = None if self.policy is None or self.latent is None else seen.time - self.latent.time
        return Entry(
            id=offset,
            time=scrape.time,
            mode=self.options.mode,
            policy=self.options.policy,
            latent_age=latent,
            fallback=fallback,
            actions=actions,
        )

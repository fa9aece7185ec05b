"""What the experiments share: a cluster, traffic to train on and traffic that nobody has seen, calibrated
rules and trained agents.

    setting = Setting(options, store)
    setting.make(["H-Auto, calibrated", "bidrl"])   # what is not in the store yet, side by side
    policy, truth = setting.policy("bidrl")         # for all seeds' environments

What takes minutes is kept in the store under a digest of all that it depends on, so that an experiment that
was stopped goes on, and another one finds what it needs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fleetcast.config import Options
from fleetcast.control import traffic
from fleetcast.control.bidrl.model import AgentOptions
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.bidrl.rollouts import Distributed
from fleetcast.control.bidrl.train import TrainOptions, collectors, train
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.environment import Environments
from fleetcast.control.features import Scales
from fleetcast.control.interface import Action, Observation, Outcome, Policy
from fleetcast.control.measures import figures, judge
from fleetcast.control.policies import translb
from fleetcast.control.policies.calibrate import (
    CalibrateOptions,
    calibrate,
    draw_forecast,
    draw_kubernetes,
    draw_staffing,
    draw_translb,
)
from fleetcast.control.policies.forecast_driven import (
    Clairvoyant,
    Forecast,
    ForecastOptions,
    ForecastPolicy,
    LastValue,
    LstmForecast,
    LstmOptions,
    PublishedQuantile,
    SameTimeYesterday,
)
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.control.policies.staffing import StaffingOptions, StaffingPolicy
from fleetcast.control.policies.translb import TranslbOptions, TranslbPolicy
from fleetcast.control.traffic import HOUR, Traffic, TrafficOptions
from fleetcast.errors import InputError
from fleetcast.runtime import spread
from fleetcast.store import Store, fingerprint

log = logging.getLogger("fleetcast")

#: Rules that are calibrated, each with the same budget.
DEFAULT, RULE, STAFFING = "H-Auto, default", "H-Auto, calibrated", "square-root staffing"
TRANSLB = "TransLB"
LAST, YESTERDAY, PUBLISHED = "last value", "same time yesterday", "published quantile"
LSTM, CLAIRVOYANT = "LSTM-Auto", "clairvoyant bound"
CALIBRATED = (RULE, STAFFING, TRANSLB, LAST, YESTERDAY, PUBLISHED, LSTM, CLAIRVOYANT)
#: Agents, with as much experience as the rules' calibration: with a representation of the window, without it,
#: and without the term for it.
BIDRL, RL_SCHED, ROUGH = "bidrl", "RL-Sched", "bidrl without smoothness"
AGENTS = (BIDRL, RL_SCHED, ROUGH)


#: What is provisioned of a published forecast.
_QUANTILE = 0.95


class ExperimentOptions(Options):
    """The setting of all experiments."""

    cluster: ClusterOptions = ClusterOptions()
    training: TrafficOptions = TrafficOptions(hours=2, period=1)
    """A day is an hour here, so that there is a yesterday."""
    held_out: TrafficOptions = TrafficOptions(hours=3, period=1, seed=1000)
    seeds: int = Field(5, ge=2)
    """Agents of each kind, and stretches of held-out traffic, each with all of its patterns."""
    decisions: int = Field(100_000, ge=1)
    """Of the simulated cluster: what the calibration of a rule costs, and the training of an agent."""
    variety: int = Field(12, ge=1)
    """Training traffic of so many environments; all patterns in turn."""
    agent: AgentOptions = AgentOptions()
    """Its rule is the calibrated one."""
    train: TrainOptions = TrainOptions()
    """Its seed and decisions are those of the experiment."""
    rollouts: int = Field(0, ge=0)
    """Ray actors that collect an agent's experience; agents are then trained one after the other.
    0: agents are trained side by side, each with its own experience."""
    lstm: LstmOptions = LstmOptions()
    translb: TranslbOptions = TranslbOptions()
    step: float = Field(5, gt=0)
    """Of the simulator [s]."""


class Several:
    """A policy for each stretch of environments."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self._policies = policies

    def reset(self, cluster: Cluster, environments: int) -> None:
        """A new episode begins."""
        self._each = environments // len(self._policies)
        for one in self._policies:
            one.reset(cluster, self._each)

    def act(self, observation: Observation) -> Action:
        """All of them, side by side."""
        parts = [
            one.act(_rows(observation, slice(n * self._each, (n + 1) * self._each)))
            for n, one in enumerate(self._policies)
        ]

        def together(values: list[Tensor | None]) -> Tensor | None:
            known = [one for one in values if one is not None]
            return torch.cat(known) if known else None

        replicas = together([one.replicas for one in parts])
        assert replicas is not None
        return Action(replicas, together([p.routing for p in parts]), together([p.restart for p in parts]))


def _rows(seen: Observation, rows: slice) -> Observation:
    """Some environments of an observation."""
    parts: dict[str, Any] = {k: v[rows] if isinstance(v, Tensor) else v for k, v in vars(seen).items()}
    return Observation(**parts)


@dataclass(frozen=True)
class _Family:
    """Rules that differ in their options alone."""

    build: Callable[[Any], Policy]
    draw: Callable[[np.random.Generator], Any]
    default: Any
    truth: bool = False
    """Whether they may see it."""


@dataclass
class Setting:
    """One setting, and what has been made for it."""

    options: ExperimentOptions
    store: Store

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster."""
        return generate(self.options.cluster)

    @cached_property
    def training(self) -> Traffic:
        """What rules are calibrated and agents trained on."""
        return traffic.generate(self.options.training, self.cluster, self.options.variety)

    @cached_property
    def held_out(self) -> Traffic:
        """What all are judged on: seed after seed, each with every pattern."""
        count = self.options.seeds * len(self.options.held_out.patterns)
        return traffic.generate(self.options.held_out, self.cluster, count)

    # -- what takes minutes ----------------------------------------------------------------------------------

    def make(self, names: Sequence[str]) -> None:
        """Calibrates rules and trains agents that are not in the store yet, as Ray tasks side by side."""
        unknown = set(names) - {*CALIBRATED, *AGENTS, DEFAULT}
        if unknown:
            raise InputError(f"policies {', '.join(sorted(unknown))}: not known")
        agents = [one for one in AGENTS if one in names]
        # The calibrated rule first: agents and TransLB build on it.
        rules = [one for one in CALIBRATED if one in names or (one == RULE and (agents or TRANSLB in names))]
        rules = [one for one in rules if not self.store.exists(self._place(one))]
        self._spread([{"rule": one} for one in rules if one != TRANSLB])
        self._spread([{"rule": one} for one in rules if one == TRANSLB])
        wanted = [(one, seed) for seed in range(self.options.seeds) for one in agents]
        missing = [pair for pair in wanted if not self.store.exists(self._version(*pair))]
        if self.options.rollouts:
            for name, seed in missing:
                self.agent(name, seed)
        else:
            self._spread([{"agent": one, "seed": seed} for one, seed in missing])

    def _spread(self, items: list[dict[str, Any]]) -> None:
        def work(item: dict[str, Any]) -> dict[str, Any]:
            torch.set_num_threads(1)
            if "rule" in item:
                self.calibrated(item["rule"])
            else:
                self.agent(item["agent"], item["seed"])
            return {"rows": self.options.decisions}

        spread(items, work, "control: rules and agents", "decisions")

    def calibrated(self, name: str) -> Any:
        """A rule's options, the best of as many decisions on training traffic as an agent gets."""
        place = self._place(name)
        family = self._family(name)
        known = self.store.read_json(place)
        if known is None:
            objective = self.options.train.environment.model_copy(update={"step": self.options.step})
            told = CalibrateOptions(decisions=self.options.decisions, objective=objective)
            found = calibrate(
                family.build,
                family.draw,
                family.default,
                self.cluster,
                self.training,
                told,
                truth=family.truth,
            )
            known = found.best.model_dump(mode="json")
            self.store.write_json(place, known)
        return type(family.default).model_validate(known)

    def _family(self, name: str) -> _Family:
        """What is calibrated of a rule."""
        if name == RULE:
            return _Family(KubernetesPolicy, draw_kubernetes, KubernetesOptions())
        if name == STAFFING:
            return _Family(StaffingPolicy, draw_staffing, StaffingOptions())
        if name == TRANSLB:
            default = self.options.translb
            return _Family(self._translb, lambda random: draw_translb(random, default), default)
        forecast = self._forecast(name)
        return _Family(
            lambda one: ForecastPolicy(forecast(), one), draw_forecast, ForecastOptions(), forecast().truth
        )

    def _translb(self, options: TranslbOptions) -> TranslbPolicy:
        replicas = KubernetesPolicy(self.calibrated(RULE))
        return TranslbPolicy(self._balancer, replicas, options.exponent)

    @cached_property
    def _balancer(self) -> translb.AttentionBalancer:
        replicas = KubernetesPolicy(self.calibrated(RULE))
        return translb.train(self.options.translb, replicas, self.training, self.cluster)

    def agent(self, name: str, seed: int, training: Traffic | None = None, label: str = "") -> BidrlPolicy:
        """A trained agent, on the training traffic or another one, which `label` then tells apart."""
        told, made = self._told(name, seed)
        version = self._version(name, seed, label).rsplit("/", 1)[1]
        if not self.store.exists(f"models/bidrl/{version}"):
            work = f"_work/bidrl/{version}"
            rates = self.training if training is None else training
            actors = None
            if self.options.rollouts:
                actors = Distributed(collectors(told, made, self.cluster, rates), made)
            found = train(told, made, self.cluster, rates, self.store, work, rollouts=actors)
            if actors is not None:
                actors.close()
            about = {"name": name, "traffic": label or "training", "options": told.model_dump(mode="json")}
            BidrlPolicy(found, Scales.of(self.cluster)).save(self.store, version, about)
            self.store.remove(work)
        return BidrlPolicy.load(self.store, version)

    def _told(self, name: str, seed: int) -> tuple[TrainOptions, AgentOptions]:
        """How an agent is trained and built."""
        told = self.options.train.model_copy(
            update={
                "seed": seed,
                "decisions": self.options.decisions,
                "environment": self.options.train.environment.model_copy(update={"step": self.options.step}),
                **({} if name == BIDRL else {"smoothness": 0.0}),
                **({"collectors": self.options.rollouts} if self.options.rollouts else {}),
            }
        )
        made = self.options.agent.model_copy(
            update={"rule": self.calibrated(RULE), **({"encoder": "last"} if name == RL_SCHED else {})}
        )
        return told, made

    def _place(self, name: str) -> str:
        """Where a rule's options are kept."""
        o = self.options
        parts = [name, o.cluster, o.training, o.variety, o.decisions, o.train.environment, o.step]
        own: dict[str, Options] = {LSTM: o.lstm, TRANSLB: o.translb}
        return f"control/rules/{_digest([*parts, own[name]] if name in own else parts)}.json"

    def _version(self, name: str, seed: int, label: str = "") -> str:
        """Where an agent is kept."""
        told, made = self._told(name, seed)
        o = self.options
        return f"models/bidrl/{_digest([told, made, o.cluster, o.training, o.variety, label])}"

    # -- policies --------------------------------------------------------------------------------------------

    def policy(self, name: str) -> tuple[Policy, bool]:
        """A policy for all seeds' environments, and whether it may see the truth."""
        if name == DEFAULT:
            return KubernetesPolicy(), False
        if name in AGENTS:
            return Several([self.agent(name, seed) for seed in range(self.options.seeds)]), False
        family = self._family(name)
        return family.build(self.calibrated(name)), family.truth

    def _forecast(self, name: str) -> Callable[[], Forecast]:
        if name == LSTM:
            lstm = self._lstm
            return lambda: lstm
        period = self.options.held_out.period * HOUR
        made: dict[str, Callable[[], Forecast]] = {
            LAST: LastValue,
            YESTERDAY: lambda: SameTimeYesterday(period),
            PUBLISHED: lambda: PublishedQuantile(period, _QUANTILE, self.training, self.cluster),
            CLAIRVOYANT: Clairvoyant,
        }
        return made[name]

    @cached_property
    def _lstm(self) -> LstmForecast:
        return LstmForecast(self.options.lstm, self.training, self.cluster)

    @property
    def intervals(self) -> int:
        """Decisions on held-out traffic."""
        return int(self.held_out.rates.shape[1] * self.held_out.step / self.cluster.measure.interval)

    @cached_property
    def reward_of(self) -> Callable[[Outcome], Tensor]:
        """Reward [E] of an interval of held-out traffic."""
        whole = self.options.train.environment.model_copy(update={"episode": self.intervals})
        return Environments(self.cluster, self.held_out, whole, len(self.held_out.rates)).reward

    def judged(self, policy: Policy, truth: bool = False) -> dict[str, NDArray[np.float64]]:
        """Figure → [seeds] on held-out traffic, each the mean over its patterns; the reward among them."""
        engine = FluidEngine(
            self.cluster, self.held_out, step=self.options.step, seed=self.options.held_out.seed
        )
        rewards: list[Tensor] = []
        outcome, provision = judge(
            engine,
            policy,
            self.intervals,
            truth=truth,
            on_interval=lambda one: rewards.append(self.reward_of(one)),
        )
        interval = self.cluster.measure.interval
        found = {"reward": torch.stack(rewards).mean(0)} | figures(outcome, provision, interval)
        return {
            name: torch.nanmean(value.double().view(self.options.seeds, -1), 1).numpy()
            for name, value in found.items()
        }


class Found(Protocol):
    """What an experiment comes to."""

    def markdown(self) -> str:
        """Tables and sentences."""

    def pictures(self) -> dict[str, bytes]:
        """Name → PNG."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _digest(parts: list[Any]) -> str:
    return fingerprint([one.model_dump(mode="json") if isinstance(one, Options) else one for one in parts])

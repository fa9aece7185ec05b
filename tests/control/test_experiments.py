"""Every experiment on a toy setting: what it shows, and that what was made is kept."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from fleetcast.control.bidrl.model import AgentOptions
from fleetcast.control.bidrl.train import TrainOptions
from fleetcast.control.cluster import ClusterOptions
from fleetcast.control.environment import EnvironmentOptions
from fleetcast.control.experiments import EXPERIMENTS, delay, table
from fleetcast.control.experiments.setting import (
    AGENTS,
    BIDRL,
    CALIBRATED,
    DEFAULT,
    LAST,
    RULE,
    ExperimentOptions,
    Setting,
    Several,
)
from fleetcast.control.experiments.table import ALL, Comparison, against
from fleetcast.control.interface import run, total
from fleetcast.control.policies.forecast_driven import LstmOptions
from fleetcast.control.policies.translb import TranslbOptions
from fleetcast.control.traffic import TrafficOptions
from fleetcast.errors import InputError
from fleetcast.store import Store

PNG = b"\x89PNG"
PATTERNS = ("sine", "bursts")


@pytest.fixture(scope="module")
def setting(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    options = ExperimentOptions(
        cluster=ClusterOptions(services=4, classes=1, rate=200, max_replicas=6),
        training=TrafficOptions(patterns=PATTERNS, hours=0.4, period=0.2),
        held_out=TrafficOptions(patterns=PATTERNS, hours=0.4, period=0.2, seed=1000),
        seeds=2,
        decisions=200,
        variety=2,
        agent=AgentOptions(window=4, patch=2, latent=4, hidden=8),
        train=TrainOptions(
            environments=4, environment=EnvironmentOptions(episode=16), batch=8, stretch=4, epochs=1
        ),
        lstm=LstmOptions(steps=5, history=8),
        translb=TranslbOptions(intervals=20, steps=5),
    )
    return Setting(options, Store(str(tmp_path_factory.mktemp("control"))).open_or_create())


@pytest.fixture(scope="module")
def compared(setting: Setting) -> Comparison:
    found = EXPERIMENTS["table"](setting)
    assert isinstance(found, Comparison)
    return found


def test_the_table_has_every_policy_and_the_papers_figures(compared: Comparison) -> None:
    text = compared.markdown()
    for name in ALL:
        assert f"| {name} |" in text
    assert "| bidrl | 97 | 1015 | 84.5 |" in text
    assert "bidrl against H-Auto, calibrated: " in text
    for row in compared.found.values():
        assert all(len(values) == 2 for values in row.values())
    assert {name for name, picture in compared.pictures().items() if picture.startswith(PNG)} == {
        "table",
        "paper",
    }


def test_what_was_made_is_kept(
    compared: Comparison, setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    store = setting.store
    assert len(store.list("control/rules")) == len(CALIBRATED)
    assert len(store.list("models/bidrl", "weights.safetensors")) == 2 * 2  # bidrl and RL-Sched
    assert store.list("_work") == []
    again = Setting(setting.options, store)
    with caplog.at_level(logging.INFO):
        again.make(ALL)
    assert "control: rules and agents" not in caplog.text
    figures = again.judged(*again.policy(RULE))
    assert all(np.array_equal(figures[name], of, equal_nan=True) for name, of in compared.found[RULE].items())
    other = setting.options.model_copy(update={"decisions": 201})
    assert Setting(other, store)._version(BIDRL, 0) != setting._version(BIDRL, 0)


def test_agents_of_several_seeds_each_decide_for_their_own_stretch(
    setting: Setting, compared: Comparison
) -> None:
    agents = [setting.agent(BIDRL, seed) for seed in range(2)]
    from fleetcast.control.engine import FluidEngine

    def engine() -> FluidEngine:
        return FluidEngine(setting.cluster, setting.held_out, step=5, seed=0)

    one, two, both = (total(run(engine(), policy, 20)) for policy in (*agents, Several(agents)))
    assert both.cpu_allocated[:2].equal(one.cpu_allocated[:2])
    assert both.cpu_allocated[2:].equal(two.cpu_allocated[2:])


@pytest.mark.parametrize("name", ["bursts", "latents", "delay", "ablations", "shift"])
def test_the_other_experiments(name: str, setting: Setting, compared: Comparison, monkeypatch) -> None:
    monkeypatch.setattr(delay, "SIZES", (4, 8))
    monkeypatch.setattr(delay, "_DECISIONS", 20)
    found = EXPERIMENTS[name](setting)
    text = found.markdown()
    expected = {
        "bursts": [f"| {RULE} |", "in bursts [ms]"],
        "latents": ["| overloaded |", "nearest latent states"],
        "delay": ["| 4 |", "| 8 |", "p99 [ms]"],
        "ablations": ["without reinforcement: throughput", "the paper's +8.6 %"],
        "shift": ["tested on bursts", "| sine |", "the paper's 90 %"],
    }[name]
    for words in expected:
        assert words in text
    assert "nan" not in text
    assert all(one.startswith(PNG) for one in found.pictures().values())
    assert set(found.pictures()) == {name}


def test_experience_may_come_from_ray_actors(setting: Setting, compared: Comparison) -> None:
    """Of as many collectors, it is the experience that one process would collect."""
    given = setting.options.model_copy(update={"rollouts": 2})
    Setting(given, setting.store).make([BIDRL])
    same = given.train.model_copy(update={"collectors": 2})
    here = Setting(given.model_copy(update={"rollouts": 0, "train": same}), setting.store)
    assert here._version(BIDRL, 0) == Setting(given, setting.store)._version(BIDRL, 0)
    there = here.agent(BIDRL, 0).agent.state_dict()
    setting.store.remove(here._version(BIDRL, 0))
    again = here.agent(BIDRL, 0).agent.state_dict()
    assert all(there[name].equal(again[name]) for name in there)


def test_a_difference_is_told_with_its_interval() -> None:
    figures = {name: np.array([10.0, 12, 11]) for name in table._TOLD}
    better = {name: values * (1.5 if name in table.MORE else 0.5) for name, values in figures.items()}
    assert against(better, figures).startswith("better: reward +50.0 % (± 11.3), mean latency -50.0 %")
    assert "worse" not in against(better, figures)
    assert against(figures, better).startswith("worse: reward -33.3 % (± 7.5), mean latency +100.0 %")
    same = {name: values + np.array([1, -1, 0]) for name, values in figures.items()}
    assert against(same, figures).startswith("ties: reward +0.0 %")


def test_who_is_beaten_in_both_is_not_on_the_front() -> None:
    found = {
        name: {"core_hours": np.array([cost, cost]), "latency_mean": np.array([latency, latency])}
        for name, cost, latency in ((DEFAULT, 1, 9), (RULE, 2, 5), (LAST, 3, 5), (BIDRL, 4, 1))
    }
    assert Comparison(found).front() == {DEFAULT, RULE, BIDRL}


def test_a_policy_that_is_not_known_is_named(setting: Setting) -> None:
    with pytest.raises(InputError, match="policies best: not known"):
        setting.make([*AGENTS, "best"])

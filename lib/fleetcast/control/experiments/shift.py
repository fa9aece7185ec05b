"""Trained on one traffic, tested on another: how much of an agent's worth stays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.control import traffic
from fleetcast.control.engine import FluidEngine
from fleetcast.control.environment import Environments
from fleetcast.control.experiments.setting import BIDRL, RULE, Setting, Several, table
from fleetcast.control.interface import Policy, run
from fleetcast.control.measures import Interval, over_seeds
from fleetcast.control.traffic import Traffic
from fleetcast.runtime import spread

#: The paper says that more is kept.
PAPER = 0.9


@dataclass(frozen=True)
class Shift:
    """Rewards [trained, tested, seeds] of agents, and [tested, seeds] of the calibrated rule."""

    patterns: tuple[str, ...]
    reward: NDArray[np.float64]
    rule: NDArray[np.float64]

    def kept(self) -> list[list[Interval]]:
        """[trained][tested] the share of the reward of the agent that was trained on the tested traffic."""
        own = np.stack([self.reward[n, n] for n in range(len(self.patterns))])
        return [[over_seeds(row / mine) for row, mine in zip(rows, own, strict=True)] for rows in self.reward]

    def markdown(self) -> str:
        """Rewards, and the shares that are kept."""
        head = ["trained on", *(f"tested on {name}" for name in self.patterns)]
        rewards = [
            [name, *(str(over_seeds(one)) for one in rows)]
            for name, rows in zip(self.patterns, self.reward, strict=True)
        ]
        rewards.append([RULE, *(str(over_seeds(one)) for one in self.rule)])
        shares = [
            [name, *(f"{100 * one.mean:.1f} ± {100 * one.width:.1f} %" for one in row)]
            for name, row in zip(self.patterns, self.kept(), strict=True)
        ]
        least = min((one for row in self.kept() for one in row), key=lambda one: one.mean)
        gap = least.mean - PAPER
        said = "within chance of" if abs(gap) <= least.width else "more than" if gap > 0 else "less than"
        return (
            f"Reward:\n\n{table(head, rewards)}\n\nOf the reward of the agent that was trained on the tested "
            f"traffic:\n\n{table(head, shares)}\n\nThe least that is kept is {100 * least.mean:.1f} ± "
            f"{100 * least.width:.1f} %, {said} the paper's {100 * PAPER:.0f} %.\n"
        )

    def pictures(self) -> dict[str, bytes]:
        """The matrix of shares."""
        figure, (axes,) = plots.subplots("Share of the reward that is kept, %", width=4.6, height=3.6)
        shares = np.array([[100 * one.mean for one in row] for row in self.kept()])
        axes.imshow(shares, cmap="Blues", vmin=min(80, shares.min() - 5), vmax=110)
        for i, row in enumerate(shares):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=plots.OBSERVED)
        axes.set_xticks(range(len(self.patterns)), self.patterns)
        axes.set_yticks(range(len(self.patterns)), self.patterns)
        axes.set_xlabel("tested on")
        axes.set_ylabel("trained on")
        axes.grid(False)
        return {"shift": plots.png(figure)}


def shift(setting: Setting) -> Shift:
    """An agent for each pattern and seed, on all patterns."""
    setting.make([RULE])
    o, patterns = setting.options, setting.options.held_out.patterns

    def training(pattern: str) -> Traffic:
        told = o.training.model_copy(update={"patterns": (pattern,)})
        return traffic.generate(told, setting.cluster, o.variety)

    def work(item: dict[str, str]) -> dict[str, int]:
        torch.set_num_threads(1)
        setting.agent(BIDRL, int(item["seed"]), training(item["pattern"]), item["pattern"])
        return {"rows": o.decisions}

    items = [{"pattern": one, "seed": str(seed)} for seed in range(o.seeds) for one in patterns]
    spread(items, work, "control: agents of one traffic", "decisions")

    interval = setting.cluster.measure.interval
    reward = np.zeros((len(patterns), len(patterns), o.seeds))
    of_rule = np.zeros((len(patterns), o.seeds))
    for column, tested in enumerate(patterns):
        told = o.held_out.model_copy(update={"patterns": (tested,)})
        rates = traffic.generate(told, setting.cluster, o.seeds)
        intervals = int(rates.rates.shape[1] * rates.step / interval)
        whole = o.train.environment.model_copy(update={"episode": intervals, "step": o.step})
        reward_of = Environments(setting.cluster, rates, whole, o.seeds).reward

        def judged(policy: Policy) -> NDArray[np.float64]:
            engine = FluidEngine(setting.cluster, rates, step=o.step, seed=told.seed)  # noqa: B023
            outcomes = run(engine, policy, intervals)  # noqa: B023
            return torch.stack([reward_of(one) for one in outcomes]).mean(0).double().numpy()  # noqa: B023

        for row, trained in enumerate(patterns):
            agents = [setting.agent(BIDRL, seed, None, trained) for seed in range(o.seeds)]
            reward[row, column] = judged(Several(agents))
        of_rule[column] = judged(setting.policy(RULE)[0])
    return Shift(tuple(patterns), reward, of_rule)

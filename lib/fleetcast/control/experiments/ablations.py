"""What two parts of the agent are worth: the term for the representation, and reinforcement.

The paper measures the first by the variance of the response time, and the second by throughput. An agent
without reinforcement has learned nothing from reward: it does as the calibrated rule does that it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.control.engine import FluidEngine
from fleetcast.control.experiments.setting import BIDRL, ROUGH, RULE, Setting, table
from fleetcast.control.interface import run
from fleetcast.control.measures import over_seeds

NAMES = {BIDRL: "bidrl", ROUGH: "without the term for the representation", RULE: "without reinforcement"}
#: The paper's: variance of the response without the term, throughput without reinforcement [%].
PAPER = {ROUGH: ("variance", +8.6), RULE: ("throughput", -11.4)}
_FIGURES = {"variance": "variance of latency over time [s²]", "throughput": "throughput [1/s]",
            "latency": "mean latency [ms]", "reward": "reward [1]"}  # fmt: skip


@dataclass(frozen=True)
class Ablations:
    """Policy → figure → [seeds]."""

    found: Mapping[str, Mapping[str, NDArray[np.float64]]]

    def markdown(self) -> str:
        """Figures, and the change to the whole agent, paired over seeds."""
        rows = []
        for name, row in self.found.items():
            cells = [str(over_seeds(row[one])) for one in _FIGURES]
            rows.append([NAMES[name], *cells, "–" if name == BIDRL else self._change(name)])
        head = ["agent", *_FIGURES.values(), "change, %"]
        return f"{table(head, rows)}\n\n" + "\n".join(f"- {one}" for one in self._sentences()) + "\n"

    def _gap(self, name: str, figure: str) -> tuple[float, float]:
        """Mean and half width of the interval [%]."""
        whole = self.found[BIDRL][figure]
        gap = over_seeds(self.found[name][figure] - whole)
        return 100 * gap.mean / whole.mean(), 100 * gap.width / whole.mean()

    def _change(self, name: str) -> str:
        figure, _ = PAPER[name]
        middle, width = self._gap(name, figure)
        return f"{figure} {middle:+.1f} ± {width:.1f}"

    def _sentences(self) -> list[str]:
        told = []
        for name, (figure, theirs) in PAPER.items():
            middle, width = self._gap(name, figure)
            same = "a tie" if abs(middle) <= width else "a difference"
            change = f"{figure} {middle:+.1f} % (± {width:.1f}), {same}"
            reward = "reward {:+.1f} % (± {:.1f})".format(*self._gap(name, "reward"))
            told.append(f"{NAMES[name]}: {change}; the paper's {theirs:+.1f} %; {reward}.")
        return told

    def pictures(self) -> dict[str, bytes]:
        """Changes beside the paper's."""
        figure, (axes,) = plots.subplots("Change without the part, %", width=5)
        labels = [f"{NAMES[name]}:\n{figure}" for name, (figure, _) in PAPER.items()]
        gaps = [self._gap(name, figure) for name, (figure, _) in PAPER.items()]
        places = np.arange(len(labels))
        axes.bar(
            places - 0.2,
            [g[0] for g in gaps],
            0.4,
            yerr=[g[1] for g in gaps],
            color=plots.PALETTE[0],
            label="here",
        )
        axes.bar(
            places + 0.2, [one for _, one in PAPER.values()], 0.4, color=plots.QUIET, label="the paper's"
        )
        axes.axhline(0, color=plots.OBSERVED, linewidth=0.8)
        axes.set_xticks(places, labels)
        plots.legend(figure, axes, 2)
        return {"ablations": plots.png(figure)}


def ablations(setting: Setting) -> Ablations:
    """The agent, and it without each part, on held-out traffic."""
    setting.make([BIDRL, ROUGH])
    interval, o, intervals = setting.cluster.measure.interval, setting.options, setting.intervals
    found = {}
    for name in NAMES:
        policy, truth = setting.policy(name)
        engine = FluidEngine(setting.cluster, setting.held_out, step=o.step, seed=o.held_out.seed)
        outcomes = run(engine, policy, intervals, truth=truth)
        latency, answered = (
            torch.stack([getattr(one, part) for one in outcomes], 1).double()
            for part in ("latency", "answered")
        )

        def of_seeds(values: torch.Tensor) -> NDArray[np.float64]:
            return values.view(o.seeds, -1).mean(1).numpy()

        found[name] = {
            "variance": of_seeds((latency / answered.clamp(min=1e-9)).var(1)),
            "throughput": of_seeds(answered.sum(1) / (intervals * interval)),
            "latency": of_seeds(1000 * latency.sum(1) / answered.sum(1)),
            "reward": of_seeds(torch.stack([setting.reward_of(one) for one in outcomes]).mean(0).double()),
        }
    return Ablations(found)

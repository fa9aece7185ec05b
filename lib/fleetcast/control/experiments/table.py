"""Table 1: rules and agents side by side on traffic that none has seen, and the front of latency and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.control.experiments.setting import (
    BIDRL,
    CLAIRVOYANT,
    DEFAULT,
    LAST,
    LSTM,
    PUBLISHED,
    RL_SCHED,
    RULE,
    STAFFING,
    TRANSLB,
    YESTERDAY,
    Setting,
    log,
    table,
)
from fleetcast.control.measures import UNITS, over_seeds

ALL = (DEFAULT, RULE, STAFFING, TRANSLB, LAST, YESTERDAY, PUBLISHED, LSTM, CLAIRVOYANT, RL_SCHED, BIDRL)
#: What the table shows of all figures.
SHOWN = (
    "reward", "latency_mean", "latency_p99", "missed", "throughput", "efficiency", "replica_hours",
    "core_hours", "churn", "under_time",
)  # fmt: skip
#: Of these, figures of which more is better.
MORE = frozenset({"reward", "throughput", "goodput", "efficiency"})
#: The paper's table: mean latency [ms], throughput [1/s], utilisation efficiency [%].
PAPER = {
    DEFAULT: (162, 790, 68.2), LSTM: (134, 861, 72.9), TRANSLB: (118, 902, 75.6), RL_SCHED: (112, 928, 78.1),
    BIDRL: (97, 1015, 84.5),
}  # fmt: skip
#: Figures that a sentence compares, in words.
_TOLD = {
    "reward": "reward", "latency_mean": "mean latency", "latency_p99": "p99", "missed": "missed deadlines",
    "throughput": "throughput", "efficiency": "efficiency", "core_hours": "core-hours", "churn": "churn",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Policy → figure → [seeds]."""

    found: Mapping[str, Mapping[str, NDArray[np.float64]]]

    def markdown(self) -> str:
        """The table, the paper's, and what it comes to."""
        head = ["policy", *(f"{name} [{UNITS[name]}]" for name in SHOWN)]
        rows = [[name, *(str(over_seeds(row[one])) for one in SHOWN)] for name, row in self.found.items()]
        theirs = [[name, *(f"{value:g}" for value in PAPER[name])] for name in self.found if name in PAPER]
        paper = table(["the paper's", "latency [ms]", "throughput [1/s]", "efficiency [%]"], theirs)
        sentences = "\n".join(f"- {one}" for one in self.sentences())
        return f"{table(head, rows)}\n\n{paper}\n\n{sentences}\n"

    def sentences(self) -> list[str]:
        """Agents against the calibrated rule, figure by figure, paired over seeds; and the front."""
        found = [
            f"{name} against {other}: {against(self.found[name], self.found[other])}"
            for name, other in (
                (BIDRL, RULE),
                (BIDRL, STAFFING),
                (BIDRL, RL_SCHED),
                (BIDRL, LSTM),
                (RL_SCHED, RULE),
                (STAFFING, RULE),
                (RULE, DEFAULT),
            )
            if name in self.found and other in self.found
        ]
        front = [name for name in self.found if name in self.front()]
        return [*found, f"On the front of mean latency and core-hours: {', '.join(front)}."]

    def front(self) -> set[str]:
        """Policies that no other one beats in both latency and cost."""

        def beaten(name: str) -> bool:
            mine = self._costs(name)
            others = [self._costs(other) for other in self.found if other != name]
            return any(all(a <= b for a, b in zip(one, mine, strict=True)) and one != mine for one in others)

        return {name for name in self.found if not beaten(name)}

    def _costs(self, name: str) -> tuple[float, float]:
        row = self.found[name]
        return float(np.mean(row["core_hours"])), float(np.mean(row["latency_mean"]))

    def pictures(self) -> dict[str, bytes]:
        """Latency × cost with intervals and the front; the paper's three figures beside ours."""
        return {"table": self._front_picture(), "paper": self._paper_picture()}

    def _front_picture(self) -> bytes:
        figure, (axes,) = plots.subplots("Mean latency, ms", width=6, height=3.8)
        for number, (name, row) in enumerate(self.found.items()):
            cost, latency = over_seeds(row["core_hours"]), over_seeds(row["latency_mean"])
            axes.errorbar(
                cost.mean,
                latency.mean,
                xerr=cost.width,
                yerr=latency.width,
                fmt="os^Dvp*XPh<"[number % 11],
                color=plots.PALETTE[number % len(plots.PALETTE)],
                label=name,
                linestyle="",
            )
        points = sorted(self._costs(name) for name in self.front())
        axes.plot(*zip(*points, strict=True), color=plots.QUIET, linestyle=":", label="front", zorder=0)
        axes.set_xlabel("CPU allocated, core-hours per pattern")
        axes.set_ylim(bottom=0)
        plots.legend(figure, axes, 3)
        return plots.png(figure)

    def _paper_picture(self) -> bytes:
        named = [name for name in self.found if name in PAPER]
        figure, all_axes = plots.subplots(
            "Mean latency, ms", "Requests/s", "Efficiency, %", width=8, height=3
        )
        places = np.arange(len(named))
        for k, (axes, name) in enumerate(
            zip(all_axes, ("latency_mean", "throughput", "efficiency"), strict=True)
        ):
            ours = [over_seeds(self.found[one][name]) for one in named]
            axes.bar(
                places - 0.2,
                [one.mean for one in ours],
                0.4,
                yerr=[one.width for one in ours],
                color=plots.PALETTE[0],
                label="here",
            )
            axes.bar(
                places + 0.2, [PAPER[one][k] for one in named], 0.4, color=plots.QUIET, label="the paper's"
            )
            axes.set_xticks(places, named, rotation=40, ha="right")
        plots.legend(figure, all_axes[0], 2)
        return plots.png(figure)


def against(one: Mapping[str, NDArray[np.float64]], other: Mapping[str, NDArray[np.float64]]) -> str:
    """What is better, worse and a tie, with intervals of the differences over seeds."""
    words: dict[str, list[str]] = {"better": [], "worse": [], "ties": []}
    for figure, name in _TOLD.items():
        gap = over_seeds(one[figure] - other[figure])
        share = 100 * gap.mean / np.mean(other[figure])
        told = f"{name} {share:+.1f} % (± {100 * gap.width / abs(np.mean(other[figure])):.1f})"
        if abs(gap.mean) <= gap.width:
            words["ties"].append(told)
        else:
            words["better" if (gap.mean > 0) == (figure in MORE) else "worse"].append(told)
    return "; ".join(f"{kind}: {', '.join(ones)}" for kind, ones in words.items() if ones) + "."


def compare(setting: Setting, names: tuple[str, ...] = ALL) -> Comparison:
    """Calibrates, trains and judges all."""
    setting.make(names)
    found = {}
    for name in names:
        policy, truth = setting.policy(name)
        found[name] = setting.judged(policy, truth)
        told = {figure: str(over_seeds(found[name][figure])) for figure in ("latency_mean", "missed")}
        log.info("control: %s: latency %s ms, missed %s %%", name, *told.values())
    return Comparison(found)

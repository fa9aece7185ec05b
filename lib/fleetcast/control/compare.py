"""Rules side by side: trained and calibrated on training traffic, judged on traffic that none has seen.

found = compare(CompareOptions())
print(found.markdown())
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from fleetcast import plots
from fleetcast.config import Options
from fleetcast.control import traffic
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.interface import Policy
from fleetcast.control.measures import UNITS, Interval, figures, judge, over_seeds
from fleetcast.control.policies import translb
from fleetcast.control.policies.calibrate import (
    CalibrateOptions,
    calibrate,
    draw_forecast,
    draw_kubernetes,
)
from fleetcast.control.policies.forecast_driven import (
    Clairvoyant,
    Forecast,
    ForecastOptions,
    ForecastPolicy,
    LastValue,
    LstmForecast,
    LstmOptions,
    SameTimeYesterday,
)
from fleetcast.control.policies.kubernetes import KubernetesOptions, KubernetesPolicy
from fleetcast.control.policies.translb import TranslbOptions, TranslbPolicy
from fleetcast.control.traffic import HOUR, Traffic, TrafficOptions

log = logging.getLogger(__name__)

#: What the table shows of all figures.
SHOWN = (
    "latency_mean", "latency_p99", "missed", "throughput", "efficiency", "replica_hours", "churn",
    "under_time",
)  # fmt: skip


class CompareOptions(Options):
    """The experiment of the table."""

    cluster: ClusterOptions = ClusterOptions()
    training: TrafficOptions = TrafficOptions(hours=2, period=1)
    """A day is an hour here, so that there is a yesterday."""
    held_out: TrafficOptions = TrafficOptions(hours=3, period=1, seed=1000)
    seeds: int = Field(5, ge=2)
    """Runs on held-out traffic, each of all of its patterns."""
    calibration: CalibrateOptions = CalibrateOptions(decisions=30_000)
    lstm: LstmOptions = LstmOptions()
    translb: TranslbOptions = TranslbOptions()
    step: float = Field(5, gt=0)
    """Of the simulator [s]."""


@dataclass(frozen=True)
class Comparison:
    """Policy → figure → interval over seeds, and what calibration chose."""

    table: dict[str, dict[str, Interval]]
    chosen: dict[str, Any]

    def markdown(self) -> str:
        """Table 1."""
        head = ["policy", *(f"{name} [{UNITS[name]}]" for name in SHOWN)]
        rows = [[name, *(str(row[figure]) for figure in SHOWN)] for name, row in self.table.items()]
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def front(self) -> set[str]:
        """Policies that no other one beats in both latency and cost."""

        def beaten(name: str) -> bool:
            mine = self._costs(name)
            others = [self._costs(other) for other in self.table if other != name]
            return any(all(a <= b for a, b in zip(one, mine, strict=True)) and one != mine for one in others)

        return {name for name in self.table if not beaten(name)}

    def _costs(self, name: str) -> tuple[float, float]:
        return self.table[name]["core_hours"].mean, self.table[name]["latency_mean"].mean

    def figure(self) -> bytes:
        """Latency × cost with intervals and the Pareto front, as a PNG."""
        figure, (axes,) = plots.subplots("Mean latency, ms", width=6, height=3.6)
        for number, (name, row) in enumerate(self.table.items()):
            cost, latency = row["core_hours"], row["latency_mean"]
            axes.errorbar(
                cost.mean,
                latency.mean,
                xerr=cost.width,
                yerr=latency.width,
                fmt="os^Dvp*X"[number % 8],
                color=plots.PALETTE[number % len(plots.PALETTE)],
                label=name,
                linestyle="",
            )
        points = sorted(self._costs(name) for name in self.front())
        axes.plot(
            *zip(*points, strict=True), color=plots.QUIET, linestyle=":", label="Pareto front", zorder=0
        )
        axes.set_xlabel("CPU allocated, core-hours per pattern")
        plots.legend(figure, axes, 3)
        return plots.png(figure)


def compare(options: CompareOptions) -> Comparison:
    """Trains, calibrates and judges all rules."""
    cluster = generate(options.cluster)
    patterns = len(options.training.patterns)
    training = traffic.generate(options.training, cluster, patterns)
    count = options.seeds * len(options.held_out.patterns)
    held_out = traffic.generate(options.held_out, cluster, count)
    table, chosen = {}, {}

    def add(name: str, policy: Policy, truth: bool = False) -> None:
        table[name] = _judged(policy, cluster, held_out, options, truth)
        log.info("%s: latency %s ms, missed %s %%", name, table[name]["latency_mean"], table[name]["missed"])

    add("H-Auto, default", KubernetesPolicy())
    rule = calibrate(
        KubernetesPolicy, draw_kubernetes, KubernetesOptions(), cluster, training, options.calibration
    ).best
    chosen["H-Auto"] = rule.model_dump()
    add("H-Auto, calibrated", KubernetesPolicy(rule))
    balancer = translb.train(options.translb, KubernetesPolicy(rule), training, cluster)
    add("TransLB on H-Auto, calibrated", TranslbPolicy(balancer, KubernetesPolicy(rule)))

    lstm = LstmForecast(options.lstm, training, cluster)
    forecasts: dict[str, Callable[[], Forecast]] = {
        "last value": LastValue,
        "same time yesterday": lambda: SameTimeYesterday(options.held_out.period * HOUR),
        "LSTM-Auto": lambda: lstm,
        "clairvoyant bound": Clairvoyant,
    }
    for name, make in forecasts.items():
        best = calibrate(
            lambda one, make=make: ForecastPolicy(make(), one),  # type: ignore[misc]
            draw_forecast,
            ForecastOptions(),
            cluster,
            training,
            options.calibration,
            truth=make().truth,
        ).best
        chosen[name] = best.model_dump()
        add(name, ForecastPolicy(make(), best), make().truth)
    return Comparison(table, chosen)


def _judged(
    policy: Policy, cluster: Cluster, held_out: Traffic, options: CompareOptions, truth: bool
) -> dict[str, Interval]:
    """The figures of each seed are the means over its patterns."""
    engine = FluidEngine(cluster, held_out, step=options.step, seed=options.held_out.seed)
    interval = cluster.measure.interval
    intervals = int(held_out.rates.shape[1] * held_out.step / interval)
    outcome, provision = judge(engine, policy, intervals, truth=truth)
    found = figures(outcome, provision, interval)
    return {
        name: over_seeds(torch.nanmean(value.double().view(options.seeds, -1), 1).numpy())
        for name, value in found.items()
    }

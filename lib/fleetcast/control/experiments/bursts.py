"""Latency through bursts: the paper's third figure, of all policies on the same bursts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.control import traffic
from fleetcast.control.engine import FluidEngine
from fleetcast.control.experiments.setting import (
    BIDRL,
    DEFAULT,
    LSTM,
    RL_SCHED,
    RULE,
    TRANSLB,
    Setting,
    table,
)
from fleetcast.control.interface import run
from fleetcast.control.measures import over_seeds

SHOWN = (DEFAULT, RULE, TRANSLB, LSTM, RL_SCHED, BIDRL)
#: Environments per seed.
_EACH = 3
#: Requests at least so many times their median are a burst.
_BURST = 1.3


@dataclass(frozen=True)
class Bursts:
    """Policy → latency over time."""

    interval: float
    """[s]."""
    requests: NDArray[np.float64]
    """[T] of the environment that is drawn [1/s]."""
    latency: Mapping[str, NDArray[np.float64]]
    """Policy → [seeds, E, T] mean latency of an interval's requests [ms]."""
    burst: NDArray[np.bool_]
    """[seeds, E, T] whether an interval is in a burst."""

    def markdown(self) -> str:
        """Mean latency in bursts and outside, and how much it varies."""
        rows = []
        for name, latency in self.latency.items():
            inside, outside = (
                over_seeds([np.nanmean(one[at]) for one, at in zip(latency, where, strict=True)])
                for where in (self.burst, ~self.burst)
            )
            spread = over_seeds([np.nanstd(one) for one in latency])
            rows.append([name, str(inside), str(outside), str(spread)])
        head = ["policy", "in bursts [ms]", "outside [ms]", "standard deviation over time [ms]"]
        share = 100 * float(self.burst.mean())
        return (
            f"{table(head, rows)}\n\nA burst is an interval with {_BURST} times the median of requests: "
            f"{share:.0f} % of the time.\n"
        )

    def pictures(self) -> dict[str, bytes]:
        """Requests and latency of the first environment over time."""
        figure, (top, axes) = plots.subplots("Requests/s", "Mean latency, ms", width=9.5, height=3.2)
        minutes = np.arange(len(self.requests)) * self.interval / 60
        top.plot(minutes, self.requests, color=plots.OBSERVED, linestyle="-")
        for place, (name, latency) in enumerate(self.latency.items()):
            color = plots.PALETTE[place % len(plots.PALETTE)]
            axes.plot(minutes, latency[0, 0], label=name, color=color, linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        for one in (top, axes):
            one.set_xlabel("minutes")
        plots.legend(figure, axes, 3)
        return {"bursts": plots.png(figure)}


def bursts(setting: Setting) -> Bursts:
    """All policies on the same bursts."""
    setting.make(SHOWN)
    o = setting.options
    told = o.held_out.model_copy(update={"patterns": ("bursts",), "hours": min(o.held_out.hours, 2.0)})
    rates = traffic.generate(told, setting.cluster, _EACH * o.seeds)
    interval = setting.cluster.measure.interval
    intervals = int(rates.rates.shape[1] * rates.step / interval)
    latency, offered = {}, np.zeros(0)
    for name in SHOWN:
        policy, truth = setting.policy(name)
        engine = FluidEngine(setting.cluster, rates, step=o.step, seed=told.seed)
        outcomes = run(engine, policy, intervals, truth=truth)
        mean = torch.stack([1000 * one.latency / one.answered.clamp(min=1e-9) for one in outcomes], 1)
        latency[name] = mean.double().view(o.seeds, _EACH, -1).numpy()
        offered = torch.stack([one.offered for one in outcomes], 1).double().numpy() / interval
    median = np.median(offered, axis=1, keepdims=True)
    burst = (offered > _BURST * median).reshape(o.seeds, _EACH, -1)
    return Bursts(interval, offered[0], latency, burst)

"""How long a decision takes an agent, from an observation to an action; with the stream around it see
benchmarks/deployment.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.control import traffic
from fleetcast.control.bidrl.policy import BidrlPolicy
from fleetcast.control.cluster import generate
from fleetcast.control.engine import FluidEngine
from fleetcast.control.experiments.setting import BIDRL, Setting, table
from fleetcast.control.traffic import TrafficOptions

SIZES = (25, 50, 100, 200, 500)
#: The paper's bound up to 100 services [ms].
PAPER = 60.0
_DECISIONS = 200


@dataclass(frozen=True)
class Delay:
    """Services → [decisions] the time that each took [ms]."""

    found: Mapping[int, NDArray[np.float64]]

    def markdown(self) -> str:
        """Median and p99."""
        rows = [
            [f"{size}", *(f"{np.percentile(one, q):.2f}" for q in (50, 99))]
            for size, one in self.found.items()
        ]
        return f"{table(['services', 'p50 [ms]', 'p99 [ms]'], rows)}\n"

    def pictures(self) -> dict[str, bytes]:
        """Both over the number of services."""
        figure, (axes,) = plots.subplots("A decision, ms", width=5)
        for place, q in enumerate((50, 99)):
            values = [np.percentile(one, q) for one in self.found.values()]
            axes.plot(list(self.found), values, marker="os"[place], color=plots.PALETTE[place], label=f"p{q}")
        axes.axhline(PAPER, color=plots.QUIET, linestyle=":", label="the paper's bound up to 100")
        axes.set_xlabel("services")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        plots.legend(figure, axes, 3)
        return {"delay": plots.png(figure)}


def delay(setting: Setting) -> Delay:
    """The first agent on clusters of all sizes; its weights do not depend on their number."""
    setting.make([BIDRL])
    agent = setting.agent(BIDRL, 0).agent
    found = {}
    for size in SIZES:
        cluster = generate(setting.options.cluster.model_copy(update={"services": size}))
        hours = (_DECISIONS + 1) * cluster.measure.interval / 3600
        rates = traffic.generate(TrafficOptions(hours=hours, period=1), cluster, 1)
        engine, seconds = FluidEngine(cluster, rates, step=cluster.measure.interval), []
        policy = BidrlPolicy(agent, setting.agent(BIDRL, 0).scales)
        policy.reset(cluster, 1)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(_DECISIONS):
            seen = engine.observe()
            started = time.perf_counter()
            action = policy.act(seen)
            seconds.append(1000 * (time.perf_counter() - started))
            engine.step(action)
        torch.set_num_threads(threads)
        found[size] = np.array(seconds[_DECISIONS // 10 :])
    return Delay(found)

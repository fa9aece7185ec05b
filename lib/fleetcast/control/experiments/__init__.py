"""The experiments of the paper, each from one command of jobs/control.py.

setting     clusters, traffic, budgets; calibrated rules and trained agents, which are kept in the store
table       Table 1: rules and agents side by side, and the front of latency and cost
bursts      latency through bursts of traffic
latents     what the latent states tell apart
delay       how long a decision takes
shift       trained on one traffic, tested on another
ablations   without the term for the representation, without reinforcement
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from fleetcast.control.experiments import ablations, bursts, delay, latents, shift, table
from fleetcast.control.experiments.setting import Found, Setting

Name = Literal["table", "bursts", "latents", "delay", "shift", "ablations", "all"]
#: Name → what runs it.
EXPERIMENTS: Mapping[str, Callable[[Setting], Found]] = {
    "table": table.compare,
    "bursts": bursts.bursts,
    "latents": latents.latents,
    "delay": delay.delay,
    "ablations": ablations.ablations,
    "shift": shift.shift,
}

"""Decisions in a simulated cluster: rules and agents side by side, or what another quantile would have cost.

    python jobs/control.py --store ./store --experiment table
    python jobs/control.py --store ./store --experiment all
    python jobs/control.py --store ./store --what-if --replay.quantiles '["q50","q90"]'

Tables are printed; tables and figures are written to `control/` of the store. What was calibrated and trained
is kept there, so that a run that was stopped goes on.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.control.experiments import EXPERIMENTS, Name
from fleetcast.control.experiments.setting import ExperimentOptions, Found, Setting
from fleetcast.control.what_if import WhatIfOptions, what_if
from fleetcast.errors import InputError
from fleetcast.runtime import run_job
from fleetcast.store import Store


class Config(JobConfig):
    __doc__ = __doc__

    experiment: Name | None = None
    """table: Table 1. bursts: latency through bursts. latents: t-SNE of the latent states. delay: of a
    decision. shift: train on one traffic, test on another. ablations: without parts. all: one by one."""
    setting: ExperimentOptions = ExperimentOptions()
    """The cluster, the traffic and the budgets of the experiments."""
    what_if: bool = False
    """Replays the store's published forecasts against the telemetry that came."""
    replay: WhatIfOptions = WhatIfOptions()
    """The replay of `--what-if`."""


def main(config: Config) -> dict[str, Any]:
    """Runs what was asked for."""
    if config.experiment is None and not config.what_if:
        raise InputError("nothing to do, expected --experiment or --what-if")
    store, written = Store(config.store), list[str]()
    if config.what_if:
        written += _write(store, "what-if", what_if(store, config.replay))
    if config.experiment is not None:
        setting = Setting(config.setting, store.open_or_create())
        wanted = list(EXPERIMENTS) if config.experiment == "all" else [config.experiment]
        for name in wanted:
            written += _write(store, name, EXPERIMENTS[name](setting))
    return {"written": written}


def _write(store: Store, name: str, found: Found) -> list[str]:
    """Prints what was found, and writes it; returns the files."""
    print(found.markdown(), flush=True)
    files = {f"{name}.md": found.markdown().encode()}
    files |= {f"{picture}.png": content for picture, content in found.pictures().items()}
    for file, content in files.items():
        with store.write(f"control/{file}") as written:
            written.write(content)
    return [f"control/{file}" for file in files]


if __name__ == "__main__":
    run_job(main, Config)

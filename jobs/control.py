"""Decisions in a simulated cluster: rules side by side, or what another quantile would have cost.

    python jobs/control.py --store ./store --compare
    python jobs/control.py --store ./store --what-if --replay.quantiles '["q50","q90"]'

Tables are printed; tables and figures are written to `control/` of the store.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.control.compare import CompareOptions, compare
from fleetcast.control.what_if import WhatIfOptions, what_if
from fleetcast.errors import InputError
from fleetcast.runtime import run_job
from fleetcast.store import Store


class Config(JobConfig):
    __doc__ = __doc__

    compare: bool = False
    """Trains, calibrates and judges all rules on simulated traffic."""
    what_if: bool = False
    """Replays the store's published forecasts against the telemetry that came."""
    comparison: CompareOptions = CompareOptions()
    """The experiment of `--compare`."""
    replay: WhatIfOptions = WhatIfOptions()
    """The replay of `--what-if`."""


def main(config: Config) -> dict[str, Any]:
    """Runs what was asked for."""
    if not (config.compare or config.what_if):
        raise InputError("nothing to do, expected --compare or --what-if")
    store = Store(config.store)
    if config.compare:
        store.open_or_create()
    written: list[str] = []
    asked = {"comparison": config.compare, "what-if": config.what_if}
    for name in (one for one, wanted in asked.items() if wanted):
        found = compare(config.comparison) if name == "comparison" else what_if(store, config.replay)
        print(found.markdown(), flush=True)
        for suffix, content in ((".md", found.markdown().encode()), (".png", found.figure())):
            with store.write(f"control/{name}{suffix}") as file:
                file.write(content)
            written.append(f"control/{name}{suffix}")
    return {"written": written}


if __name__ == "__main__":
    run_job(main, Config)

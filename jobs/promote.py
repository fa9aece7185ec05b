"""A backtest's winner becomes the model that forecasts, if it beats the naive forecasts by a margin.

    python jobs/promote.py --store ./store --backtest default --margin 0.1
    python jobs/promote.py --store ./store --rollback

The winner is chosen and judged on the validation part. One that is not good enough is refused with its
figures, and models/selected.json stays as it is. Earlier selections are kept; --rollback goes back to them.
"""

from __future__ import annotations

from typing import Any

from fleetcast.backtesting.promote import PromoteOptions, promote
from fleetcast.config import JobConfig
from fleetcast.runtime import run_job
from fleetcast.store import Store


class Config(PromoteOptions, JobConfig):
    __doc__ = __doc__


def main(config: Config) -> dict[str, Any]:
    """Runs the promotion."""
    return promote(Store(config.store), config.only(PromoteOptions))


if __name__ == "__main__":
    run_job(main, Config)

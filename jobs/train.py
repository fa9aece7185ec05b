"""A windows dataset → a trained, calibrated and evaluated model.

    python jobs/train.py --store ./store --model stgnn --workers 2

Trains with DDP over any number of workers. Repeating the command after a crash goes on from the last
checkpoint.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.runtime import run_job
from fleetcast.store import Store
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import train_model


class Config(TrainOptions, JobConfig):
    __doc__ = __doc__


def main(config: Config) -> dict[str, Any]:
    """Runs training."""
    return train_model(Store(config.store), config.only(TrainOptions))


if __name__ == "__main__":
    run_job(main, Config)

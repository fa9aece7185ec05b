"""Telemetry and dependencies → a windows dataset.

    python jobs/shard.py --store ./store --step 15min --history 1d --horizon 1d

Shards, an index of windows as views, a chronological split and a scaler from the training part.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.ingest.shards import shard
from fleetcast.runtime import run_job
from fleetcast.store import Store
from fleetcast.windows.manifest import ShardOptions


class Config(ShardOptions, JobConfig):
    __doc__ = __doc__


def main(config: Config) -> dict[str, Any]:
    """Runs shard."""
    return shard(Store(config.store), config.only(ShardOptions))


if __name__ == "__main__":
    run_job(main, Config)

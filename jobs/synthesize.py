"""A synthetic cluster → a raw trace in the format of cluster-trace-v2018, all six tables; or with `--trace`
of cluster-trace-microservices-v2021 or v2022, all four.

    python jobs/synthesize.py --out ./raw --machines 100 --days 8 --coupling 0.8 --format csv.gz
    python jobs/synthesize.py --out ./raw --trace microservices-v2021 --days 1 --requests 500 --churn 0.1

Load comes from services with daily and weekly cycles, bursts and noise, and travels along their dependencies
with a delay; with --coupling 0 machines are independent of each other. The same options give the same bytes.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import BaseJobConfig
from fleetcast.ingest.synthesize import synthesize
from fleetcast.runtime import run_job
from fleetcast.store import Store
from fleetcast.traces.synthesis import SynthesizeOptions


class Config(SynthesizeOptions, BaseJobConfig):
    __doc__ = __doc__

    out: str
    """Where the raw files go: a folder or `s3://bucket/prefix`. Files of an earlier run are replaced."""


def main(config: Config) -> dict[str, Any]:
    """Runs synthesize."""
    return synthesize(config.only(SynthesizeOptions), Store(config.out))


if __name__ == "__main__":
    run_job(main, Config)

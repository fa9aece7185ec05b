"""From new raw files to a published forecast and its report: the job to run every night.

    python jobs/nightly.py --store ./store --source ./raw --trace alibaba-2018
    python jobs/nightly.py --store ./store --source http://prometheus:9090 --trace prometheus
    python jobs/nightly.py --store ./store --tabular.table load.parquet --tabular.entity host
        --tabular.time time --tabular.metrics cpu

Runs ingest, shard, train, forecast and the report; each stage is skipped when it is complete. Options of a
stage are given as --ingest.step, --shard.horizon, --train.epochs, …, or in a YAML file with --config.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest.options import IngestOptions
from fleetcast.runtime import run_job
from fleetcast.store import Store
from pydantic import field_validator, model_validator


class Config(NightlyOptions, JobConfig):
    __doc__ = __doc__

    source: str | None = None
    """Raw files: a folder, a file or `s3://bucket/prefix`; or the address of a Prometheus server. Not given
    for a table."""
    trace: str | None = None
    """The format of the raw tables; short for --ingest.trace."""

    @field_validator("trace")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return None if name is None else IngestOptions(trace=name).trace

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.source is None) == (self.tabular is None):
            raise ValueError("expected exactly one of --source and --tabular.table")
        return self


def main(config: Config) -> dict[str, Any]:
    """Runs the night."""
    options = config.only(NightlyOptions)
    if config.trace is not None:
        options = options.model_copy(
            update={"ingest": options.ingest.model_copy(update={"trace": config.trace})}
        )
    return nightly(Store(config.store), config.source, options)


if __name__ == "__main__":
    run_job(main, Config)

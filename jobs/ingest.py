"""Raw trace → telemetry, entities, dependencies and rejected rows.

    python jobs/ingest.py --store ./store --source ./raw --trace alibaba-2018
    python jobs/ingest.py --store ./store --tabular.table load.parquet --tabular.entity host
        --tabular.time time --tabular.metrics cpu

Reads csv, .csv.gz and .tar.gz from a folder, a file or s3://. Running it again with more files adds only what
is new; a job that died is run again with the same command.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.sources import load
from fleetcast.runtime import run_job
from fleetcast.store import Store
from fleetcast.traces.mapping import TabularOptions
from pydantic import model_validator


class Config(IngestOptions, JobConfig):
    __doc__ = __doc__

    source: str | None = None
    """Raw files: a folder, a file or `s3://bucket/prefix`; or the address of a Prometheus server. Not given
    for a table."""
    tabular: TabularOptions | None = None
    """A table of any origin instead of raw files, with the names of its columns."""

    @model_validator(mode="after")
    def _one_source(self) -> Config:
        if (self.source is None) == (self.tabular is None):
            raise ValueError("expected exactly one of --source and --tabular.table")
        return self


def main(config: Config) -> dict[str, Any]:
    """Runs ingest."""
    return load(Store(config.store), config.source, config.only(IngestOptions), config.tabular)


if __name__ == "__main__":
    run_job(main, Config)

"""Raw trace → telemetry, entities, dependencies and rejected rows.

    python jobs/ingest.py --store ./store --source ./raw --trace alibaba-2018

Reads csv, .csv.gz and .tar.gz from a folder, a file or s3://. Running it again with more files adds only what
is new; a job that died is run again with the same command.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.runtime import run_job
from fleetcast.store import Store


class Config(IngestOptions, JobConfig):
    __doc__ = __doc__

    source: str
    """Raw files: a folder, a file or `s3://bucket/prefix`; or the address of a Prometheus server."""


def main(config: Config) -> dict[str, Any]:
    """Runs ingest."""
    return ingest(Store(config.store), config.source, config.only(IngestOptions))


if __name__ == "__main__":
    run_job(main, Config)

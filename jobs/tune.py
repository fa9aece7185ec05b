"""The papers' sensitivity studies on your telemetry, or a search for the best options of a model.

    python jobs/tune.py --grid heads --store ./store --tabular.table load.parquet --tabular.entity host
        --tabular.time time --tabular.metrics cpu
    python jobs/tune.py --search stgnn --trials 30 --store ./store --windows default

A study shows what one setting does to the error, beside the paper's claim: a figure in the paper's form and a
verdict in words. A search looks at the validation part alone; what it finds is tested with several seeds, and
can be promoted. Trials run on Ray Tune and share one copy of the data. Writes tuning/<name>/report.html and
report.md into the store. Repeating the command goes on where it stopped.
"""

from __future__ import annotations

from typing import Any

from fleetcast.config import JobConfig
from fleetcast.runtime import run_job
from fleetcast.store import Store
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.run import tune


class Config(TuneOptions, JobConfig):
    __doc__ = __doc__


def main(config: Config) -> dict[str, Any]:
    """Runs the studies."""
    return tune(Store(config.store), config.only(TuneOptions))


if __name__ == "__main__":
    run_job(main, Config)

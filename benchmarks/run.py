"""All benchmarks in one run, their tables side by side.

    python benchmarks/run.py                     as `make bench` runs them: ingest of 1 GB, minutes
    python benchmarks/run.py --gb 0.1            a quick look
    python benchmarks/run.py --parts loader --parts models
    python benchmarks/run.py --scale             as `make bench-scale` runs them: large traces, an hour

Each part is a process of its own, so that no part sees the memory or the threads of another, and may be run
alone from the repository's root: `python -m benchmarks.ingest --help`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from fleetcast.config import BaseJobConfig, parse
from fleetcast.errors import InputError
from pydantic import Field

Part = (
    Literal["ingest", "loader", "models", "memory", "tuning"]
    | Literal["tasks", "archives", "streaming", "forecast", "scale"]
)
_SCALE: tuple[Part, ...] = ("tasks", "archives", "streaming", "forecast", "scale")
#: A quick part of `make bench-models`.
_MODELS = ("--models=stgnn", "--models=fusion", "--sizes=20", "--sizes=207")


class Config(BaseJobConfig):
    __doc__ = __doc__

    log_level: str = "WARNING"
    """How much is logged to standard error: DEBUG, INFO, WARNING or ERROR."""
    num_cpus: int = Field(2, ge=1)
    """CPUs of the Ray that is started here, and threads of the job's rivals."""
    parts: tuple[Part, ...] = ("ingest", "loader", "models", "memory", "tuning")
    """What is measured: ingest against DuckDB and Polars, the loader against materialised windows, steps of
    our own models, peak memory over the trace's length, what a trial costs beside its training; what Ray Data
    adds to tasks, long archives, training from shards that stream, a forecast of 4,000 machines, traces that
    grow."""
    scale: bool = False
    """The second half of the parts, which is about large traces, in place of `parts`."""
    gb: float = Field(1.0, gt=0)
    """Raw csv that ingest reads [GB]."""
    repetitions: int = Field(3, ge=1)
    """How often each contender runs; tables show medians."""


def main(config: Config) -> int:
    """Runs the parts one after the other; returns the worst exit code."""
    worst = 0
    for part in _SCALE if config.scale else config.parts:
        flags = [
            f"--repetitions={config.repetitions}",
            f"--log-level={config.log_level}",
            f"--num-cpus={config.num_cpus}",
            *([f"--gb={config.gb}"] if part == "ingest" else []),
            *([f"--threads={config.num_cpus}", *_MODELS] if part == "models" else []),
        ]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{part}", *flags], cwd=Path(__file__).parents[1], check=False
        )
        print(f"\n_{part}: {time.monotonic() - started:.0f} s in all._", flush=True)
        worst = max(worst, abs(done.returncode))
    return worst


if __name__ == "__main__":
    try:
        parsed = parse(Config, sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
    sys.exit(main(parsed))

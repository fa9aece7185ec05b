"""What a trial on Ray Tune costs beside its training, and whether memory grows with the number of trials.

The same study of tiny trials with few and with many seeds, each run in a process and a Ray of its own. What
both have, the start of workers and the first trials, falls out of the difference.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from fleetcast.config import Options
from fleetcast.runtime import ray_session, scratch, set_up_logging
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.run import tune
from pydantic import Field

from benchmarks.report import BenchConfig, machine, megabytes, run, table

#: Two points, so that twice the seeds are the trials.
_POINTS = (1.0, 2.0)


class Config(BenchConfig):
    __doc__ = __doc__

    trials: int = Field(20, ge=4)
    """Trials of the short run."""
    longer: int = Field(5, ge=2)
    """How many times as many the long run has."""
    services: int = Field(20, ge=2)
    """Entities of the data."""


class Measured(Options):
    """One run."""

    seconds: float
    """From the first trial's start to the last one's end."""
    fits: float
    """Of all trials together, training alone [s]."""
    driver: int
    """Largest resident memory of the process that runs the study."""
    worker: int
    """Of the largest process that runs trials."""


def main(config: Config) -> None:
    """Prints both runs and their difference."""
    numbers = (config.trials, config.trials * config.longer)
    short, long = (_apart(config, number) for number in numbers)
    further = numbers[1] - numbers[0]
    wall = config.num_cpus * (long.seconds - short.seconds) / further
    fit = (long.fits - short.fits) / further
    table(
        "Trials on Ray Tune",
        ["", f"{numbers[0]} trials", f"{numbers[1]} trials", "each further trial"],
        [
            [
                "seconds of a CPU",
                *(f"{config.num_cpus * one.seconds:.1f}" for one in (short, long)),
                f"{wall:.2f}",
            ],
            ["of these training", *(f"{one.fits:.1f}" for one in (short, long)), f"{fit:.2f}"],
            ["**beside training**", "", "", f"**{wall - fit:.2f}**"],
            [
                "driver, peak",
                megabytes(short.driver),
                megabytes(long.driver),
                f"{long.driver / short.driver:.2f} ×",
            ],
            [
                "largest worker, peak",
                megabytes(short.worker),
                megabytes(long.worker),
                f"{long.worker / short.worker:.2f} ×",
            ],
        ],
        f"fusion of width 8, 1 epoch of 5 steps, {config.services} services, 4 days; the rest: Ray Tune, "
        f"reading, every window of the validation and test part, writing. {machine()}.",
    )


def _apart(config: Config, trials: int) -> Measured:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as process:
        return process.submit(_run, config.model_dump(), trials).result()


@dataclass
class _Watch:
    """Peaks of this process and of those that run trials, looked at five times a second."""

    driver: int = 0
    worker: int = 0

    def look(self, stop: threading.Event) -> None:
        me = psutil.Process()
        while not stop.wait(0.2):
            self.driver = max(self.driver, me.memory_info().rss)
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                title = (process.info["cmdline"] or [""])[0]
                if title.startswith("ray::ImplicitFunc") and process.info["memory_info"]:
                    self.worker = max(self.worker, process.info["memory_info"].rss)


def _run(options: dict[str, Any], trials: int) -> Measured:
    config = Config(**options)
    set_up_logging(config.log_level)
    tiny = {"hidden": 8, "direct": 8}
    with scratch() as folder:
        store = Store(str(Path(folder) / "store"))
        given = TuneOptions(
            grid="heads",
            points=_POINTS,
            seeds=trials // len(_POINTS),
            synthesize=SynthesizeOptions(trace="services", services=config.services, days=4),
            options={"fusion": tiny},
            fit={"epochs": 1, "steps_per_epoch": 5, "batch_size": 8},
        )
        with ray_session(config.num_cpus):
            tune(store, given.model_copy(update={"seeds": 1}))  # the data, and workers that have started
            watch, stop = _Watch(), threading.Event()
            thread = threading.Thread(target=watch.look, args=(stop,))
            thread.start()
            started = time.monotonic()
            tune(store, given)
            seconds = time.monotonic() - started
            stop.set()
            thread.join()
        found = [store.read_json(path)["cost"] for path in store.list("backtests/trials", MANIFEST)]
        fits = sum(cost["fit_seconds"] for cost in found)
    return Measured(seconds=seconds, fits=fits, driver=watch.driver, worker=watch.worker)


if __name__ == "__main__":
    run(main, Config)

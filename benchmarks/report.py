"""What the benchmarks share: a command line without Ray, interleaved repetitions, Markdown tables."""

from __future__ import annotations

import logging
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fleetcast.config import BaseJobConfig, parse
from fleetcast.errors import InputError
from fleetcast.runtime import set_up_logging
from pydantic import Field

log = logging.getLogger("fleetcast")


class BenchConfig(BaseJobConfig):
    """What every benchmark takes."""

    log_level: str = "WARNING"
    """How much is logged to standard error: DEBUG, INFO, WARNING or ERROR."""
    num_cpus: int = Field(2, ge=1)
    """CPUs of the Ray that is started here, and threads of the job's rivals."""
    repetitions: int = Field(3, ge=1)
    """How often each contender runs; tables show medians."""


Config = TypeVar("Config", bound=BenchConfig)
Result = TypeVar("Result")


def run(main: Callable[[Config], None], config_class: type[Config]) -> None:
    """Runs a benchmark on the config of the command line; exit code 1 where contenders disagree."""
    try:
        config = parse(config_class, sys.argv[1:])
        set_up_logging(config.log_level)
        main(config)
    except InputError as error:
        set_up_logging("INFO")
        log.error("%s", error)
        sys.exit(1)


def interleave(
    contenders: Mapping[str, Callable[[int], Result]], repetitions: int
) -> dict[str, list[Result]]:
    """A B C A B C …, so that a machine that gets slower gets slower for all; each is told its repetition."""
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for repetition in range(repetitions):
        for name, contender in contenders.items():
            results[name].append(contender(repetition))
    return results


def spread_of(values: Sequence[float], digits: int = 2) -> str:
    """`median (min–max)`."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def megabytes(size: float) -> str:
    """`12.3 MB`."""
    return f"{size / 1e6:,.{0 if size >= 1e8 else 1}f} MB"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Prints a Markdown table under a heading."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(f"\n### {title}\n\n{text}\n" + (f"\n{note}\n" if note else ""), flush=True)


def machine() -> str:
    """One line: processor, cores, memory, load, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; "
        f"load average {os.getloadavg()[0]:.1f}; Python {platform.python_version()}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

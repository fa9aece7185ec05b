"""A training step of every model: milliseconds, memory, and the least that its arithmetic and memory allow.

A step is forward pass, loss, backward pass and AdamW, on windows of 12 steps of one metric, 12 steps ahead,
over one random graph. Each model and size has a process of its own with a limit on time and memory, so what
does not fit is a row that says so. A model that is fitted at once is timed fitting the same windows.

The floor of a step is the longer of its multiply-adds at the pace of a large float32 matrix product, and of
writing and reading once what it keeps for the backward pass at the pace of a large copy, both measured on the
same machine in the same run. On a GPU there are also steps in bfloat16 and of compiled models.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import psutil
import torch
from fleetcast.config import Options
from fleetcast.models import MODELS, build
from fleetcast.models.base import Fitted, Model
from fleetcast.models.geometry import Geometry
from fleetcast.runtime import PeakMemory
from fleetcast.schemas import QUANTILES
from fleetcast.training.loop import loss_sum
from fleetcast.windows.batch import Batch, Edges
from fleetcast.windows.calendar import FEATURES
from pydantic import Field

from benchmarks.counting import Pace, Work, count, pace
from benchmarks.report import BenchConfig, log, machine, megabytes, run, spread_of, table

_STEPS = 12
_LAG = 288
_NEIGHBOURS = 13
#: Windows of a batch, and how many of the entities that are this many.
_WINDOWS, _FEW, _MANY = 16, 2, 2000
#: Steps on a GPU that do not count: torch may compile more than once.
_WARM = 3
_CHILD = "from benchmarks.models import child; child()"
#: What a process says that has asked for more memory than there is.
_FULL = ("allocate", "MemoryError", "bad_alloc")
#: Milliseconds of a step at _OF entities that we want to stay below: half of what the official
#: implementations take, and a bound of our own for our models. The official astgcn has one branch; ours has
#: two here, as there is a seasonal lag.
_GOALS = {"graph_wavenet": 913 / 2, "dgcrn": 2830 / 2, "astgcn": 2 * 499 / 2, "stgnn": 150, "fusion": 150}
_OF = 207


class Config(BenchConfig):
    __doc__ = __doc__

    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)  # type: ignore[valid-type]
    """Models of the registry."""
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = (20, _OF, _MANY)
    """N, entities; of 2,000 and more a batch has 2 windows, else 16."""
    repetitions: int = Field(5, ge=1)
    """Steps that count, after the first or, on a GPU, the first three; tables show medians."""
    threads: int = Field(2, ge=1)
    """Threads of torch and of LightGBM."""
    timeout: float = Field(600, gt=0)
    """Most that one model may take at one size, all repetitions together [s]."""
    memory_gb: float = Field(round(0.8 * psutil.virtual_memory().available / 1e9, 1), gt=0)
    """Most memory of a process without a GPU [GB]; 0.8 of what is free if not given."""


Mode = Literal["float32", "bfloat16", "compiled"]


class Case(Options):
    """What one process measures."""

    model: str
    nodes: int
    device: Literal["cpu", "cuda"]
    mode: Mode
    """bfloat16 is mixed precision, as training on a GPU has it; `compiled` is that, compiled by torch."""
    repetitions: int
    threads: int
    memory_gb: float

    @property
    def windows(self) -> int:
        """B."""
        return _FEW if self.nodes >= _MANY else _WINDOWS


class Found(Options):
    """What it found."""

    failure: str = ""
    """Why there is nothing else."""
    seconds: tuple[float, ...] = ()
    """Of each step, or of each fit."""
    memory: int = 0
    """Peak, without what the process held before it had a model; on a GPU, the peak there [bytes]."""
    parameters: int = 0
    work: Work | None = None
    """None of a fit, and on a GPU."""


def main(config: Config) -> None:
    """Prints a table for each size, and one more where there is a GPU."""
    best = pace(config.threads)
    for nodes in config.sizes:
        found = {name: _apart(config, name, nodes, "cpu", "float32") for name in config.models}
        goals = _GOALS if nodes == _OF else {}
        columns = ["", "ms, median (min–max)", "memory", "parameters", "GFLOP", "kept", "floor ms"]
        table(
            f"A training step of each model, N = {nodes:,}",
            [*columns, *(["goal ms"] if goals else [])],
            [_row(name, one, best, goals) for name, one in found.items()],
            f"{_setting(nodes)}; {config.threads} threads, float32, {config.repetitions} repetitions; limits "
            f"{config.memory_gb:.0f} GB and {config.timeout:.0f} s for each model. Memory: beyond a process "
            f"that has imported all. Floor: at {best.flops / 1e9:.0f} GFLOP/s and {best.memory / 1e9:.0f} "
            f"GB/s. {_fitted_note(config)}{machine()}.",
        )
        if torch.cuda.is_available():
            _table_of_gpu(config, nodes)
    if not torch.cuda.is_available():
        print("\nNo GPU here: its tables (float32, bfloat16, compiled) are left out.", flush=True)


def _table_of_gpu(config: Config, nodes: int) -> None:
    modes: tuple[Mode, ...] = ("float32", "bfloat16", "compiled")
    names = [name for name in config.models if not MODELS[name].fitted]
    found = {(n, mode): _apart(config, n, nodes, "cuda", mode) for n, mode in product(names, modes)}
    table(
        f"A training step of each model on a GPU, N = {nodes:,}",
        ["", *(f"{mode} ms" for mode in modes), *(f"{mode} memory" for mode in modes)],
        [
            [
                name,
                *(_milliseconds(found[name, mode]) for mode in modes),
                *(_memory(found[name, mode]) for mode in modes),
            ]
            for name in names
        ],
        f"{_setting(nodes)}; {config.repetitions} repetitions, each complete before the next. Compiled: in "
        f"bfloat16, without the time to compile. Memory: most that torch held on the GPU. "
        f"{torch.cuda.get_device_name()}; {machine()}.",
    )


def _row(name: str, found: Found, best: Pace, goals: dict[str, float]) -> list[str]:
    work = found.work
    return [
        name,
        _milliseconds(found),
        _memory(found),
        f"{found.parameters:,}" if work else "–",
        f"{work.flops / 1e9:,.2f}" if work else "–",
        megabytes(work.kept) if work else "–",
        f"{1e3 * best.floor(work):,.1f}" if work else "–",
        *([f"{goals[name]:,.0f}" if name in goals else "–"] if goals else []),
    ]


def _milliseconds(found: Found) -> str:
    if found.failure:
        return found.failure
    seconds = [1e3 * one for one in found.seconds]
    return spread_of(seconds, 1 if median(seconds) < 100 else 0)


def _memory(found: Found) -> str:
    return "–" if found.failure else megabytes(found.memory)


def _setting(nodes: int) -> str:
    windows = _FEW if nodes >= _MANY else _WINDOWS
    return (
        f"{windows} windows of {nodes:,} entities, look-back and horizon {_STEPS}, 1 metric, "
        f"{len(QUANTILES)} quantiles, 1 seasonal lag, {_NEIGHBOURS} edges a node"
    )


def _fitted_note(config: Config) -> str:
    fitted = [name for name in config.models if MODELS[name].fitted]
    return f"{' and '.join(fitted)}: a fit of one batch. " if fitted else ""


def _apart(config: Config, name: str, nodes: int, device: Literal["cpu", "cuda"], mode: Mode) -> Found:
    """What a process of its own found, or why it found nothing."""
    given = config.model_dump(include={"repetitions", "threads", "memory_gb"})
    case = Case(model=name, nodes=nodes, device=device, mode=mode, **given)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=case.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=config.timeout,
            cwd=Path(__file__).parents[1],
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Found(failure=f"over {config.timeout:,.0f} s")
    if done.returncode == 0:
        return Found.model_validate_json(done.stdout.splitlines()[-1])
    log.warning("%s, N = %d: exit code %d: %s", name, nodes, done.returncode, done.stderr[-1000:])
    if done.returncode == -signal.SIGKILL or any(sign in done.stderr for sign in _FULL):
        return Found(failure="does not fit")
    return Found(failure=f"failed, exit code {done.returncode}")


def child() -> None:
    """The process of one case: reads it as JSON from standard input, and prints what it found as JSON."""
    print(_measured(Case.model_validate_json(sys.stdin.read())).model_dump_json())


def _measured(case: Case) -> Found:
    torch.set_num_threads(case.threads)
    if case.device == "cpu":  # a GPU's driver reserves far more than it uses
        most = int(1e9 * case.memory_gb)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    peak = PeakMemory()
    idle = peak.bytes()
    torch.manual_seed(0)
    batch = _batch(case).to(case.device)
    options = {"num_threads": case.threads} if case.model == "lightgbm" else {}
    model = build(case.model, options, _geometry(case.nodes)).to(case.device)
    if isinstance(model, Fitted):
        fit = partial(model.fit, lambda: [batch], lambda: [batch])
        return Found(seconds=tuple(_timed(fit) for _ in range(case.repetitions)), memory=peak.bytes() - idle)
    if case.mode == "compiled":
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters())
    step = partial(_step, model, batch, optimizer, case)
    work: Work | None = None
    if case.device == "cpu":
        work = count(step, model.parameters())  # the first step, which is not timed
    else:
        for _ in range(_WARM):
            step()
    return Found(
        seconds=tuple(_timed(step) for _ in range(case.repetitions)),
        memory=peak.bytes() - idle if work else torch.cuda.max_memory_allocated(),
        parameters=sum(p.numel() for p in model.parameters()),
        work=work,
    )


def _geometry(nodes: int) -> Geometry:
    return Geometry(
        history=_STEPS,
        horizon=_STEPS,
        metrics=("load",),
        lags=(_LAG,),
        calendar=FEATURES,
        quantiles=QUANTILES,
        entities=tuple(f"e{node}" for node in range(nodes)),
    )


def _batch(case: Case) -> Batch:
    """Random windows, all with the same graph: each node has as many sources, none twice and not itself."""
    b, n = case.windows, case.nodes
    sources = torch.rand(n, n).fill_diagonal_(0).topk(min(_NEIGHBOURS, n - 1)).indices
    pairs = torch.stack([sources.flatten(), torch.arange(n).repeat_interleave(sources.shape[1])])
    index = (pairs[:, None] + n * torch.arange(b)[:, None]).flatten(1)
    seen = torch.ones(b, _STEPS, n, 1, dtype=torch.bool)
    return Batch(
        x=torch.randn(b, _STEPS, n, 1),
        mask=seen,
        time_x=torch.randn(b, _STEPS, FEATURES),
        time_y=torch.randn(b, _STEPS, FEATURES),
        seasonal_x=torch.randn(b, _STEPS, n, 1, 1),
        seasonal_x_mask=seen[..., None],
        seasonal=torch.randn(b, _STEPS, n, 1, 1),
        seasonal_mask=seen[..., None],
        edges=Edges(index, torch.rand(pairs.shape[1]).repeat(b) + 0.1),
        nodes=torch.arange(n),
        y=torch.randn(b, _STEPS, n, 1),
        y_mask=seen,
        origins=torch.arange(b),
    )


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _step(model: Model, batch: Batch, optimizer: torch.optim.AdamW, case: Case) -> None:
    """One training step, complete on return."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(case.device, torch.bfloat16) if case.mode != "float32" else nullcontext():
        output = model(batch)
    total, observed = loss_sum(output, batch, QUANTILES)
    (total / observed).backward()
    optimizer.step()
    if case.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(main, Config)

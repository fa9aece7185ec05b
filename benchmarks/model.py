"""One training step of stgnn: milliseconds forward and backward, and how far from the processor's peak.

FLOPs are those of the matrix products, dense ones as torch counts them and sparse ones by their stored
entries; the peak is a large float32 matrix product on the same machine in the same run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from fleetcast import models
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.schemas import QUANTILES
from fleetcast.training.loop import loss_sum
from fleetcast.windows.batch import Batch, Edges
from fleetcast.windows.calendar import FEATURES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import BenchConfig, interleave, machine, run, spread_of, table

_METRICS = ("cpu", "memory", "disk_io", "net_in", "net_out")
_NEIGHBOURS = 8
_PEAK_SIZE = 1536


class Config(BenchConfig):
    __doc__ = __doc__

    repetitions: int = 5
    """Steps of each size and number of threads; tables show medians."""


@dataclass(frozen=True)
class Size:
    """B windows of N entities, look-back L, horizon H, hidden width D."""

    windows: int
    entities: int
    history: int
    horizon: int
    hidden: int = 64

    def __str__(self) -> str:
        return f"{self.windows} × {self.entities} × {self.history} × {self.horizon}, {self.hidden}"


_SIZES = (Size(32, 16, 48, 12), Size(16, 64, 48, 12), Size(16, 64, 96, 96), Size(4, 256, 48, 12))


def main(config: Config) -> None:
    """Prints a row for each size and number of threads."""
    peaks = {threads: _peak(threads) for threads in (1, 2)}
    rows = []
    for size in _SIZES:
        model, batch = _model(size), _batch(size)
        flops = _flops(model, batch)
        steps = {threads: partial(_step, model, batch, threads) for threads in peaks}
        _step(model, batch, 1, 0)
        timed = interleave({str(threads): step for threads, step in steps.items()}, config.repetitions)
        for threads in peaks:
            forward, backward = ([1e3 * t[i] for t in timed[str(threads)]] for i in (0, 1))
            total = median(f + b for f, b in zip(forward, backward, strict=True))
            rate = flops / total / 1e6
            rows.append(
                [
                    str(size),
                    str(threads),
                    spread_of(forward, 1),
                    spread_of(backward, 1),
                    f"{1e3 * size.windows / total:,.0f}",
                    f"{flops / 1e9:.2f}",
                    f"{rate:.1f}",
                    f"{rate / peaks[threads]:.0%}",
                    f"{sum(p.numel() for p in model.parameters()):,}",
                ]
            )
    columns = ["B × N × L × H, hidden", "threads", "forward ms", "backward ms", "windows/s"]
    table(
        "A training step of stgnn",
        [*columns, "GFLOP", "GFLOP/s", "of peak", "parameters"],
        rows,
        f"5 metrics, {len(QUANTILES)} quantiles, 1 seasonal lag, {_NEIGHBOURS} edges a node; float32; peak: "
        f"{peaks[1]:.0f} GFLOP/s with 1 thread, {peaks[2]:.0f} with 2. {machine()}.",
    )


def _model(size: Size) -> Model:
    torch.manual_seed(0)
    geometry = Geometry(
        history=size.history,
        horizon=size.horizon,
        metrics=_METRICS,
        lags=(288,),
        calendar=FEATURES,
        quantiles=QUANTILES,
        entities=(),
    )
    return models.build("stgnn", {"hidden": size.hidden}, geometry)


def _batch(size: Size) -> Batch:
    b, n, past, ahead, f = size.windows, size.entities, size.history, size.horizon, len(_METRICS)
    nodes = b * n
    target = torch.arange(nodes).repeat_interleave(_NEIGHBOURS)
    source = target // n * n + torch.randint(n, target.shape)
    return Batch(
        x=torch.randn(b, past, n, f),
        mask=torch.ones(b, past, n, f, dtype=torch.bool),
        time_x=torch.randn(b, past, FEATURES),
        time_y=torch.randn(b, ahead, FEATURES),
        seasonal=torch.randn(b, ahead, n, f, 1),
        seasonal_mask=torch.ones(b, ahead, n, f, 1, dtype=torch.bool),
        edges=Edges(torch.stack([source, target]), torch.rand(len(target)) + 0.1),
        nodes=torch.arange(n),
        y=torch.randn(b, ahead, n, f),
        y_mask=torch.ones(b, ahead, n, f, dtype=torch.bool),
        origins=torch.arange(b),
    )


def _step(model: Model, batch: Batch, threads: int, repetition: int) -> tuple[float, float]:
    """Seconds of the forward pass with its loss, and of the backward pass."""
    torch.set_num_threads(threads)
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    loss = _loss(model, batch)
    between = time.perf_counter()
    loss.backward()
    return between - started, time.perf_counter() - between


def _loss(model: Model, batch: Batch) -> Tensor:
    total, count = loss_sum(model(batch), batch, QUANTILES)
    return total / count


def _flops(model: Model, batch: Batch) -> int:
    """Of the matrix products of a step."""
    nodes = batch.x.shape[0] * batch.x.shape[2]
    entries = batch.edges.index.shape[1] + nodes  # with self-loops

    def product(left: tuple[int, ...], right: tuple[int, ...], **_: Any) -> int:
        # The counter sees shapes alone; only an adjacency is [B · N, B · N].
        rows = entries if left == (nodes, nodes) else left[0] * left[1]
        return 2 * rows * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: product}) as counter:
        _loss(model, batch).backward()
    return int(counter.get_total_flops())


def _peak(threads: int) -> float:
    """GFLOP/s of a float32 matrix product, the best of some."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, _PEAK_SIZE, _PEAK_SIZE)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return float(2 * _PEAK_SIZE**3 / best / 1e9)


if __name__ == "__main__":
    run(main, Config)

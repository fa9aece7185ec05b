"""The loader against one that materialises its windows: windows per second, bytes held.

Both give the same batches, bit for bit, in the same order; that is checked before anything is timed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import polars as pl
import torch
from fleetcast import schemas
from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.runtime import scratch
from fleetcast.store import Store
from fleetcast.windows import manifest as manifests
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.build import (
    Grid,
    Places,
    RowGroup,
    build_shard,
    split_dependencies,
    split_telemetry,
    summarise,
)
from fleetcast.windows.edges import last_complete
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest, Scaler, Shard
from fleetcast.windows.order import Item
from fleetcast.windows.views import OpenShard, read_edges
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from benchmarks.report import BenchConfig, interleave, machine, megabytes, run, spread_of, table

_START, _STEP, _SLICE = 1_514_764_800, 300, 3600
_NEIGHBOURS = 4


class LoaderOptions(Options):
    """The dataset: one group, one shard."""

    entities: int = Field(64, ge=2)
    """Entities."""
    days: int = Field(30, ge=1)
    """Length, at steps of 5 min [days]."""
    history: int = Field(48, ge=1)
    """Look-back [steps]."""
    horizon: int = Field(12, ge=1)
    """Horizon [steps]."""
    batch_size: int = Field(32, ge=1)
    """Windows of a batch."""


class Config(LoaderOptions, BenchConfig):
    __doc__ = __doc__


#: The parts of a batch that a materialised dataset copies per window.
_COPIED = (
    "x",
    "mask",
    "time_x",
    "time_y",
    "y",
    "y_mask",
    "seasonal_x",
    "seasonal_x_mask",
    "seasonal",
    "seasonal_mask",
)


class Materialised:
    """All windows as tensors [W, …]; a batch is a selection of their first axis."""

    def __init__(self, store: Store, manifest: Manifest, origins: NDArray[np.int64]) -> None:
        shard = OpenShard.read(store, manifest, manifest.shards[0])
        first = shard.batch(origins[:1])
        self.manifest = manifest
        self.first = int(origins[0])
        self.nodes = first.nodes
        self.edges = read_edges(store, manifest, manifest.shards[0])
        shapes = {name: getattr(first, name) for name in _COPIED}
        self.tensors = {
            name: torch.empty(len(origins), *one.shape[1:], dtype=one.dtype) for name, one in shapes.items()
        }
        for low in range(0, len(origins), 64):
            batch = shard.batch(origins[low : low + 64])
            for name, tensor in self.tensors.items():
                tensor[low : low + 64] = getattr(batch, name)

    @property
    def nbytes(self) -> int:
        """Bytes of all windows."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def batches(self, items: Sequence[Item]) -> Iterator[Batch]:
        """The batches of a plan in its order."""
        m = self.manifest
        for _, origins in items:
            steps = torch.from_numpy(origins)
            chosen = {name: all_.index_select(0, steps - self.first) for name, all_ in self.tensors.items()}
            slices = last_complete(steps * m.step + m.start, self.edges.starts, m.slice)
            yield Batch(**chosen, nodes=self.nodes, edges=self.edges.batch(slices, m.entities), origins=steps)


def main(config: Config) -> None:
    """Prints windows per second and bytes held of both, on telemetry without and with gaps."""
    torch.set_num_threads(1)
    rows = []
    for gaps in (0.0, 0.05):
        with scratch() as folder:
            rows += _compare(config, Store(folder).open_or_create(), gaps)
    windows = f"{config.entities} entities × 5 metrics, look-back {config.history}, horizon {config.horizon}"
    table(
        "Loader against materialised windows",
        ["telemetry, loader", "windows/s, median (min–max)", "relative", "held", "less memory"],
        rows,
        f"{windows}, {config.days} days at 5 min, batches of {config.batch_size}; one epoch of the training "
        f"part in its shuffled order, {config.repetitions} repetitions in turn; same batches bit for bit. "
        f"{machine()}.",
    )


def _compare(config: Config, store: Store, gaps: float) -> list[list[str]]:
    manifest = dataset(store, config, gaps)
    plan = order.training(manifest, config.batch_size, seed=0, epoch=0)
    views = Shards(store, manifest)
    copies = Materialised(store, manifest, manifest.origins(manifest.shards[0], "train"))
    _check_same(views, copies, plan)  # also warms both up
    contenders = {"views": partial(_rate, views, plan), "materialised": partial(_rate, copies, plan)}
    rates = interleave(contenders, config.repetitions)
    ours, theirs = (float(np.median(rates[name])) for name in contenders)
    telemetry = f"{gaps:.0%} missing" if gaps else "no gaps"
    return [
        [
            f"{telemetry}, materialised",
            spread_of(rates["materialised"], 0),
            "1.00",
            megabytes(copies.nbytes),
            "1 ×",
        ],
        [
            f"{telemetry}, **views**",
            spread_of(rates["views"], 0),
            f"{ours / theirs:.2f}",
            megabytes(views.nbytes),
            f"{copies.nbytes / views.nbytes:.0f} ×",
        ],
    ]


def _rate(loader: Shards | Materialised, plan: Sequence[Item], repetition: int) -> float:
    """Windows per second over one epoch, to a consumer that does nothing."""
    started = time.perf_counter()
    windows = sum(len(batch.origins) for batch in loader.batches(plan))
    return windows / (time.perf_counter() - started)


def _check_same(views: Shards, copies: Materialised, plan: Sequence[Item]) -> None:
    for ours, theirs in zip(views.batches(plan), copies.batches(plan), strict=True):
        a, b = (_tensors(batch) for batch in (ours, theirs))
        for name in a:
            if not torch.equal(a[name], b[name]):
                raise InputError(f"loader: {name} of views and of materialised windows differ")


def _tensors(batch: Batch) -> dict[str, Tensor]:
    flat = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "edges"}
    return flat | {"index": batch.edges.index, "weight": batch.edges.weight}


def dataset(store: Store, shape: LoaderOptions, gaps: float, groups: int = 1) -> Manifest:
    """Noise with `gaps` of its bins missing in stretches of an hour, and random edges in every slice; each
    group is a shard."""
    rng = np.random.default_rng(0)
    draft = _draft(shape, groups)
    grid = Grid.of(draft, ("call",))
    statistics = []
    for shard in draft.shards:
        names = draft.groups[shard.group]
        _write(store, rng, draft, names, gaps)
        places = Places.of(draft, pl.DataFrame({"entity": names, "unit": names}))
        split_telemetry(store, "telemetry.parquet", "values.arrow", places, grid)
        split_dependencies(store, "edges.parquet", "links.arrow", places, grid)
        parts = ([RowGroup("values.arrow", 0)], [RowGroup("links.arrow", 0)])
        statistics.append(build_shard(store, grid, shard, names, (), *parts, (shard.path, shard.edges)))
    summary = summarise(statistics, list(range(groups)))
    return draft.model_copy(update={"scaler": summary.scaler})


def _write(
    store: Store, rng: np.random.Generator, draft: Manifest, names: tuple[str, ...], gaps: float
) -> None:
    """The telemetry and the dependencies of one group."""
    steps, n = draft.steps, len(names)
    missing = np.repeat(rng.random((-(-steps // 12), n)) < gaps, 12, axis=0)[:steps].reshape(-1)
    telemetry = pl.DataFrame(
        {
            "entity": np.tile(np.array(names), steps),
            "time": np.repeat((_START + _STEP * np.arange(steps)) * 1000, n),
            **{metric: rng.random(steps * n, np.float32) for metric in draft.metrics},
        }
    ).filter(~missing)
    store.write_table("telemetry.parquet", telemetry.cast({"time": pl.Datetime("ms", "UTC")}).to_arrow())
    slices = steps * _STEP // _SLICE
    edges = pl.DataFrame(
        {
            "time": np.repeat((_START + _SLICE * np.arange(slices)) * 1000, n * _NEIGHBOURS),
            "source": np.array(names)[rng.integers(0, n, slices * n * _NEIGHBOURS)],
            "target": np.tile(np.repeat(np.array(names), _NEIGHBOURS), slices),
            "weight": rng.random(slices * n * _NEIGHBOURS, np.float32),
        }
    ).with_columns(pl.col("time").cast(pl.Datetime("ms", "UTC")), kind=pl.lit("call"))
    store.write_table(
        "edges.parquet", edges.select(schemas.DEPENDENCIES.names).to_arrow().cast(schemas.DEPENDENCIES)
    )


def _draft(shape: LoaderOptions, groups: int) -> Manifest:
    steps = shape.days * 86_400 // _STEP
    return Manifest(
        name="benchmark",
        level="machine",
        metrics=("cpu", "memory", "disk_io", "net_in", "net_out"),
        start=_START,
        step=_STEP,
        steps=steps,
        history=shape.history,
        horizon=shape.horizon,
        lags=(),
        max_gap=12,
        slice=_SLICE,
        boundaries=manifests.boundaries(steps, (0.6, 0.2, 0.2), shape.history, shape.horizon),
        groups=tuple(tuple(f"m_{g}_{i}" for i in range(shape.entities)) for g in range(groups)),
        borders=((),) * groups,
        scaler=Scaler(mean=(), std=()),
        seasonal_error=(),
        observed=(),
        shards=tuple(
            Shard(
                path=f"windows/benchmark/{g}.parquet",
                edges=f"windows/benchmark/{g}-edges.parquet",
                group=g,
                start=0,
                stop=steps,
                first=0,
                last=steps,
            )
            for g in range(groups)
        ),
        fingerprint="benchmark",
    )


if __name__ == "__main__":
    run(main, Config)

"""Training beyond memory: what reading ahead gains, what the process holds, what a second worker gains.

Shards come from a local folder and from a real S3 server on this machine, and are read while the ones before
them are used, or, as its rival, when their first batch is due. All give the same losses, bit for bit; that is
checked. Workers are those of Ray Train, with a thread each, as the training job has them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from fleetcast import models
from fleetcast.errors import InputError
from fleetcast.models import MODELS
from fleetcast.models.geometry import Geometry
from fleetcast.runtime import PeakMemory, ray_session, scratch
from fleetcast.schemas import QUANTILES
from fleetcast.store import Store
from fleetcast.training.loop import Progress, Run, train
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import fit
from fleetcast.windows import order
from fleetcast.windows.batch import Batch
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest
from fleetcast.windows.order import Item
from fleetcast.windows.views import OpenShard, read_values
from pydantic import Field

from benchmarks.loader import LoaderOptions, dataset
from benchmarks.report import BenchConfig, interleave, log, machine, megabytes, run, spread_of, table

Part = Literal["reading", "training", "device", "memory", "workers"]


class Config(LoaderOptions, BenchConfig):
    __doc__ = __doc__

    parts: tuple[Part, ...] = ("reading", "training", "device", "memory", "workers")
    """What is measured."""
    groups: int = Field(16, ge=5)
    """Shards of the dataset, one for each group."""
    days: int = Field(2, ge=1)
    """Length, at steps of 5 min [days]."""
    history: int = Field(12, ge=1)
    """Look-back [steps]."""
    models: tuple[Literal[tuple(MODELS)], ...] = ("stgnn", "dlinear")  # type: ignore[valid-type]
    """Models that are trained: one that takes its time, one that takes little."""
    device_ms: float = Field(5, gt=0)
    """How long a step keeps a device busy that is not the CPU [ms]."""
    longer: int = Field(4, ge=2)
    """How many times as many shards the larger dataset has whose memory is compared."""
    epochs: int = Field(4, ge=2)
    """Epochs of the workers; the first does not count."""
    hidden: int = Field(32, ge=1)
    """Width of stgnn."""
    stores: tuple[Literal["local", "S3"], ...] = ("local", "S3")
    """Where the shards are; for S3 a server is started here."""


class WhenDue(Shards):
    """Reads a shard when its first batch is due, and assembles a batch when it is asked for."""

    def batches(
        self, items: Sequence[Item], device: torch.device | None = None
    ) -> Generator[Batch, None, None]:
        """The batches of a plan in its order."""
        for index, origins in items:
            batch = self[index].batch(origins)
            yield batch.pinned(device) if device is not None and device.type == "cuda" else batch


Loader = Callable[[Store, Manifest], Shards]
_LOADERS: dict[str, Loader] = {"when due": WhenDue, "**ahead**": Shards}


def main(config: Config) -> None:
    """Prints a table for each part."""
    torch.set_num_threads(1)
    with _stores(config) as (manifest, stores):
        parts: dict[Part, Callable[[Config, Manifest, dict[str, Store]], None]] = {
            "reading": _reading,
            "training": _training,
            "device": _device,
            "memory": _memory,
            "workers": _workers,
        }
        for part in config.parts:
            parts[part](config, manifest, stores)


@contextmanager
def _stores(config: Config) -> Iterator[tuple[Manifest, dict[str, Store]]]:
    """The same dataset in a local folder and on S3."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(scratch()))
        local = Store(str(folder / "local")).open_or_create()
        manifest = dataset(local, config, 0.02, config.groups)
        if "S3" not in config.stores:
            yield manifest, {"local": local}
            return
        from tests.object_store import BUCKET, serve

        os.environ |= stack.enter_context(serve(folder / "s3")).environment
        far = Store(f"s3://{BUCKET}/benchmark")
        for shard in manifest.shards:
            for name in (shard.path, shard.edges):
                far.fs.put_file(local.path(name), far.path(name))
        yield manifest, {"local": local, "S3": far}


def _bytes(manifest: Manifest) -> int:
    """Of all values in memory, as `shard_mb` counts them."""
    rows = sum((s.last - s.first) * len(manifest.groups[s.group]) for s in manifest.shards)
    return 4 * rows * len(manifest.metrics)


def _data(config: Config, manifest: Manifest) -> str:
    return f"{len(manifest.shards)} shards of {_shape(config, manifest)}"


def _shape(config: Config, manifest: Manifest) -> str:
    return (
        f"{megabytes(_bytes(manifest) / len(manifest.shards))}: {config.entities} entities × "
        f"{len(manifest.metrics)} metrics, 2% missing; look-back {config.history}, horizon {config.horizon}, "
        f"batches of {config.batch_size} windows"
    )


def _options(config: Config, **others: Any) -> TrainOptions:
    return TrainOptions(**{"batch_size": config.batch_size, "stgnn": {"hidden": config.hidden}, **others})


def _reading(config: Config, manifest: Manifest, stores: dict[str, Store]) -> None:
    """How fast shards come from each store, and are opened."""

    def rate(read: Callable[[Store, Manifest, Any], Any], store: Store, _: int) -> float:
        started = time.perf_counter()
        for shard in manifest.shards:
            read(store, manifest, shard)
        return _bytes(manifest) / 1e6 / (time.perf_counter() - started)

    ways: dict[str, Callable[..., Any]] = {"values read": read_values, "shard opened": OpenShard.read}
    contenders = {
        f"{where} {what}": partial(rate, read, store)
        for where, store in stores.items()
        for what, read in ways.items()
    }
    rates = interleave(contenders, config.repetitions)
    table(
        "Reading shards, one after the other",
        ["store", *(f"{what}, MB/s" for what in ways)],
        [[where, *(spread_of(rates[f"{where} {what}"], 0) for what in ways)] for where in stores],
        f"{_data(config, manifest)}; MB of float32 values; one thread. Opened: scaled, gaps filled, edges "
        f"by slice. {machine()}.",
    )


def _training(config: Config, manifest: Manifest, stores: dict[str, Store]) -> None:
    """One epoch of training and validation in this process, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for model in config.models:
        contenders = {
            f"{model}, {where}, {how}": partial(_epoch, config, manifest, model, loader, store, device=device)
            for where, store in stores.items()
            for how, loader in _LOADERS.items()
        }
        found = interleave(contenders, config.repetitions)
        losses = sorted({one["val_loss"] for each in found.values() for one in each})
        # Sums over edges have no order on a GPU.
        if losses[-1] > losses[0] * (1 + (0.01 if device == "cuda" else 0)):
            raise InputError(f"streaming: losses of {model} differ: {losses}, expected the same for all")
        rows += [
            [
                name,
                spread_of([one["windows_per_s"] for one in each], 0),
                spread_of([100 * one["wait_share"] for one in each], 1),
            ]
            for name, each in found.items()
        ]
    table(
        "Training from shards that stream",
        ["model, store, shards are read", "windows/s, median (min–max)", "waiting, % of the epoch"],
        rows,
        f"{_data(config, manifest)}; an epoch of training and validation, one thread of torch, "
        + (
            f"{torch.cuda.get_device_name()} in bfloat16; same losses but for the order of sums. "
            if device == "cuda"
            else "on the CPU; same losses bit for bit. "
        )
        + f"{machine()}.",
    )


def _epoch(
    config: Config,
    manifest: Manifest,
    model: str,
    loader: Loader,
    store: Store,
    repetition: int,
    device: str = "cpu",
) -> dict[str, float]:
    torch.manual_seed(0)
    options = _options(config, epochs=1)
    net = models.build(model, getattr(options, model).model_dump(), Geometry.of(manifest, QUANTILES))
    net.to(device)
    state = Run.start(net, loader(store, manifest), options)
    train(state, lambda *_: None)
    return state.progress.history[0]


def _device(config: Config, manifest: Manifest, stores: dict[str, Store]) -> None:
    """Waiting of a consumer whose steps leave the CPU alone, as those of a GPU do."""
    plan = order.training(manifest, config.batch_size, seed=0, epoch=0)

    def consume(loader: Loader, store: Store, _: int) -> tuple[float, float]:
        batches = iter(loader(store, manifest).batches(plan))
        started, busy, windows = time.perf_counter(), 0.0, 0
        for batch in batches:
            step = time.perf_counter()
            time.sleep(config.device_ms / 1000)
            busy += time.perf_counter() - step
            windows += len(batch.origins)
        seconds = time.perf_counter() - started
        return windows / seconds, 100 * (1 - busy / seconds)

    contenders = {
        f"{where}, {how}": partial(consume, loader, store)
        for where, store in stores.items()
        for how, loader in _LOADERS.items()
    }
    found = interleave(contenders, config.repetitions)
    table(
        f"Waiting of a device whose steps take {config.device_ms:g} ms",
        ["store, shards are read", "windows/s, median (min–max)", "waiting, % of the epoch"],
        [
            [name, spread_of([rate for rate, _ in each], 0), spread_of([share for _, share in each], 1)]
            for name, each in found.items()
        ],
        f"{_data(config, manifest)}; the step is a sleep, so reading has the CPU for itself. {machine()}.",
    )


def _memory(config: Config, manifest: Manifest, stores: dict[str, Store]) -> None:
    """Peak memory of a process that trains, on a dataset and on one that is larger."""
    rows = []
    for groups in (config.groups, config.groups * config.longer):
        spawn = multiprocessing.get_context("spawn")
        with scratch() as folder, ProcessPoolExecutor(1, spawn) as process:
            larger = dataset(Store(folder).open_or_create(), config, 0.02, groups)
            peaks = process.submit(_peaks, config, larger, folder).result()
        most = 2 * order.POOL * max(peaks["shards"])
        rows.append(
            [
                f"{groups}",
                megabytes(_bytes(larger)),
                *(megabytes(peak) for peak in peaks["peaks"]),
                megabytes(most),
            ]
        )
    table(
        f"Memory of a training process when the dataset grows {config.longer} ×",
        ["shards", "values in all", "when due", "**ahead**", "two pools of open shards"],
        rows,
        f"Shards of {_shape(config, manifest)}; one epoch of {config.models[-1]}: the peak of the process "
        f"less what it held before. {machine()}.",
    )


def _peaks(config: Config, manifest: Manifest, folder: str) -> dict[str, list[int]]:
    """In a fresh process: how much an epoch adds to its memory for each loader; sizes of open shards."""
    import psutil

    torch.set_num_threads(1)
    store = Store(folder)
    sizes = [OpenShard.read(store, manifest, shard).nbytes for shard in manifest.shards[:2]]
    peaks = []
    for loader in _LOADERS.values():
        before, peak = psutil.Process().memory_info().rss, PeakMemory()
        _epoch(config, manifest, config.models[-1], loader, store, 0)
        peaks.append(peak.bytes() - before)
    return {"shards": sizes, "peaks": peaks}


def _workers(config: Config, manifest: Manifest, stores: dict[str, Store]) -> None:
    """Windows per second of one worker of Ray Train and of two."""
    model = config.models[0]

    def rate(workers: int, repetition: int) -> dict[str, float]:
        options = _options(config, model=model, epochs=config.epochs, patience=config.epochs, workers=workers)
        geometry = Geometry.of(manifest, QUANTILES)
        progress: Progress
        progress, _, _ = fit(stores["local"], manifest, options, geometry, f"{workers}-{repetition}")
        later = progress.history[1:]
        figures = ("windows_per_s", "wait_share")
        return {name: statistics.median(epoch[name] for epoch in later) for name in figures}

    with ray_session(config.num_cpus):
        found = interleave({f"{n}": partial(rate, n) for n in (1, 2)}, config.repetitions)
    log.info("workers: %s", found)
    alone = statistics.median(one["windows_per_s"] for one in found["1"])
    table(
        "Workers of a thread each",
        ["workers", "windows/s, median (min–max)", "of one worker", "waiting, % of the epoch"],
        [
            [
                workers,
                spread_of([one["windows_per_s"] for one in each], 0),
                f"{statistics.median(one['windows_per_s'] for one in each) / alone:.2f} ×",
                spread_of([100 * one["wait_share"] for one in each], 1),
            ]
            for workers, each in found.items()
        ],
        f"{model} by `fit` on Ray Train, gloo, the store local; {_data(config, manifest)}; each worker has "
        f"batches of its own, so two take half as many steps, each with twice as many windows; epochs 2 to "
        f"{config.epochs}, start-up not counted. {machine()}.",
    )


if __name__ == "__main__":
    run(main, Config)

"""The training job: Ray Train around the loop, then evaluation, then a model in the store.

Everything that a run depends on makes its name, so the same command finds the run it was, goes on from the
last checkpoint, and does nothing once the model is there.
"""

from __future__ import annotations

import logging
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fleetcast import memory, models
from fleetcast.models import saving
from fleetcast.models.base import ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.runtime import PeakMemory, lent, log_to, worker_logs
from fleetcast.schemas import QUANTILES
from fleetcast.store import MANIFEST, Store, fingerprint
from fleetcast.training import checkpoints
from fleetcast.training.curves import curves
from fleetcast.training.loop import Progress, Run, train
from fleetcast.training.options import TrainOptions
from fleetcast.training.register import Trained, register, select, verdict
from fleetcast.windows import manifest as manifests
from fleetcast.windows.loader import Shards
from fleetcast.windows.manifest import Manifest
from fleetcast.windows.order import POOL

log = logging.getLogger("fleetcast")

#: Where Ray Train keeps its state and the checkpoints of runs that have not ended.
WORK = "_work/training"


def train_model(store: Store, options: TrainOptions) -> dict[str, Any]:
    """Trains, evaluates and saves a model; selects it if it beats the naive rungs on the validation part."""
    store.open_existing()
    manifest = manifests.load(store, options.windows)
    config: ModelConfig = getattr(options, options.model)
    relevant = options.model_dump(mode="json", exclude={"max_failures", "cpus_per_worker", "tensorboard"})
    digest = fingerprint([manifest.fingerprint, relevant])
    end = datetime.fromtimestamp(manifest.start + manifest.step * manifest.steps, UTC)
    folder = f"models/{options.model}/{end:%Y%m%dT%H%M%SZ}-{digest}"
    if store.exists(f"{folder}/{MANIFEST}"):
        log.info("train: %s is complete", folder)
        saved = store.read_json(f"{folder}/metrics.json")
        return {**saved["summary"], "model": folder, "selected": _select(store, folder), "skipped": True}

    geometry = Geometry.of(manifest, QUANTILES)
    place = options.tensorboard and f"{options.tensorboard}/{folder}"
    told = options.model_copy(update={"tensorboard": place})
    progress, weights, peak = fit(store, manifest, told, geometry, digest)
    work = f"_work/models/{digest}"
    saving.save(store, f"{work}/model", options.model, config, geometry, weights)
    trained = Trained(options.model, progress, options.model_dump(mode="json"), peak)
    summary = register(store, manifest, work, folder, trained)
    store.remove(work)
    store.remove(f"_work/training/{digest}")
    return {**summary, "model": folder, "selected": _select(store, folder), "skipped": False}


def _select(store: Store, folder: str) -> str:
    """Serves the model, or its best naive rung if that is better on the validation part."""
    chosen = verdict(store, folder)
    select(store, chosen)
    return chosen["rung"]


def fit(
    store: Store,
    manifest: Manifest,
    options: TrainOptions,
    geometry: Geometry,
    digest: str,
) -> tuple[Progress, dict[str, torch.Tensor], int]:
    """Runs Ray Train to the end; returns progress, the best weights, and the largest memory of a worker.

    Its state is kept below `_work/training/<digest>`: called again it goes on from the last checkpoint there.
    """
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def worker(config: dict[str, Any]) -> int:
        sender = log_to(config["log"])
        try:
            return _worker(store, manifest, options, geometry)
        finally:
            sender.stop()

    gpu = {"GPU": 1.0} if options.gpu else {}
    # A pool in use and one that is read ahead.
    room = lent(memory.windows(manifest, 2 * POOL), "train")
    log.info(
        "train: %s on %d worker(s), %d training windows of %d group(s)",
        options.model,
        options.workers,
        manifest.windows("train") * len(manifest.groups),
        len(manifest.groups),
    )
    with worker_logs() as queue:
        result = TorchTrainer(
            worker,
            train_loop_config={"log": queue},
            torch_config=TorchConfig(backend="nccl" if options.gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=options.workers,
                use_gpu=options.gpu,
                resources_per_worker={"CPU": options.cpus_per_worker, "memory": room or 0, **gpu},
            ),
            run_config=RunConfig(
                name=digest,
                storage_path=store.path(WORK),
                storage_filesystem=store.arrow_fs,
                failure_config=FailureConfig(max_failures=options.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        ).fit()
    assert result.checkpoint is not None, "every epoch reports a checkpoint"
    with result.checkpoint.as_directory() as folder:
        best = checkpoints.read_best(Path(folder))
        return checkpoints.read_progress(Path(folder)), best, int(result.return_value or 0)


def _worker(store: Store, manifest: Manifest, options: TrainOptions, geometry: Geometry) -> int:
    """One rank: from the last checkpoint to the end. Returns the largest memory of the process."""
    import ray.train
    import ray.train.torch

    peak = PeakMemory()
    context = ray.train.get_context()
    config: ModelConfig = getattr(options, options.model)
    torch.manual_seed(options.seed)
    device = ray.train.torch.get_device()
    net = models.build(options.model, config.model_dump(), geometry).to(device)
    run = Run.start(net, Shards(store, manifest), options, context.get_world_rank(), context.get_world_size())
    if any(True for _ in net.parameters()):  # DDP refuses a model that has none
        run.net = ray.train.torch.prepare_model(net)
    last = ray.train.get_checkpoint()
    if last is not None:
        with last.as_directory() as folder:
            checkpoints.restore(run, Path(folder))
        log.info("train: rank %d goes on after epoch %d", run.rank, run.progress.epoch)

    def keep(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Ray's own copying says nothing of a file that a store did not take."""
        place = f"{WORK}/{context.get_experiment_name()}/{name}"
        for part in Path(checkpoint.path).iterdir():
            with store.write(f"{place}/{part.name}") as file:
                file.write(part.read_bytes())
        return ray.train.Checkpoint(store.path(place), store.arrow_fs)

    def save(run: Run, figures: dict[str, float]) -> None:
        watch(run, figures)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if run.rank == 0:
                checkpoints.write(run, Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(figures, checkpoint=checkpoint, checkpoint_upload_fn=keep)

    with curves(options.tensorboard if run.rank == 0 else None) as watch:
        train(run, save)
    return peak.bytes()

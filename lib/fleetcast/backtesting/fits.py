"""How a trial's model is fitted: in this process, or by DDP workers of Ray Train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fleetcast.backtesting.data import Data
from fleetcast.backtesting.plan import Trial
from fleetcast.models.base import Model
from fleetcast.store import fingerprint
from fleetcast.training.curves import curves
from fleetcast.training.loop import Progress, Run, train
from fleetcast.training.run import fit as fit_on_workers

#: The trial's model before its fit → how the fit went, and the weights of its best epoch.
Fit = Callable[[Data, Trial, Model], tuple[Progress, dict[str, Tensor]]]


def by(
    workers: int,
    cpus: float = 1,
    gpus: float = 0,
    tensorboard: str | None = None,
) -> Fit:
    """A fit by so many workers with so many CPUs and GPUs each; losses by epoch go below the folder
    `tensorboard`."""
    if workers == 1:
        return partial(alone, tensorboard=tensorboard)
    return partial(spread, cpus_per_worker=cpus, gpu=gpus > 0, tensorboard=tensorboard)


def alone(
    data: Data, trial: Trial, model: Model, tensorboard: str | None = None
) -> tuple[Progress, dict[str, Tensor]]:
    """In this process, with all its threads. Raises DivergedError."""
    run = Run.start(model, data.shards(), trial.fit)
    with curves(tensorboard and f"{tensorboard}/{trial.folder}") as watch:
        train(run, watch)
    return run.progress, run.best


def spread(
    data: Data,
    trial: Trial,
    model: Model,
    cpus_per_worker: float = 1,
    gpu: bool = False,
    tensorboard: str | None = None,
) -> tuple[Progress, dict[str, Tensor]]:
    """By the trial's workers, each of which opens the shards that it needs. One that was killed goes on after
    its last epoch. Raises Ray Train's error if it fails again and again."""
    place = tensorboard and f"{tensorboard}/{trial.folder}"
    chosen = {"cpus_per_worker": cpus_per_worker, "gpu": gpu, "tensorboard": place}
    options = trial.train_options(data.manifest.name).model_copy(update=chosen)
    digest = fingerprint([trial.model_dump(mode="json")])
    progress, best, _ = fit_on_workers(data.store, data.manifest, options, model.geometry, digest)
    data.store.remove(f"_work/training/{digest}")
    return progress, best

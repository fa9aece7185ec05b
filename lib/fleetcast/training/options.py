"""What training can be told."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from fleetcast.config import Options
from fleetcast.models import MODELS

#: One field for each model of the registry, with its options.
_FIELDS: dict[str, Any] = {
    name: (config, Field(config(), description=f"Options of {name}.")) for name, config in MODELS.items()
}


class Budget(Options):
    """What a fit may cost; the same for every model."""

    epochs: int = Field(20, ge=1)
    """Most passes over the training part."""
    patience: int = Field(4, ge=1)
    """Epochs without a better validation loss before training stops."""
    batch_size: int = Field(16, ge=1)
    """Windows of one group in a batch, on each worker."""
    steps_per_epoch: int | None = Field(None, ge=1)
    """Batches of an epoch on each worker, drawn anew each time; all of them if not given."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of AdamW."""
    clip_norm: float = Field(5.0, gt=0)
    """Largest norm of the gradient."""


class FitOptions(Budget):
    """How a model is fitted."""

    learning_rate: float = Field(2e-3, gt=0)
    """Of AdamW; falls to zero along a cosine over the epochs."""
    seed: int = Field(0, ge=0)
    """Of initial weights and the order of windows."""


class TrainOptions(create_model("ModelOptions", __base__=FitOptions, **_FIELDS)):  # type: ignore[misc]
    """From a windows dataset to a model."""

    windows: str = "default"
    """Name of the windows dataset."""
    model: Literal[tuple(MODELS)] = "stgnn"  # type: ignore[valid-type]
    """Which model to train."""
    workers: int = Field(1, ge=1)
    """DDP workers. Part of what makes a run reproducible."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of each worker."""
    gpu: bool = False
    """Whether each worker has a GPU (NCCL and mixed precision) or none (gloo)."""
    tensorboard: str | None = None
    """A folder for TensorBoard's files, which every node can write to; not written if not given."""
    max_failures: int = Field(2, ge=0)
    """How often a failed worker group is restarted from the last checkpoint."""

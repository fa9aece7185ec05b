"""What training can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fleetcast.config import Options
from fleetcast.models.stgnn import StgnnConfig


class TrainOptions(Options):
    """From a windows dataset to a model."""

    windows: str = "default"
    """Name of the windows dataset."""
    model: Literal["stgnn"] = "stgnn"
    """Which model to train."""
    stgnn: StgnnConfig = StgnnConfig()
    """Options of stgnn."""
    epochs: int = Field(20, ge=1)
    """Most passes over the training part."""
    patience: int = Field(4, ge=1)
    """Epochs without a better validation loss before training stops."""
    batch_size: int = Field(16, ge=1)
    """Windows of one group in a batch, on each worker."""
    steps_per_epoch: int | None = Field(None, ge=1)
    """Batches of an epoch on each worker, drawn anew each time; all of them if not given."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of AdamW; falls to zero along a cosine over the epochs."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of AdamW."""
    clip_norm: float = Field(5.0, gt=0)
    """Largest norm of the gradient."""
    seed: int = Field(0, ge=0)
    """Of initial weights and the order of windows."""
    workers: int = Field(1, ge=1)
    """DDP workers. Part of what makes a run reproducible."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs of each worker."""
    gpu: bool = False
    """Whether each worker has a GPU (NCCL and mixed precision) or none (gloo)."""
    max_failures: int = Field(2, ge=0)
    """How often a failed worker group is restarted from the last checkpoint."""

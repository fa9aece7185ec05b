"""What every model is: options that build a module, and a module that forecasts batches of any geometry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from fleetcast.config import Options
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import NaiveBlend
from fleetcast.windows.batch import Batch

#: A part of a dataset: each call streams all of its batches once.
Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class Output:
    """A model's forecast in scaled units."""

    mean: Tensor
    """[B, H, O, F] of the group's own entities."""
    quantiles: Tensor | None
    """[B, H, O, F, Q], or None where the geometry asks for no quantiles."""


class Model(nn.Module, ABC):
    """A forecaster: what its architecture makes of a batch, added to the naive forecast if it is residual."""

    def __init__(self, config: ModelConfig, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.looks_around = config.looks_around
        self.blend = NaiveBlend(geometry) if config.residual else None

    @property
    def outputs(self) -> tuple[int, int]:
        """(F, 1 + Q): what `raw` gives of each node and horizon step."""
        return len(self.geometry.metrics), 1 + len(self.geometry.quantiles)

    @property
    def device(self) -> torch.device:
        """Where its tensors are. A fitted model has buffers alone; one without any tensor is on the CPU."""
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    def forward(self, batch: Batch) -> Output:
        """Forecasts the own entities in all windows of a batch; reads neither `y` nor `y_mask`.

        Raises InputError if its shapes are not the geometry's.
        """
        if not self.looks_around:
            batch = batch.alone()
        self.geometry.check(batch)
        outputs = self.raw(batch).float()
        if self.blend is not None:
            outputs = outputs + self.blend(batch)[..., None]
        outputs = outputs[:, :, : batch.own]
        return Output(outputs[..., 0], outputs[..., 1:] if self.geometry.quantiles else None)

    @abstractmethod
    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]: the mean and the quantiles, before the naive forecast is added."""


class Fitted(Model):
    """A model without gradients: `fit` sets its buffers at once. Before that it forecasts zero, the mean."""

    @abstractmethod
    def fit(self, train: Batches, validation: Batches) -> None:
        """Learns from all training batches, and chooses what is to be chosen on the validation batches.

        Batches are looked at one by one, in any order and of any size, so memory is bounded.
        """


class ModelConfig(Options, ABC):
    """Options of one model."""

    fitted: ClassVar[bool] = False
    """Whether it builds a `Fitted` model."""
    looks_around: ClassVar[bool] = False
    """Whether an entity's forecast looks at other entities: only then is the model shown a group's border."""

    residual: bool = True
    """Whether outputs are offsets from a learned blend of last value and seasonal values; the published
    models have none."""

    @abstractmethod
    def build(self, geometry: Geometry) -> Model:
        """A new module with its initial weights, drawn from torch's global generator."""

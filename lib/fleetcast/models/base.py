"""What every model is: an `Options` subclass that builds a module from the geometry of its batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.windows.batch import Batch
from fleetcast.windows.calendar import FEATURES
from fleetcast.windows.manifest import Manifest


class Geometry(Options):
    """The shapes and meanings of a model's batches; part of a saved model."""

    history: int
    """L, look-back steps."""
    horizon: int
    """H, forecast steps."""
    metrics: tuple[str, ...]
    """F input metrics, in the order of the last axis of `x`; all of them are forecast."""
    lags: tuple[int, ...]
    """S seasonal lags in steps, each at least the horizon."""
    calendar: int
    """C time features."""
    quantiles: tuple[float, ...]
    """Q quantile levels, rising; empty for point forecasts only."""

    @classmethod
    def of(cls, data: Manifest, quantiles: tuple[float, ...]) -> Geometry:
        """The shapes of a dataset's batches, for a model of these quantiles."""
        return cls(
            history=data.history,
            horizon=data.horizon,
            metrics=data.metrics,
            lags=data.lags,
            calendar=FEATURES,
            quantiles=quantiles,
        )

    def check(self, batch: Batch) -> None:
        """Raises InputError naming the first input of a batch whose shape is not this geometry's."""
        windows, _, nodes, _ = batch.x.shape
        features, seasons = len(self.metrics), len(self.lags)
        expected = {
            "x": (windows, self.history, nodes, features),
            "mask": (windows, self.history, nodes, features),
            "time_x": (windows, self.history, self.calendar),
            "time_y": (windows, self.horizon, self.calendar),
            "seasonal": (windows, self.horizon, nodes, features, seasons),
            "seasonal_mask": (windows, self.horizon, nodes, features, seasons),
        }
        for name, shape in expected.items():
            given = tuple(getattr(batch, name).shape)
            if given != shape:
                raise InputError(f"batch: {name} of shape {given}, expected {shape}")


@dataclass(frozen=True)
class Output:
    """A model's forecast in scaled units."""

    mean: Tensor
    """[B, H, N, F]."""
    quantiles: Tensor | None
    """[B, H, N, F, Q], or None where the geometry asks for no quantiles."""


class Model(nn.Module, ABC):
    """A forecaster. Node identity is never an input, so any number of entities may come."""

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """Forecasts all windows of a batch; reads neither `y` nor `y_mask`."""


class ModelConfig(Options, ABC):
    """Options of one model."""

    @abstractmethod
    def build(self, geometry: Geometry) -> Model:
        """A new module with its initial weights, drawn from torch's global generator."""

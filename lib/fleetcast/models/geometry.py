"""The shapes and meanings of a model's batches."""

from __future__ import annotations

from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.windows.batch import Batch
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
    marks: tuple[str, ...] = ()
    """What the last of them are: holidays and events."""
    timezone: str = "UTC"
    """In which the others count days."""
    quantiles: tuple[float, ...]
    """Q quantile levels, rising; empty for point forecasts only."""
    entities: tuple[str, ...]
    """All entities of the dataset, group after group: a batch's `nodes` are positions in this list. Models
    with node embeddings have one for each."""

    @classmethod
    def of(cls, data: Manifest, quantiles: tuple[float, ...]) -> Geometry:
        """The shapes of a dataset's batches, for a model of these quantiles."""
        return cls(
            history=data.history,
            horizon=data.horizon,
            metrics=data.metrics,
            lags=data.lags,
            calendar=data.calendar.features,
            marks=data.marks,
            timezone=data.timezone,
            quantiles=quantiles,
            entities=data.names,
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
            "seasonal_x": (windows, self.history, nodes, features, seasons),
            "seasonal_x_mask": (windows, self.history, nodes, features, seasons),
            "seasonal": (windows, self.horizon, nodes, features, seasons),
            "seasonal_mask": (windows, self.horizon, nodes, features, seasons),
            "nodes": (nodes,),
        }
        for name, shape in expected.items():
            given = tuple(getattr(batch, name).shape)
            if given != shape:
                raise InputError(f"batch: {name} of shape {given}, expected {shape}")

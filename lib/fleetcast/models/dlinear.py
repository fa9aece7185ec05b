"""dlinear: a look-back split into trend and remainder, each mapped linearly to the horizon.

DLinear of "Are Transformers Effective for Time Series Forecasting?" (Zeng et al., AAAI 2023) with its maps
shared by all nodes and metrics. Where everything was observed and `residual` is off it is the published
model; quantiles are further outputs of the same maps.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch


class DlinearConfig(ModelConfig):
    """Options of dlinear."""

    kernel: Annotated[int, Field(ge=1)] = 25
    """Steps of the moving average, centred, that makes the trend; where it is even or longer than the
    look-back, the next shorter odd number that fits."""

    def build(self, geometry: Geometry) -> Dlinear:
        """A new module with its initial weights."""
        return Dlinear(self, geometry)


class Dlinear(Model):
    """The module. It reads the filled values, and corrects by a linear map of which of them are fillings."""

    def __init__(self, config: DlinearConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        longest = min(config.kernel, geometry.history)
        self.kernel = longest - (longest + 1) % 2
        outputs = geometry.horizon * (1 + len(geometry.quantiles))
        self.trend = nn.Linear(geometry.history, outputs)
        # An average over one step leaves no remainder.
        self.remainder = nn.Linear(geometry.history, outputs) if self.kernel > 1 else None
        self.missing = nn.Linear(geometry.history, outputs, bias=False)

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        x = batch.x.permute(0, 2, 3, 1)
        trend = moving_average(x, self.kernel)
        h = self.trend(trend) + self.missing((~batch.mask).to(x.dtype).permute(0, 2, 3, 1))
        if self.remainder is not None:
            h = h + self.remainder(x - trend)
        return h.unflatten(-1, (self.geometry.horizon, -1)).movedim(-2, 1)


def moving_average(x: Tensor, kernel: int) -> Tensor:
    """[B, N, F, L] → the same shape: the mean of the odd `kernel` steps around each; the first and the last
    step are repeated beyond the edges."""
    series = functional.pad(x.flatten(1, 2), (kernel // 2, kernel // 2), mode="replicate")
    return functional.avg_pool1d(series, kernel, stride=1).view(x.shape)

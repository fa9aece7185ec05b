"""mlp: two hidden layers on a node's look-back as one vector.

The simplest network of the tables in "temporal-structural fusion for backend load prediction", which does not
say its widths. One set of weights serves all nodes, which never see one another.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch


class MlpConfig(ModelConfig):
    """Options of mlp."""

    hidden: Annotated[int, Field(ge=1)] = 256
    """Width of both hidden layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the features that training drops after each hidden layer."""

    def build(self, geometry: Geometry) -> Mlp:
        """A new module with its initial weights."""
        return Mlp(self, geometry)


class Mlp(Model):
    """The module. Its inputs per step are the F metrics, whether each was observed, and the time features."""

    def __init__(self, config: MlpConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        hidden, metrics = config.hidden, len(geometry.metrics)
        # One layer in two parts: the time features are those of all nodes, so they are not copied to each.
        self.steps = nn.Linear(geometry.history * 2 * metrics, hidden)
        self.time = nn.Linear(geometry.history * geometry.calendar, hidden, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, geometry.horizon * metrics * (1 + len(geometry.quantiles))),
        )

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        steps = torch.cat([batch.x, batch.mask.to(batch.x.dtype)], dim=-1).transpose(1, 2).flatten(2)
        h = self.steps(steps) + self.time(batch.time_x.flatten(1))[:, None]
        return self.rest(h).unflatten(-1, (self.geometry.horizon, *self.outputs)).transpose(1, 2)

"""lstm and bilstm: a recurrent network over each node's look-back, its last state to all horizon steps.

The recurrent baselines of the tables in "temporal-structural fusion for backend load prediction" (LSTM:
Hochreiter and Schmidhuber 1997; both directions: Schuster and Paliwal 1997). The head is that of stgnn, so
what sets the two apart is the encoder. With `seasonal` and `residual` off they are the plain forms.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import HorizonHead
from fleetcast.windows.batch import Batch


class LstmConfig(ModelConfig):
    """Options of lstm."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the state, of each direction if there are two."""
    layers: Annotated[int, Field(ge=1)] = 1
    """Stacked LSTM layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the features that training drops between the layers and in the head."""
    seasonal: bool = True
    """Whether the head sees the values one season (a day, a week) before each target step."""

    def build(self, geometry: Geometry) -> Lstm:
        """A new module with its initial weights."""
        return Lstm(self, geometry, directions=1)


class BilstmConfig(LstmConfig):
    """Options of bilstm."""

    def build(self, geometry: Geometry) -> Lstm:
        """A new module with its initial weights."""
        return Lstm(self, geometry, directions=2)


class Lstm(Model):
    """The module. Its inputs per step are the F metrics, whether each was observed, and the time features."""

    def __init__(self, config: LstmConfig, geometry: Geometry, directions: int) -> None:
        super().__init__(config, geometry)
        self.directions = directions
        self.lstm = nn.LSTM(
            2 * len(geometry.metrics) + geometry.calendar,
            config.hidden,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0,  # torch warns of one with nothing to drop
            bidirectional=directions == 2,
        )
        self.head = HorizonHead(geometry, directions * config.hidden, config.dropout, config.seasonal)

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        windows, _, nodes, _ = batch.x.shape
        time = batch.time_x[:, :, None].expand(-1, -1, nodes, -1)
        steps = torch.cat([batch.x, batch.mask.to(batch.x.dtype), time], dim=-1)
        _, (states, _) = self.lstm(steps.transpose(1, 2).flatten(0, 1))
        last = torch.cat(list(states[-self.directions :]), dim=-1)
        return self.head(last.unflatten(0, (windows, nodes)), batch)

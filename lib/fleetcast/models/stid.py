"""stid: who a node is and what time it is, beside its look-back, to an MLP.

STID of "Spatial-Temporal Identity: A Simple yet Effective Baseline for Multivariate Time Series Forecasting"
(Shao et al., CIKM 2022). Nodes never see one another. Time is a linear map of the time features of the last
look-back step, sines and cosines of day and week, where the paper looks up one vector for the time of day and
one for the day of the week: it needs no table for each width of a step.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import NodeEmbedding, ResidualBlock
from fleetcast.windows.batch import Batch


class StidConfig(ModelConfig):
    """Options of stid; the defaults are the paper's."""

    embedding: Annotated[int, Field(ge=1)] = 32
    """Width of the look-back's and of the node's embedding; that of the time is twice as wide, for day and
    week. The blocks are as wide as all together."""
    layers: Annotated[int, Field(ge=1)] = 3
    """Residual blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Share of the features that training drops within each block."""

    def build(self, geometry: Geometry) -> Stid:
        """A new module with its initial weights."""
        return Stid(self, geometry)


class Stid(Model):
    """The module. Its inputs per node and step are the F metrics and whether each was observed."""

    def __init__(self, config: StidConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        width, metrics = config.embedding, len(geometry.metrics)
        self.steps = nn.Linear(geometry.history * 2 * metrics, width)
        self.node = NodeEmbedding(geometry, width)
        self.time = nn.Linear(geometry.calendar, 2 * width)
        self.blocks = nn.Sequential(*(ResidualBlock(4 * width, config.dropout) for _ in range(config.layers)))
        self.head = nn.Linear(4 * width, geometry.horizon * metrics * (1 + len(geometry.quantiles)))

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        windows, _, nodes, _ = batch.x.shape
        steps = torch.cat([batch.x, batch.mask.to(batch.x.dtype)], dim=-1).transpose(1, 2).flatten(2)
        node = self.node(batch.nodes).expand(windows, -1, -1)
        time = self.time(batch.time_x[:, -1:]).expand(-1, nodes, -1)
        h = self.blocks(torch.cat([self.steps(steps), node, time], dim=-1))
        return self.head(h).unflatten(-1, (self.geometry.horizon, *self.outputs)).transpose(1, 2)

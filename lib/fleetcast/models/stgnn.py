"""stgnn: graph convolution, time encoding, a GRU over the look-back and an MLP head.

The model of "graph convolution + GRU + time encoding for service performance forecasting": eq. 1 in both
directions of the call graph, eq. 2 per node, eq. 3 for all horizon steps at once, with quantiles beside the
mean. With `seasonal`, `residual`, `own` and `direct` off it is the paper's plain form.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Adjacency, Graph, GraphConfig, gather
from fleetcast.models.layers import DirectHead, HorizonHead
from fleetcast.windows.batch import Batch

#: The options that make it the paper's plain form.
PLAIN = {"seasonal": False, "residual": False, "own": False, "direct": 0, "dropout": 0.0}


class StgnnConfig(GraphConfig):
    """Options of stgnn."""

    hidden: Annotated[int, Field(ge=1)] = 48
    """Width of the graph layers, of the GRU and of the head."""
    layers: Annotated[int, Field(ge=1)] = 2
    """Graph convolution layers, hence how many edges far information travels within one step."""
    gru_layers: Annotated[int, Field(ge=1)] = 1
    """Stacked GRU layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the features that training drops in the head."""
    seasonal: bool = True
    """Whether the head sees the values one season (a day, a week) before each target step."""
    direct: Annotated[int, Field(ge=0)] = 128
    """Width of a residual MLP that reads the state and, past graph and GRU, look-back, seasonal values and
    node identity, and gives all horizon steps; 0: the head of eq. 3, which sees each target step's time."""
    own: bool = True
    """Whether a node's own features also reach the GRU unmixed with the neighbours'."""

    def build(self, geometry: Geometry) -> Stgnn:
        """A new module with its initial weights."""
        return Stgnn(self, geometry)


class Stgnn(Model):
    """The module. Its inputs per node and step are the F metrics and whether each was observed."""

    def __init__(self, config: StgnnConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        inputs, hidden = 2 * len(geometry.metrics), config.hidden
        widths = [inputs] + [hidden] * config.layers
        self.graph = Graph(config, geometry)
        self.convolutions = nn.ModuleList(GraphConvolution(a, b) for a, b in pairwise(widths))
        self.time = nn.Linear(geometry.calendar, hidden)
        self.own = nn.Linear(inputs, hidden, bias=False) if config.own else None
        self.gru = nn.GRU(hidden, hidden, config.gru_layers, batch_first=True)
        self.head = (
            DirectHead(geometry, hidden, config.direct, config.dropout, config.seasonal)
            if config.direct
            else HorizonHead(geometry, hidden, config.dropout, config.seasonal)
        )

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        windows, _, nodes, _ = batch.x.shape
        _, state = self.gru(self._encode(batch))
        return self.head(state[-1].unflatten(0, (windows, nodes)), batch)

    def _encode(self, batch: Batch) -> Tensor:
        """z of eq. 2, [B · N, L, hidden]: graph convolution of each step, and the encoding of its time."""
        nodes = batch.x.shape[2]
        steps = torch.cat([batch.x, batch.mask.to(batch.x.dtype)], dim=-1)
        features = steps.transpose(1, 2).flatten(0, 1)
        adjacency = self.graph.symmetric(batch)
        h = features
        for layer in self.convolutions:
            h = layer(h, adjacency)
        if self.own is not None:
            h = h + self.own(features)
        return h + self.time(batch.time_x).repeat_interleave(nodes, dim=0)


class GraphConvolution(nn.Module):
    """σ(Â_norm H W) of eq. 1, once along and once against the edges with a matrix W each, summed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.along = nn.Linear(inputs, outputs)
        self.against = nn.Linear(inputs, outputs, bias=False)

    def forward(self, h: Tensor, adjacency: Adjacency) -> Tensor:
        """[M, L, inputs] → [M, L, outputs], all steps of the look-back at once."""
        return torch.relu(self.along(gather(adjacency.along, h)) + self.against(gather(adjacency.against, h)))

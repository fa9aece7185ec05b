"""ast_gcn: the T-GCN cell over inputs that a node's attributes augment.

Zhu et al., "AST-GCN: attribute-augmented spatiotemporal graph convolutional network for traffic forecasting"
(IEEE Access 2021), on the cell of Zhao et al., "T-GCN" (T-ITS 2020). At each step a node's features are its
metrics, its static attributes and the dynamic ones of the step and of a window before it. Static is here a
learned embedding of the node; dynamic are the time features. Both stand beside the metrics on the feature
axis, and nothing of the horizon is read. Load moves from source to target only, as published; degrees are
sums of incoming weight.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Graph, GraphConfig, gather
from fleetcast.models.layers import NodeEmbedding
from fleetcast.windows.batch import Batch


class AstGcnConfig(GraphConfig):
    """Options of ast_gcn."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the state."""
    static: Annotated[int, Field(ge=0)] = 8
    """Width of a node's learned static attributes; 0 for none."""
    window: Annotated[int, Field(ge=0)] = 0
    """m, steps before each step whose dynamic attributes it is given too."""

    def build(self, geometry: Geometry) -> AstGcn:
        """A new module with its initial weights."""
        return AstGcn(self, geometry)


class AstGcn(Model):
    """The module. The metrics of a node and step come with whether each was observed."""

    def __init__(self, config: AstGcnConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        features, outputs = self.outputs
        self.graph = Graph(config, geometry)
        self.static = NodeEmbedding(geometry, config.static) if config.static else None
        self.window = config.window
        inputs = 2 * features + config.static + (1 + config.window) * geometry.calendar
        self.cell = TgcnCell(inputs, config.hidden)
        self.head = nn.Linear(config.hidden, geometry.horizon * features * outputs)

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        windows, _, nodes, _ = batch.x.shape
        state = self.cell(self._augmented(batch), self.graph.symmetric(batch).along)
        forecast = self.head(state).view(windows, nodes, self.geometry.horizon, *self.outputs)
        return forecast.transpose(1, 2)

    def _augmented(self, batch: Batch) -> Tensor:
        """[B · N, L, inputs]: metrics, static and dynamic attributes of each node and step."""
        windows, steps, nodes, _ = batch.x.shape
        dynamic = functional.pad(batch.time_x, (0, 0, self.window, 0)).unfold(1, steps, 1)  # [B, 1 + m, C, L]
        parts = [
            batch.x.transpose(1, 2),
            batch.mask.to(batch.x.dtype).transpose(1, 2),
            dynamic.flatten(1, 2).mT[:, None].expand(-1, nodes, -1, -1),
        ]
        if self.static is not None:
            parts.append(self.static(batch.nodes)[:, None].expand(windows, -1, steps, -1))
        return torch.cat(parts, dim=-1).flatten(0, 1)


class TgcnCell(nn.Module):
    """A GRU whose products with inputs and state are graph convolutions.

    r, u = σ(Â [x, h] W + b);  c = tanh(Â [x, r ⊙ h] W' + b');  h ← u ⊙ h + (1 − u) ⊙ c.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(inputs, 3 * hidden)
        self.gates = nn.Linear(hidden, 2 * hidden, bias=False)
        self.candidate = nn.Linear(hidden, hidden, bias=False)
        nn.init.xavier_uniform_(self.inputs.weight)
        with torch.no_grad():
            self.inputs.bias[: 2 * hidden] = 1  # gates begin open to the past
            self.inputs.bias[2 * hidden :] = 0

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """[M, L, inputs] and Â → the last state, [M, hidden]; M = B · N."""
        hidden = self.candidate.in_features
        # Only the state's convolution has to wait for the step before.
        given = self.inputs(gather(adjacency, x))
        h = given.new_zeros(len(x), hidden)
        for gates, candidate in zip(
            *(part.unbind(1) for part in given.split([2 * hidden, hidden], -1)), strict=True
        ):
            r, u = torch.sigmoid(gates + self.gates(gather(adjacency, h))).chunk(2, dim=-1)
            c = torch.tanh(candidate + self.candidate(gather(adjacency, r * h)))
            h = u * h + (1 - u) * c
        return h

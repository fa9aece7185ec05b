"""astgcn: attention over space and time around Chebyshev graph convolutions, a branch for each season.

Guo et al., "Attention based spatial-temporal graph convolutional networks for traffic flow forecasting"
(AAAI 2019): one branch of ST blocks reads the look-back, one each the values one lag (a day, a week) before
the targets; their forecasts are fused with a weight per node and horizon step.

Where the paper and its releases leave a choice, here:
- the graph convolution reads what temporal attention made of the input, as the paper's text has it (the
  releases feed the input itself);
- the graph is symmetrised, and its Laplacian is the normalised one, with the bound 2 for its largest
  eigenvalue: each window may have a graph of its own, also without edges;
- all matrices have the receiver's row, so softmax runs over a row: the sources of each receiver sum to 1;
- parameters of nodes and of pairs of nodes are looked up by the nodes' ids. The pairs take 2 N² weights a
  block, so beyond a few thousand entities in all another model is the better choice.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fleetcast.errors import InputError
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Graph, GraphConfig
from fleetcast.windows.batch import Batch, Edges


class AstgcnConfig(GraphConfig):
    """Options of astgcn."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Filters of the graph and the time convolutions."""
    order: Annotated[int, Field(ge=2)] = 3
    """K, Chebyshev polynomials of the Laplacian: the convolution of a block reaches K − 1 edges far."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """ST blocks of each branch."""

    def build(self, geometry: Geometry) -> Astgcn:
        """A new module with its initial weights."""
        return Astgcn(self, geometry)


class Astgcn(Model):
    """The module. Its inputs per node and step are the F metrics and whether each was observed."""

    def __init__(self, config: AstgcnConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.graph = Graph(config, geometry)
        self.order = config.order
        steps = [geometry.history] + [geometry.horizon] * len(geometry.lags)
        self.branches = nn.ModuleList(Branch(config, geometry, length) for length in steps)
        shape = (len(steps), len(geometry.entities), geometry.horizon)
        self.fusion = nn.Parameter(torch.full(shape, 1 / len(steps)))

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]. Raises InputError for entities that the model was not trained on."""
        unknown = int((batch.nodes < 0).sum())
        if unknown:
            raise InputError(
                f"model astgcn: {unknown} of {len(batch.nodes)} entities are unknown to it, expected those "
                "it was trained on: its attention has weights for each pair of them"
            )
        polynomials = chebyshev(self._laplacian(batch), self.order)
        weights = self.fusion[:, batch.nodes, :, None]
        fused = sum(
            weight * branch(segment, polynomials, batch.nodes)
            for weight, branch, segment in zip(weights, self.branches, _segments(batch), strict=True)
        )
        return fused.transpose(1, 2).unflatten(-1, self.outputs)

    def _laplacian(self, batch: Batch) -> Tensor:
        """[B, N, N] scaled Laplacian; [1, N, N] of a learned graph, which all windows share."""
        learned = self.graph.weight(batch)
        if learned is not None:
            return scaled_laplacian(learned[None])
        return scaled_laplacian(dense(self.graph.edges(batch), *batch.x.shape[0:3:2]))


class Branch(nn.Module):
    """ST blocks over one segment of T steps, and a linear map of all its steps to all horizon steps."""

    def __init__(self, config: AstgcnConfig, geometry: Geometry, steps: int) -> None:
        super().__init__()
        self.horizon = geometry.horizon
        features, entities = len(geometry.metrics), len(geometry.entities)
        widths = [2 * features] + [config.hidden] * (config.blocks - 1)
        self.blocks = nn.ModuleList(Block(config, entities, steps, width) for width in widths)
        outputs = geometry.horizon * features * (1 + len(geometry.quantiles))
        self.last = nn.Linear(steps * config.hidden, outputs)

    def forward(self, x: Tensor, polynomials: list[Tensor], nodes: Tensor) -> Tensor:
        """[B, T, N, 2F] → [B, N, H, F · (1 + Q)]."""
        h = x.transpose(1, 2)
        for block in self.blocks:
            h = block(h, polynomials, nodes)
        return self.last(h.flatten(2)).unflatten(-1, (self.horizon, -1))


class Block(nn.Module):
    """Temporal attention, spatial attention, graph convolution and time convolution, with a residual path."""

    def __init__(self, config: AstgcnConfig, entities: int, steps: int, inputs: int) -> None:
        super().__init__()
        hidden = config.hidden
        # Attention over a single step is 1, whatever its parameters.
        self.temporal = TemporalAttention(entities, steps, inputs) if steps > 1 else None
        self.spatial = SpatialAttention(entities, steps, inputs)
        self.graph = ChebyshevConvolution(inputs, hidden, config.order)
        self.time = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))
        self.residual = _weights(inputs, hidden, fan=inputs)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, polynomials: list[Tensor], nodes: Tensor) -> Tensor:
        """[B, N, T, inputs] → [B, N, T, hidden]."""
        attended = x if self.temporal is None else self.temporal(x, nodes)[:, None] @ x
        h = torch.relu(self.graph(attended, polynomials, self.spatial(attended, nodes)))
        # Seen as [B, hidden, N, T] this is torch's channels-last layout: no copy.
        h = self.time(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(torch.relu(h + x @ self.residual))


class TemporalAttention(nn.Module):
    """softmax(V_e σ((xᵀ U₁) U₂ (U₃ x) + b_e)): how much each step takes of every other."""

    def __init__(self, entities: int, steps: int, inputs: int) -> None:
        super().__init__()
        self.u1 = _weights(entities, fan=entities)
        self.u2 = _weights(inputs, entities, fan=entities * inputs)
        self.u3 = _weights(inputs, fan=inputs)
        self.v = _weights(steps, steps, fan=steps)
        self.b = nn.Parameter(torch.zeros(steps, steps))

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        """[B, N, T, inputs] → [B, T, T]; a row's steps sum to 1."""
        sources = torch.einsum("bntc,n->btc", x, self.u1[nodes]) @ self.u2[:, nodes]
        receivers = x @ self.u3
        return (torch.sigmoid((sources @ receivers).mT + self.b) @ self.v).softmax(-1)


class SpatialAttention(nn.Module):
    """softmax(V_s σ((x W₁) W₂ (W₃ x)ᵀ + b_s)): how much each node takes of every other."""

    def __init__(self, entities: int, steps: int, inputs: int) -> None:
        super().__init__()
        self.w1 = _weights(steps, fan=steps)
        self.w2 = _weights(inputs, steps, fan=inputs * steps)
        self.w3 = _weights(inputs, fan=inputs)
        self.v = _weights(entities, entities, fan=entities)
        self.b = nn.Parameter(torch.zeros(entities, entities))

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        """[B, N, T, inputs] → [B, N, N]; a row's nodes sum to 1."""
        sources = (self.w1 @ x) @ self.w2
        receivers = x @ self.w3
        pairs = torch.sigmoid(receivers @ sources.mT + _of_pairs(self.b, nodes))
        return (pairs @ _of_pairs(self.v, nodes)).softmax(-1)


class ChebyshevConvolution(nn.Module):
    """Σ_k (T_k ⊙ S) x Θ_k, the graph convolution whose polynomials spatial attention S weighs."""

    def __init__(self, inputs: int, outputs: int, order: int) -> None:
        super().__init__()
        self.theta = _weights(order * inputs, outputs, fan=order * inputs)

    def forward(self, x: Tensor, polynomials: list[Tensor], attention: Tensor) -> Tensor:
        """x [B, N, T, inputs], T_1 … T_K−1 and S [B, N, N] → [B, N, T, outputs]."""
        # T_0 is the identity: of S it leaves the diagonal.
        own = attention.diagonal(dim1=1, dim2=2)[:, :, None, None] * x
        others = (((polynomial * attention) @ x.flatten(2)).view_as(x) for polynomial in polynomials)
        return torch.cat([own, *others], dim=-1) @ self.theta


def scaled_laplacian(weight: Tensor) -> Tensor:
    """2 L / λ_max − I of graphs [B, N, N] made symmetric: −D^-1/2 (W + Wᵀ) D^-1/2.

    L = I − D^-1/2 (W + Wᵀ) D^-1/2, and λ_max = 2, which no eigenvalue exceeds. L of a node without edges is
    0, which scales to −1.
    """
    both = weight + weight.mT
    alone = both.sum(-1) == 0
    both = both + torch.diag_embed(alone.to(both.dtype))
    scale = both.sum(-1).rsqrt()
    return -scale[:, :, None] * both * scale[:, None]


def chebyshev(laplacian: Tensor, order: int) -> list[Tensor]:
    """T_1 … T_K−1 of a scaled Laplacian [B, N, N]: T_k = 2 L T_k−1 − T_k−2, and T_0 = I."""
    polynomials = [torch.eye(laplacian.shape[-1], device=laplacian.device), laplacian]
    for _ in range(order - 2):
        polynomials.append(2 * laplacian @ polynomials[-1] - polynomials[-2])
    return polynomials[1:]


def dense(edges: Edges, windows: int, nodes: int) -> Tensor:
    """[B, N, N] weights from row (source) to column (target); those of parallel edges add up."""
    source, target = edges.index
    weight = torch.zeros(windows * nodes * nodes, device=edges.weight.device)
    return weight.index_add(0, source * nodes + target % nodes, edges.weight).view(windows, nodes, nodes)


def _segments(batch: Batch) -> list[Tensor]:
    """[B, L, N, 2F] of the look-back and [B, H, N, 2F] of each lag: values, and whether each was observed."""
    values = [batch.x, *torch.where(batch.seasonal_mask, batch.seasonal, 0).unbind(-1)]
    seen = [batch.mask, *batch.seasonal_mask.unbind(-1)]
    return [torch.cat([v, s.to(v.dtype)], dim=-1) for v, s in zip(values, seen, strict=True)]


def _weights(*shape: int, fan: int) -> nn.Parameter:
    """Normal weights that keep the scale of a sum of `fan` terms."""
    return nn.Parameter(torch.randn(shape) / fan**0.5)


def _of_pairs(table: Tensor, nodes: Tensor) -> Tensor:
    """[N, N] of a table of all pairs of entities."""
    return table[nodes[:, None], nodes]

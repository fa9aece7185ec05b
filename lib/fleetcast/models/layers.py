"""Layers that models share: node embeddings, heads for all horizon steps, naive blend, level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch

#: Logits move by about the learning rate a step: too little to come to a choice within a training run.
_EAGER = 10.0
#: Residual blocks of a direct head, as in STID.
_BLOCKS = 3


def observed_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, L, …] → [B, 1, …] the mean of what was observed over the look-back; 0 if nothing was."""
    return torch.where(mask, values, 0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


class NodeEmbedding(nn.Module):
    """A learned vector for each entity; those that the model was not trained on get the mean of all."""

    def __init__(self, geometry: Geometry, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(max(len(geometry.entities), 1), width) / width**0.5)

    def forward(self, nodes: Tensor) -> Tensor:
        """[N] positions, −1 for unknown → [N, width]."""
        known = self.table[nodes.clamp(min=0)]
        return torch.where(nodes[:, None] < 0, self.table.mean(0), known) if (nodes < 0).any() else known


class HorizonHead(nn.Module):
    """f(h; θ) of eq. 3 for all H horizon steps at once: an MLP of a node's state and what is known ahead.

    Known ahead are a step's time features, its place in the horizon and, if `seasonal`, the values one season
    before it.
    """

    def __init__(self, geometry: Geometry, hidden: int, dropout: float, seasonal: bool) -> None:
        super().__init__()
        metrics, seasons = len(geometry.metrics), len(geometry.lags)
        self.outputs = (metrics, 1 + len(geometry.quantiles))
        self.state = nn.Linear(hidden, hidden)
        self.step = nn.Parameter(torch.randn(geometry.horizon, hidden) / hidden**0.5)
        self.time = nn.Linear(geometry.calendar, hidden, bias=False)
        self.season = nn.Linear(2 * metrics * seasons, hidden, bias=False) if seasonal and seasons else None
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, metrics * (1 + len(geometry.quantiles)))

    def forward(self, state: Tensor, batch: Batch) -> Tensor:
        """State [B, N, hidden] → [B, H, N, F, 1 + Q]."""
        known = self.step + self.time(batch.time_y)
        h = self.state(state)[:, None] + known[:, :, None]
        if self.season is not None:
            values = torch.where(batch.seasonal_mask, batch.seasonal, 0)
            h = h + self.season(torch.cat([values, batch.seasonal_mask.to(values.dtype)], dim=-1).flatten(3))
        return self.last(self.dropout(torch.relu(h))).unflatten(-1, self.outputs)


class ResidualBlock(nn.Module):
    """h + W₂ dropout(ReLU(W₁ h))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        """[…, width] → the same shape."""
        return h + self.inner(h)


class DirectHead(nn.Module):
    """All horizon steps at once from a node's state and, past the encoder, from all that is known of it.

    That is its look-back, the values one season before it and before the horizon, who it is, and the clock:
    what carries STID, with an encoder's state and the seasons as further inputs.
    """

    def __init__(self, geometry: Geometry, hidden: int, width: int, dropout: float, seasonal: bool) -> None:
        super().__init__()
        metrics, seasons = len(geometry.metrics), len(geometry.lags) if seasonal else 0
        self.seasonal = bool(seasons)
        self.outputs = (geometry.horizon, metrics, 1 + len(geometry.quantiles))
        self.node = NodeEmbedding(geometry, width // 4 or 1)
        steps = geometry.history * (1 + seasons) + geometry.horizon * seasons
        inputs = hidden + 2 * metrics * steps + geometry.calendar + self.node.table.shape[1]
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width, dropout) for _ in range(_BLOCKS)))
        self.last = nn.Linear(width, math.prod(self.outputs))

    def forward(self, state: Tensor, batch: Batch) -> Tensor:
        """State [B, N, hidden] → [B, H, N, F, 1 + Q]."""
        windows, _, nodes, _ = batch.x.shape
        series = [batch.x, batch.mask]
        if self.seasonal:
            series += [torch.where(batch.seasonal_x_mask, batch.seasonal_x, 0), batch.seasonal_x_mask]
            series += [torch.where(batch.seasonal_mask, batch.seasonal, 0), batch.seasonal_mask]
        known = [state, *(part.to(state.dtype).transpose(1, 2).flatten(2) for part in series)]
        known.append(batch.time_y[:, :1].expand(-1, nodes, -1))
        known.append(self.node(batch.nodes).expand(windows, -1, -1))
        h = self.blocks(self.first(torch.cat(known, dim=-1)))
        return self.last(h).unflatten(-1, self.outputs).transpose(1, 2)


class NaiveBlend(nn.Module):
    """A learned convex blend of the naive forecasts: last observed value, and the value one season before.

    The weights are one set per horizon step and metric; those of missing values pass to the others. Where
    nothing was observed the blend is zero, the mean of scaled values.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        metrics, seasons = len(geometry.metrics), len(geometry.lags)
        # A blend of the last value alone has nothing to learn.
        self.logits = nn.Parameter(torch.zeros(geometry.horizon, metrics, 1 + seasons)) if seasons else None

    def forward(self, batch: Batch) -> Tensor:
        """[B, H, N, F]."""
        last, seen = _last_observed(batch.x, batch.mask)
        if self.logits is None:
            return last[:, None].expand(*batch.seasonal.shape[:-1])
        shape = batch.seasonal.shape[:-1]
        naive = torch.cat([last[:, None].expand(shape)[..., None], batch.seasonal], dim=-1)
        there = torch.cat([seen[:, None].expand(shape)[..., None], batch.seasonal_mask], dim=-1)
        weight = (_EAGER * self.logits).softmax(-1)[:, None] * there
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        return (weight * torch.where(there, naive, 0)).sum(-1)


def _last_observed(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, F] the last observed value in the look-back, zero if none; and whether there is one."""
    step = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None, None]
    latest = (mask * step).amax(1)
    value = x.gather(1, (latest - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(latest > 0, value, 0), latest > 0


@dataclass(frozen=True)
class Level:
    """RevIN without its affine map (Kim et al., ICLR 2022): where each series of a window lies and how far it
    swings, over what was observed."""

    mean: Tensor
    """[B, 1, N, F]; zero where nothing was observed."""
    deviation: Tensor
    """[B, 1, N, F], of the population."""

    @classmethod
    def of(cls, batch: Batch) -> Level:
        """The levels of a batch's look-backs."""
        mean = observed_mean(batch.x, batch.mask)
        variance = observed_mean((batch.x - mean).square(), batch.mask)
        return cls(mean, (variance + 1e-5).sqrt())

    def remove(self, batch: Batch) -> Tensor:
        """[B, L, N, F] the look-back relative to its level, which stands in for what was not observed: a
        filling from elsewhere may lie many deviations away."""
        return torch.where(batch.mask, (batch.x - self.mean) / self.deviation, 0)

    def restore(self, outputs: Tensor, mean: bool) -> Tensor:
        """[B, H, N, F, 1 + Q] in the units of `x`; offsets from a naive forecast take no `mean`."""
        outputs = outputs * self.deviation[..., None]
        return outputs + self.mean[..., None] if mean else outputs

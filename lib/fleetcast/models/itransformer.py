"""itransformer: attention between series, each one token, instead of between steps.

iTransformer of "Inverted Transformers Are Effective for Time Series Forecasting" (Liu et al., ICLR 2024). A
token is the whole look-back of one node's metric, relative to its level in the window; the time features are
tokens too, dropped at the end. No position code: the order of nodes does not matter.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import Level
from fleetcast.windows.batch import Batch


class ItransformerConfig(ModelConfig):
    """Options of itransformer. The paper's, for hundreds of series: hidden and feedforward 512, layers 3."""

    looks_around = True

    hidden: Annotated[int, Field(ge=1)] = 128
    """Width of a token."""
    heads: Annotated[int, Field(ge=1)] = 8
    """Attention heads; a divisor of hidden."""
    feedforward: Annotated[int, Field(ge=1)] = 128
    """Width inside the feed-forward blocks."""
    layers: Annotated[int, Field(ge=1)] = 2
    """Encoder layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the features that training drops after the embedding and within each layer."""

    @field_validator("heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        if info.data.get("hidden", 0) % heads:
            raise ValueError(f"expected a divisor of hidden ({info.data['hidden']})")
        return heads

    def build(self, geometry: Geometry) -> Itransformer:
        """A new module with its initial weights."""
        return Itransformer(self, geometry)


class Itransformer(Model):
    """The module. Its tokens are N · F series, with which of their steps are missing, and C time features."""

    def __init__(self, config: ItransformerConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.values = nn.Linear(geometry.history, config.hidden)
        self.missing = nn.Linear(geometry.history, config.hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.Sequential(
            *(EncoderLayer(config) for _ in range(config.layers)), nn.LayerNorm(config.hidden)
        )
        self.head = nn.Linear(config.hidden, geometry.horizon * (1 + len(geometry.quantiles)))

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        level, nodes = Level.of(batch), batch.x.shape[2]
        missing = (~batch.mask).to(batch.x.dtype).flatten(2).mT
        series = self.values(level.remove(batch).flatten(2).mT) + self.missing(missing)
        tokens = torch.cat([series, self.values(batch.time_x.mT)], dim=1)
        h = self.encoder(self.dropout(tokens))[:, : series.shape[1]]
        outputs = self.head(h).unflatten(-1, (self.geometry.horizon, -1)).unflatten(1, (nodes, -1))
        return level.restore(outputs.movedim(-2, 1), self.blend is None)


class EncoderLayer(nn.Module):
    """Attention between tokens and a feed-forward block, each added to its input and then normalised.

    nn.TransformerEncoderLayer on a CPU keeps all pairs of tokens in memory: in evaluation, and in training
    for the dropout of attention weights. This one never does, and has no such dropout.
    """

    def __init__(self, config: ItransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.attention = nn.Linear(hidden, 3 * hidden)
        self.mix = nn.Sequential(nn.Linear(hidden, hidden), nn.Dropout(config.dropout))
        self.feedforward = nn.Sequential(
            nn.Linear(hidden, config.feedforward),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward, hidden),
            nn.Dropout(config.dropout),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        """[B, tokens, hidden] → the same shape."""
        query, key, value = self.attention(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        h = self.norms[0](h + self.mix(mixed))
        return self.norms[1](h + self.feedforward(h))

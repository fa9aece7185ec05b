"""What the attention models share. To all of them a node is a sequence of its own; the weights are shared."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from fleetcast.models.base import ModelConfig
from fleetcast.windows.batch import Batch

#: Width of the hidden layer of a position-wise feed-forward network, in widths of the model.
EXPANSION = 4


class AttentionConfig(ModelConfig):
    """Options of every attention model."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the model; that within the feed-forward networks is four times as much."""
    heads: Annotated[int, Field(ge=1, validate_default=True)] = 4
    """Attention heads, which share the width."""
    layers: Annotated[int, Field(ge=1)] = 2
    """Encoder layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of embeddings, attention weights and features that training drops."""

    @field_validator("heads")
    @classmethod
    def _share_the_width(cls, heads: int, info: ValidationInfo) -> int:
        if (hidden := info.data.get("hidden", 0)) % heads:
            raise ValueError(f"expected a divisor of hidden ({hidden})")
        return heads


def encoder_layer(config: AttentionConfig) -> nn.TransformerEncoderLayer:
    """Full self-attention and a feed-forward network, each added to its input and normalised after."""
    return nn.TransformerEncoderLayer(
        config.hidden,
        config.heads,
        EXPANSION * config.hidden,
        config.dropout,
        activation="gelu",
        batch_first=True,
    )


def sequences(batch: Batch) -> Tensor:
    """[B · N, L, 2F]: each node's metrics over the look-back, and whether they were observed."""
    return torch.cat([batch.x, batch.mask.to(batch.x.dtype)], dim=-1).transpose(1, 2).flatten(0, 1)


def forecasts(steps: Tensor, batch: Batch, outputs: tuple[int, int]) -> Tensor:
    """What a head gives of each sequence's horizon, [B · N, H, F · (1 + Q)] → [B, H, N, F, 1 + Q]."""
    windows, _, nodes, _ = batch.x.shape
    return steps.unflatten(0, (windows, nodes)).transpose(1, 2).unflatten(-1, outputs)

"""patchtst: a Transformer over patches of one series at a time, each relative to its level in the window.

PatchTST of "A Time Series is Worth 64 Words" (Nie et al., ICLR 2023): RevIN, patches, channel independence,
attention whose scores are carried from layer to layer, batch normalisation, one linear head for all horizon
steps. In training, but not in evaluation, a window's forecast depends on the other windows of its batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from fleetcast.errors import InputError
from fleetcast.models.base import Model, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import Level
from fleetcast.windows.batch import Batch


class PatchtstConfig(ModelConfig):
    """Options of patchtst. The paper's, for hundreds of series: hidden 128, heads 16, feedforward 256; for
    few: hidden 16, heads 4, feedforward 128, dropout 0.3."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of a patch's state."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads; a divisor of hidden."""
    feedforward: Annotated[int, Field(ge=1)] = 128
    """Width inside the feed-forward blocks."""
    layers: Annotated[int, Field(ge=1)] = 3
    """Encoder layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the features that training drops after the embedding and within each layer."""
    patch: Annotated[int, Field(ge=1)] | None = None
    """Steps of a patch; a third of the look-back but at most the published 16 if not given."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Steps from patch to patch; half a patch if not given."""
    norm: Literal["batch", "layer"] = "batch"
    """What normalises after each block. `batch` is the published one; `layer` keeps the windows of a batch
    apart in training too, at some loss of accuracy."""

    @field_validator("heads")
    @classmethod
    def _divides(cls, heads: int, info: ValidationInfo) -> int:
        if info.data.get("hidden", 0) % heads:
            raise ValueError(f"expected a divisor of hidden ({info.data['hidden']})")
        return heads

    def build(self, geometry: Geometry) -> Patchtst:
        """A new module with its initial weights. Raises InputError if patches do not fit the look-back."""
        return Patchtst(self, geometry)


class Patchtst(Model):
    """The module. Its inputs are the series of each node and metric, and which of their steps are missing."""

    def __init__(self, config: PatchtstConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.patch, self.stride = _patches(config, geometry.history)
        patches = 1 + (geometry.history + self.stride - self.patch) // self.stride
        self.values = nn.Linear(self.patch, config.hidden)
        self.missing = nn.Linear(self.patch, config.hidden, bias=False)
        self.position = nn.Parameter(torch.empty(patches, config.hidden).uniform_(-0.02, 0.02))
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.head = nn.Linear(patches * config.hidden, geometry.horizon * (1 + len(geometry.quantiles)))

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        level = Level.of(batch)
        missing = (~batch.mask).to(batch.x.dtype)
        h = self.values(self._patched(level.remove(batch))) + self.missing(self._patched(missing))
        h = self.dropout(h + self.position)
        scores = None
        for layer in self.encoder:
            h, scores = layer(h, scores)
        nodes, metrics = batch.x.shape[2:]
        outputs = self.head(h.flatten(1)).unflatten(-1, (self.geometry.horizon, -1))
        return level.restore(outputs.unflatten(0, (-1, nodes, metrics)).movedim(-2, 1), self.blend is None)

    def _patched(self, steps: Tensor) -> Tensor:
        """[B, L, N, F] → [B · N · F, patches, patch]; the last step is repeated for one more stride."""
        series = steps.permute(0, 2, 3, 1).flatten(0, 2)
        series = torch.cat([series, series[:, -1:].expand(-1, self.stride)], dim=1)
        return series.unfold(1, self.patch, self.stride)


def _patches(config: PatchtstConfig, history: int) -> tuple[int, int]:
    """Patch and stride; at least two patches, as attention over one has nothing to choose."""
    patch = config.patch or max(1, min(16, history // 3))
    stride = config.stride or max(1, patch // 2)
    if patch > history:
        raise InputError(
            f"model patchtst: option patch: {patch}, expected at most the look-back of {history}"
        )
    if stride > patch:
        raise InputError(f"model patchtst: option stride: {stride}, expected at most the patch of {patch}")
    return patch, stride


class EncoderLayer(nn.Module):
    """Attention and a feed-forward block, each added to its input and then normalised."""

    def __init__(self, config: PatchtstConfig) -> None:
        super().__init__()
        hidden, batch = config.hidden, config.norm == "batch"
        norm = nn.BatchNorm1d if batch else nn.LayerNorm
        self.heads = config.heads
        self.attention = nn.Linear(hidden, 3 * hidden)
        # Batch normalisation takes a bias away again.
        self.mix = nn.Sequential(nn.Linear(hidden, hidden, bias=not batch), nn.Dropout(config.dropout))
        self.feedforward = nn.Sequential(
            nn.Linear(hidden, config.feedforward),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward, hidden, bias=not batch),
            nn.Dropout(config.dropout),
        )
        self.norms = nn.ModuleList(norm(hidden) for _ in range(2))

    def forward(self, h: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        """State [M, patches, hidden] and scores [M, heads, patches, patches] of the layer before, if any, to
        those of this one."""
        query, key, value = self.attention(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        own = query @ key.mT / query.shape[-1] ** 0.5
        scores = own if scores is None else scores + own
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        h = self._normalised(0, h + self.mix(mixed))
        return self._normalised(1, h + self.feedforward(h)), scores

    def _normalised(self, which: int, h: Tensor) -> Tensor:
        return self.norms[which](h.flatten(0, 1)).view_as(h)

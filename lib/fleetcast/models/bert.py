"""BERT: an encoder over patches of the look-back and [MASK] tokens in place of the horizon's.

The architecture of Devlin et al., "BERT" (2019), on time series as in Zhang et al., "TimesBERT" (2025):
tokens are non-overlapping patches with learned positions. A forecast is what is read off the tokens of masked
future patches, whose time features are known; in training some patches of the look-back are masked as well,
as in the published pre-training. Departures: nothing is pre-trained; a patch holds all metrics of its node,
so there are no tokens that part variates or mark a domain.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.models.attention import AttentionConfig, encoder_layer, forecasts, sequences
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch

#: Standard deviation of the initial positions and of [MASK]: the size of embedded patches. With BERT's 0.02,
#: the size of its word embeddings, the order of the patches is all but lost and is learnt late.
_INITIAL = 0.5


class BertConfig(AttentionConfig):
    """Options of BERT."""

    patch: Annotated[int, Field(ge=1)] = 4
    """Steps of a patch; no more than look-back and horizon have."""
    masked: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Share of the look-back's patches that training replaces by [MASK]."""

    def build(self, geometry: Geometry) -> Bert:
        """A new module with its initial weights."""
        return Bert(self, geometry)


class Bert(Model):
    """The module. A look-back that is no multiple of the patch begins with steps that were not observed; a
    horizon that is none ends with steps that are cut off."""

    def __init__(self, config: BertConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        hidden, metrics = config.hidden, len(geometry.metrics)
        self.masked = config.masked
        self.patch = min(config.patch, geometry.history, geometry.horizon)
        tokens = -(-geometry.history // self.patch) + -(-geometry.horizon // self.patch)
        self.values = nn.Linear(self.patch * 2 * metrics, hidden)
        self.mask = nn.Parameter(_INITIAL * torch.randn(hidden))
        self.time = nn.Linear(self.patch * geometry.calendar, hidden, bias=False)
        self.positions = nn.Parameter(_INITIAL * torch.randn(tokens, hidden))
        self.embedded = nn.Sequential(nn.LayerNorm(hidden), nn.Dropout(config.dropout))
        self.encoder = nn.Sequential(*(encoder_layer(config) for _ in range(config.layers)))
        self.head = nn.Linear(hidden, self.patch * self.outputs[0] * self.outputs[1])

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        past = self._corrupted(self.values(self._patches(sequences(batch), pad_front=True)))
        ahead = -(-self.geometry.horizon // self.patch)
        tokens = torch.cat([past, self.mask.expand(len(past), ahead, -1)], dim=1)
        time = [self._patches(batch.time_x, pad_front=True), self._patches(batch.time_y, pad_front=False)]
        when = self.time(torch.cat(time, dim=1)) + self.positions
        nodes = batch.x.shape[2]
        h = self.encoder(self.embedded(tokens + when.repeat_interleave(nodes, dim=0)))[:, -ahead:]
        steps = self.head(h).unflatten(-1, (self.patch, -1)).flatten(1, 2)
        return forecasts(steps[:, : self.geometry.horizon], batch, self.outputs)

    def _patches(self, steps: Tensor, pad_front: bool) -> Tensor:
        """[M, T, features] → [M, ⌈T / patch⌉, patch · features]; zeros fill the first or the last patch."""
        missing = -steps.shape[1] % self.patch
        whole = functional.pad(steps, (0, 0, missing, 0) if pad_front else (0, 0, 0, missing))
        return whole.unflatten(1, (-1, self.patch)).flatten(2)

    def _corrupted(self, tokens: Tensor) -> Tensor:
        if not self.training or not self.masked:
            return tokens
        hidden = torch.rand(tokens.shape[:2], device=tokens.device) < self.masked
        return torch.where(hidden[..., None], self.mask, tokens)

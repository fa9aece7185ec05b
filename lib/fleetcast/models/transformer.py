"""Transformer: an encoder of the look-back and a decoder that forecasts all horizon steps in one pass.

The architecture of Vaswani et al., "Attention is all you need" (2017), post-norm, in the layout that Zhou et
al. (Informer, 2021) gave it for forecasting: the decoder starts from the last values of the look-back and has
placeholders for the horizon. Departures: placeholders are known to be such, as values come with whether they
were observed; and a step's token is a linear map of that step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.errors import InputError
from fleetcast.models.attention import EXPANSION, AttentionConfig, encoder_layer, forecasts, sequences
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch


class EncoderDecoderConfig(AttentionConfig):
    """Options of an encoder with a decoder."""

    decoder_layers: Annotated[int, Field(ge=1)] = 1
    """Decoder layers."""
    label: Annotated[int, Field(ge=1)] | None = None
    """Last steps of the look-back that the decoder starts from; half of them if not given."""


class TransformerConfig(EncoderDecoderConfig):
    """Options of the Transformer."""

    def build(self, geometry: Geometry) -> Transformer:
        """A new module with its initial weights. Raises InputError if `label` exceeds the look-back."""
        return Transformer(self, geometry)


class EncoderDecoder(Model):
    """The frame: embeddings, an encoder given, a decoder with masked self-attention, and a linear head."""

    def __init__(
        self,
        config: EncoderDecoderConfig,
        geometry: Geometry,
        encoder: nn.Module,
        token: Callable[[int, int], nn.Module],
    ) -> None:
        """`encoder` maps [M, L, hidden] to [M, any length, hidden]; `token(inputs, hidden)` makes a layer
        that maps steps [M, T, inputs] to [M, T, hidden] and looks at no later step."""
        super().__init__(config, geometry)
        self.label = (geometry.history + 1) // 2 if config.label is None else config.label
        if self.label > geometry.history:
            raise InputError(f"option label: {self.label}, expected at most history ({geometry.history})")
        hidden, inputs = config.hidden, 2 * len(geometry.metrics)
        known = self.label + geometry.horizon
        self.past = StepEmbedding(token(inputs, hidden), geometry.calendar, geometry.history, config)
        self.known = StepEmbedding(token(inputs, hidden), geometry.calendar, known, config)
        self.encoder = encoder
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(
                hidden, config.heads, EXPANSION * hidden, config.dropout, activation="gelu", batch_first=True
            )
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, self.outputs[0] * self.outputs[1])

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        history, horizon = self.geometry.history, self.geometry.horizon
        past = sequences(batch)
        memory = self.encoder(self.past(past, batch.time_x))
        start = history - self.label
        known = functional.pad(past[:, start:], (0, 0, 0, horizon))
        time = torch.cat([batch.time_x[:, start:], batch.time_y], dim=1)
        h = self.decode(self.known(known, time), memory)[:, -horizon:]
        return forecasts(self.head(h), batch, self.outputs)

    def decode(self, h: Tensor, memory: Tensor) -> Tensor:
        """[M, T, hidden], each step of which sees itself, earlier ones and the whole memory."""
        later = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).triu(1)
        for layer in self.decoder:
            h = layer(h, memory, tgt_mask=later, tgt_is_causal=True)
        return self.norm(h)


class Transformer(EncoderDecoder):
    """The module. Its inputs per node and step are the F metrics, whether each was observed, and the time."""

    def __init__(self, config: TransformerConfig, geometry: Geometry) -> None:
        layers = [encoder_layer(config) for _ in range(config.layers)]
        super().__init__(config, geometry, nn.Sequential(*layers, nn.LayerNorm(config.hidden)), nn.Linear)


class StepEmbedding(nn.Module):
    """A step's values, its time features and its position in the sequence, summed."""

    positions: Tensor

    def __init__(self, token: nn.Module, calendar: int, length: int, config: AttentionConfig) -> None:
        super().__init__()
        self.token = token
        self.time = nn.Linear(calendar, config.hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("positions", sinusoids(length, config.hidden), persistent=False)

    def forward(self, values: Tensor, time: Tensor) -> Tensor:
        """[B · N, T, inputs] and [B, T, C] → [B · N, T, hidden]."""
        h = self.token(values)
        when = self.time(time) + self.positions
        return self.dropout(h + when.repeat_interleave(len(h) // len(when), dim=0))


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width] position encoding: sine and cosine in turn, from wavelength 2π to 10,000 · 2π."""
    rate = 10_000 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]

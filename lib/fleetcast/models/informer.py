"""Informer: an encoder with sparse attention that halves its sequence between layers, and a one-pass decoder.

The model of Zhou et al., "Informer: beyond efficient transformer for long sequence time-series forecasting"
(2021), post-norm. At a look-back of up to 15 steps all queries are kept: it is then plain attention.

Departures from the released code, so that a forecast is causal, repeatable, and that of its own window:

- in evaluation the keys that measure a query are evenly spaced; in training they are drawn, one set for all
  queries;
- the measure is the maximum less the mean of the sampled keys (eq. 4), where the code divides by all keys;
- the decoder has full masked self-attention without mixed heads, as a choice of queries is made over the
  whole sequence, later steps included;
- distilling normalises each step (LayerNorm), not over the batch (BatchNorm);
- convolutions are padded with the nearest step, not around the circle; that of the tokens looks back only;
- attention weights are dropped out.
"""

from __future__ import annotations

from math import ceil, log
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.models.attention import EXPANSION
from fleetcast.models.geometry import Geometry
from fleetcast.models.transformer import EncoderDecoder, EncoderDecoderConfig


class InformerConfig(EncoderDecoderConfig):
    """Options of Informer."""

    factor: Annotated[int, Field(ge=1)] = 5
    """c: of L steps, c · ⌈ln L⌉ queries attend, measured by as many keys."""
    distil: bool = True
    """Whether the sequence is halved between encoder layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of embeddings, attention weights and features that training drops."""

    def build(self, geometry: Geometry) -> Informer:
        """A new module with its initial weights. Raises InputError if `label` exceeds the look-back."""
        return Informer(self, geometry)


class Informer(EncoderDecoder):
    """The module. Its inputs per node and step are the F metrics, whether each was observed, and the time."""

    def __init__(self, config: InformerConfig, geometry: Geometry) -> None:
        layers: list[nn.Module] = [ProbSparseLayer(config)]
        for _ in range(config.layers - 1):
            if config.distil:
                layers.append(Distilling(config.hidden))
            layers.append(ProbSparseLayer(config))
        encoder = nn.Sequential(*layers, nn.LayerNorm(config.hidden))
        super().__init__(config, geometry, encoder, CausalConvolution)


class ProbSparseLayer(nn.Module):
    """Sparse self-attention and a feed-forward network, each added to its input and normalised after."""

    def __init__(self, config: InformerConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden, EXPANSION * config.hidden
        self.attention = ProbSparseAttention(hidden, config.heads, config.factor, config.dropout)
        self.forward_network = nn.Sequential(
            nn.Linear(hidden, inner), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(inner, hidden)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor) -> Tensor:
        """[M, L, hidden] → [M, L, hidden]."""
        h = self.norms[0](h + self.dropout(self.attention(h)))
        return self.norms[1](h + self.dropout(self.forward_network(h)))


class ProbSparseAttention(nn.Module):
    """Self-attention of the queries whose weights are furthest from uniform; the others get the mean value.

    Each head and sequence chooses its own queries.
    """

    def __init__(self, hidden: int, heads: int, factor: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.factor, self.dropout = heads, factor, dropout
        self.project = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor) -> Tensor:
        """[M, L, hidden] → [M, L, hidden]."""
        q, k, v = self.project(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if self.kept(h.shape[1]) == h.shape[1]:
            mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        else:
            chosen = self.active(q, k)[..., None].expand(-1, -1, -1, q.shape[-1])
            attended = functional.scaled_dot_product_attention(q.gather(2, chosen), k, v, dropout_p=dropout)
            mixed = v.mean(2, keepdim=True).expand_as(v).scatter(2, chosen, attended)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def kept(self, length: int) -> int:
        """How many of `length` queries attend: c · ⌈ln L⌉, at least one, at most all."""
        return min(length, max(1, self.factor * ceil(log(length))))

    @torch.no_grad()
    def active(self, q: Tensor, k: Tensor) -> Tensor:
        """[M, heads, kept] the queries of the largest measure, of q and k [M, heads, L, width]."""
        length = k.shape[2]
        kept = self.kept(length)
        if self.training:
            keys = torch.randperm(length, device=k.device)[:kept]
        else:
            keys = torch.linspace(0, length - 1, kept, device=k.device).round().long()
        scores = q @ k[:, :, keys].transpose(2, 3)
        return (scores.amax(3) - scores.mean(3)).topk(kept, dim=2).indices


class Distilling(nn.Module):
    """Halves a sequence (eq. 5): convolution, normalisation, ELU, and maxima of three steps, two apart."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(hidden, hidden, 3, padding=1, padding_mode="replicate")
        self.norm = nn.LayerNorm(hidden)
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """[M, L, hidden] → [M, ⌊(L − 1) / 2⌋ + 1, hidden]."""
        h = self.norm(self.convolution(h.transpose(1, 2)).transpose(1, 2))
        return self.pool(functional.elu(h).transpose(1, 2)).transpose(1, 2)


class CausalConvolution(nn.Module):
    """A convolution over a step and the two before it; those before the first are taken to be like it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, 3)

    def forward(self, steps: Tensor) -> Tensor:
        """[M, T, inputs] → [M, T, outputs]."""
        padded = functional.pad(steps.transpose(1, 2), (2, 0), mode="replicate")
        return self.convolution(padded).transpose(1, 2)

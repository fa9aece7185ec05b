"""DGCRN: a recurrent encoder and decoder that make a graph of their own at every step.

F. Li et al., "Dynamic graph convolutional recurrent network for traffic prediction: benchmark and solution",
TKDD 2023. At each step hyper-networks filter the node embeddings by the present input and state; a graph
between all pairs of nodes comes of them, and it mixes the gates of a GRU together with the random walks along
and against the edges. `graph` says which edges the walks follow; the dynamic graph is there whatever it says.

The decoder reads the known time features of a step and its own mean of the step before. It is never taught
with targets, in training neither (the published scheduled sampling is): what it learns from is what it has
later. With `residual` the mean is an offset, and as such it is fed back. Initial states are zero.

The published modules of a gate, one along and one against the edges, are summed; here they are one matrix,
which has their common term once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Graph, GraphConfig, gather, transposed
from fleetcast.models.layers import NodeEmbedding
from fleetcast.windows.batch import Batch

#: Weight of what is received against a node's own input, 1 − this, in each hop; the published 0.95 and 0.05.
_RECEIVED = 0.95
#: How steeply scores turn into links, α of the paper.
_STEEP = 3.0
#: Widths of the hyper-networks between their input and the filter.
_HYPER, _NECK = 16, 2
#: Links of all steps together (1 GB) above which training computes a step twice and keeps none of them.
_LINKS = 2**26

#: What each node receives: [B, N, width] → the same.
Spread = Callable[[Tensor], Tensor]


class DgcrnConfig(GraphConfig):
    """Options of DGCRN; the defaults are the published ones."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """Width of the encoder's and the decoder's state."""
    rank: Annotated[int, Field(ge=1)] = 40
    """Width of the node embeddings that the dynamic graphs are made of."""
    hops: Annotated[int, Field(ge=1)] = 2
    """How many edges information travels in one graph convolution."""

    def build(self, geometry: Geometry) -> Dgcrn:
        """A new module with its initial weights."""
        return Dgcrn(self, geometry)


@dataclass(frozen=True)
class Static:
    """What all steps of a batch share."""

    along: Spread
    """The walk along the edges."""
    against: Spread
    """The walk against the edges."""
    forward: Tensor
    """[B, N, N] the walk along the edges, weighted, row = source."""
    backward: Tensor
    """[B, N, N] the walk against the edges, weighted, row = receiver: the edges' source, too."""
    embeddings: Tensor
    """[N, 2 · rank] as sources, then as targets."""


class Dgcrn(Model):
    """The module. The encoder reads the metrics, whether each was observed, and the time."""

    def __init__(self, config: DgcrnConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        metrics = len(geometry.metrics)
        self.hidden = config.hidden
        self.graph = Graph(config, geometry)
        self.sources, self.targets = (NodeEmbedding(geometry, config.rank) for _ in range(2))
        for embedding in (self.sources, self.targets):
            nn.init.normal_(embedding.table)
        self.encoder = DynamicCell(2 * metrics + geometry.calendar, config)
        self.decoder = DynamicCell(metrics + geometry.calendar, config)
        self.last = nn.Linear(config.hidden, metrics * self.outputs[1])

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        static, run = self._static(batch), self._runner(batch)
        nodes = batch.x.shape[2]
        h = batch.x.new_zeros(len(batch.x), nodes, self.hidden)
        past = torch.cat([batch.x, batch.mask.to(batch.x.dtype), _of_all(batch.time_x, nodes)], dim=-1)
        for x in past.unbind(1):
            h = run(self.encoder, x, h, static)
        outputs, mean = [], torch.zeros_like(batch.x[:, 0])
        for time in _of_all(batch.time_y, nodes).unbind(1):
            h = run(self.decoder, torch.cat([mean, time], dim=-1), h, static)
            outputs.append(self.last(h).unflatten(-1, self.outputs))
            mean = outputs[-1][..., 0]
        return torch.stack(outputs, dim=1)

    def _static(self, batch: Batch) -> Static:
        walks, windows = self.graph.walks(batch), len(batch.x)

        def spread(matrix: Tensor) -> Spread:
            back = transposed(matrix)
            return lambda h: gather(matrix, h.flatten(0, 1), back).view_as(h)

        return Static(
            spread(walks.along),
            spread(walks.against),
            _RECEIVED * _dense(walks.along, windows).mT.contiguous(),
            _RECEIVED * _dense(walks.against, windows),
            torch.cat([self.sources(batch.nodes), self.targets(batch.nodes)], dim=1),
        )

    def _runner(self, batch: Batch) -> Callable[..., Tensor]:
        """How a cell is called: as it is, or so that the backward pass computes its links once more."""
        links = len(batch.x) * batch.x.shape[2] ** 2 * (self.geometry.history + self.geometry.horizon)
        if links > _LINKS and torch.is_grad_enabled():
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return lambda cell, *inputs: cell(*inputs)


class DynamicCell(nn.Module):
    """A GRU cell whose products are graph convolutions over the walks and over a graph of this very step."""

    def __init__(self, inputs: int, config: DgcrnConfig) -> None:
        super().__init__()
        self.hops = config.hops
        width = inputs + config.hidden
        one_way, both_ways = (1 + config.hops) * width, (1 + 2 * config.hops) * width
        # Four hyper-networks side by side: each direction's for the sources, then for the targets.
        self.hyper = nn.Linear(one_way, 4 * _HYPER)
        self.necks = nn.ModuleList(nn.Linear(_HYPER, _NECK) for _ in range(4))
        self.filters = nn.ModuleList(nn.Linear(2 * _NECK, config.rank) for _ in range(2))
        self.gates = nn.Linear(both_ways, 2 * config.hidden)
        self.candidate = nn.Linear(both_ways, config.hidden)

    def forward(self, x: Tensor, h: Tensor, static: Static) -> Tensor:
        """Input [B, N, inputs] and state [B, N, hidden] → the next state."""
        inputs = torch.cat([x, h], dim=-1)
        along, against = mixing(self.links(inputs, static), static)
        terms = diffuse(inputs, along, against, self.hops)
        keep, reset = self.gates(terms.flatten(2)).sigmoid().chunk(2, dim=-1)
        # The hops of the input are those that the gates have seen.
        again = torch.cat([terms[..., : x.shape[2]], diffuse(reset * h, along, against, self.hops)], dim=-1)
        return keep * h + (1 - keep) * self.candidate(again.flatten(2)).tanh()

    def links(self, inputs: Tensor, static: Static) -> Tensor:
        """[B, N, N] the step's graph and every node's link to itself: row = source, links in [0, 1].

        Of two nodes at most one is linked to the other.
        """
        sources, targets = (_STEEP * static.embeddings * self._filters(inputs, static)).tanh().chunk(2, -1)
        scores = torch.cat([sources, targets], dim=-1) @ torch.cat([targets, -sources], dim=-1).mT
        # The scores' diagonal is zero; there tanh(10) is 1 in single precision, and constant.
        own = 10 * torch.eye(scores.shape[1], device=scores.device)
        return torch.relu((_STEEP * scores + own).tanh())

    def _filters(self, inputs: Tensor, static: Static) -> Tensor:
        """[B, N, 2 · rank]: how the embeddings are scaled, as sources and as targets."""
        # Products first and hops after them: the sums are the same, and narrower than the inputs.
        weight = self.hyper.weight.view(2, 2 * _HYPER, 1 + self.hops, -1).transpose(1, 2).flatten(0, 2)
        terms = functional.linear(inputs, weight).chunk(2 * (1 + self.hops), dim=-1)
        one_way = (static.along, terms[: 1 + self.hops]), (static.against, terms[1 + self.hops :])
        sums = torch.cat([_hops_of_products(spread, terms) for spread, terms in one_way], dim=-1)
        hidden = (sums + self.hyper.bias).sigmoid()
        necks = _side_by_side(hidden, self.necks).sigmoid().unflatten(-1, (2, 2, _NECK))
        return _side_by_side(necks.transpose(-2, -3).flatten(-3), self.filters)


def mixing(links: Tensor, static: Static) -> tuple[Spread, Spread]:
    """One hop along and one against: the links, normalised by what a source sends and by what a target
    receives, and the edges, summed and weighted."""
    forward = torch.addcmul(static.forward, links, _RECEIVED / links.sum(2, keepdim=True))
    backward = torch.addcmul(static.backward, links, _RECEIVED / links.sum(1, keepdim=True))
    return lambda h: forward.mT @ h, lambda h: backward @ h


def diffuse(h: Tensor, along: Spread, against: Spread, hops: int) -> Tensor:
    """[B, N, width] → [B, N, 1 + 2 · hops, width]: the input, its hops along, and those against.

    What the spreads give has its weight already.
    """
    terms = [h]
    for spread in (along, against):
        hop = h
        for _ in range(hops):
            hop = torch.add(spread(hop), h, alpha=1 - _RECEIVED)
            terms.append(hop)
    return torch.stack(terms, dim=2)


def _hops_of_products(spread: Spread, terms: Sequence[Tensor]) -> Tensor:
    """Σ_k (hop k of h) W_k, given the products h W_k."""
    reached, kept = terms[-1], torch.zeros_like(terms[-1])
    for term in reversed(terms[:-1]):
        kept = kept + reached
        reached = torch.add(term, spread(reached), alpha=_RECEIVED)
    return torch.add(reached, kept, alpha=1 - _RECEIVED)


def _side_by_side(h: Tensor, layers: nn.ModuleList) -> Tensor:
    """Each layer on a part of the last axis of its own, as one product."""
    weight = torch.block_diag(*(layer.get_parameter("weight") for layer in layers))
    return functional.linear(h, weight, torch.cat([layer.get_parameter("bias") for layer in layers]))


def _of_all(time: Tensor, nodes: int) -> Tensor:
    """[B, steps, C] → [B, steps, N, C]."""
    return time[:, :, None].expand(-1, -1, nodes, -1)


def _dense(adjacency: Tensor, windows: int) -> Tensor:
    """[B, N, N] of a block-diagonal sparse [B · N, B · N] or of a dense [N, N]."""
    if adjacency.layout == torch.strided:
        return adjacency.expand(windows, -1, -1)
    nodes, sparse = len(adjacency) // windows, adjacency.to_sparse_coo().coalesce()
    row, column = sparse.indices()
    dense = sparse.values().new_zeros(len(adjacency), nodes)
    return dense.index_put((row, column % nodes), sparse.values()).view(windows, nodes, nodes)

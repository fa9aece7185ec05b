"""fusion: an adjacency of its own for every step, graph convolution, a GRU, and a learned blend of both.

The model of "temporal-structural fusion for backend load prediction". Its graph has a weight for each
candidate edge, step and head: how relevant the sender is to the receiver over the look-back, times the
additive attention of eq. 2 at that step. Candidates are the window's dependencies and, for each entity, those
whose load correlates most with its own; of them each step keeps the strongest. Eq. 3 is a layer, eq. 4 the
GRU, eq. 5 the blend, eq. 6 the head. With the options PLAIN it is that and no more.

Letters beside those of a batch: M = B · N nodes of all windows; a edges kept of each step, K = L · a of all;
D width of the attention. Time, and within it the windows, comes first, so that a step is a graph of M nodes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch_geometric.utils import coalesce

from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Graph, GraphConfig
from fleetcast.models.layers import DirectHead, NodeEmbedding, observed_mean
from fleetcast.windows.batch import Batch, Edges

#: Most correlations in memory at once: rows of the N · N matrix are ranked block by block.
_BLOCK = 1 << 22
#: Correlations closer than this are equal, and the first entity wins: rounding must not choose.
_TIE = 2.0**-20
#: A series that varies less, relative to its level, is constant.
_CONSTANT = 1e-4


#: The options that make it the paper's plain form.
PLAIN: dict[str, Any] = {
    **dict.fromkeys(("residual", "sequence", "seasonal", "own", "norm", "level"), False),
    "identity": 0,
    "direct": 0,
    "dropout": 0.0,
}


class FusionConfig(GraphConfig):
    """Options of fusion.

    Told to see no graph (`identity`) it has no candidates; `shuffled` takes both kinds of candidates between
    other nodes; `learned` has for each entity its `neighbours` strongest sources, at least one, by learned
    weight, which then is their relevance.
    """

    hidden: Annotated[int, Field(ge=1)] = 32
    """Width of the graph layers, of the GRU and of the head."""
    layers: Annotated[int, Field(ge=1)] = 2
    """Graph convolution layers, hence how many edges far information travels within one step."""
    heads: Annotated[int, Field(ge=1, validate_default=True)] = 4
    """Attention heads: adjacencies of a step, each of which moves its share of the hidden features."""
    attention: Annotated[int, Field(ge=1)] = 4
    """D, width of eq. 2 in each head."""
    neighbours: Annotated[int, Field(ge=0)] = 8
    """Most correlated other entities that are candidate sources of each entity, beside its dependencies."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of a window's candidate edges that each step drops: the weakest by the mean over heads."""
    identity: Annotated[int, Field(ge=0)] = 16
    """Width of a learned vector for each entity among its inputs; 0: none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the features that training drops in the head."""
    sequence: bool = True
    """Whether the GRU also reads the spatial features of every step; else only those of the last step count,
    through eq. 5."""
    direct: Annotated[int, Field(ge=0)] = 128
    """Width of a residual MLP that reads the blend and, past it, look-back, seasonal values and node identity
    (0: the linear head of eq. 6)."""
    seasonal: bool = True
    """Whether the residual MLP sees the values one season (a day, a week) before each target step as well."""
    own: bool = True
    """Whether a graph layer adds a node's own features, unmixed with the neighbours'."""
    norm: bool = True
    """Whether features are normalised (layer norm) before each graph layer's nonlinearity."""
    level: bool = True
    """Whether metrics are read as offsets from their mean over the look-back, with that mean beside them."""

    @field_validator("heads")
    @classmethod
    def _share_the_width(cls, heads: int, info: ValidationInfo) -> int:
        if (hidden := info.data.get("hidden", 0)) % heads:
            raise ValueError(f"expected a divisor of hidden ({hidden})")
        return heads

    def build(self, geometry: Geometry) -> Fusion:
        """A new module with its initial weights."""
        return Fusion(self, geometry)


class Fusion(Model):
    """The module. x of eq. 2: the metrics, whether each was observed, the step's time, which node it is."""

    def __init__(self, config: FusionConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        metrics, hidden = len(geometry.metrics), config.hidden
        inputs = (3 if config.level else 2) * metrics + geometry.calendar + config.identity
        self.config = config
        self.graph = Graph(config, geometry)
        self.identity = NodeEmbedding(geometry, config.identity) if config.identity else None
        self.convolutions = nn.ModuleList(
            GraphConvolution(a, b, config) for a, b in pairwise([inputs] + [hidden] * config.layers)
        )
        self.gru = nn.GRU(inputs + hidden if config.sequence else inputs, hidden)
        self.balance = nn.Parameter(torch.zeros(()))
        self.head = (
            DirectHead(geometry, hidden, config.direct, config.dropout, config.seasonal)
            if config.direct
            else LinearHead(geometry, hidden)
        )
        # The last to draw its weights: those of the others do not depend on whether there is a graph.
        self.attention = None if config.graph == "identity" else AdditiveAttention(inputs, config)

    @property
    def alpha(self) -> Tensor:
        """α of eq. 5, the share of the spatial features."""
        return self.balance.sigmoid()

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        steps, sequence = self._steps(batch), self.config.sequence
        spatial = self._spatial(steps if sequence else steps[-1:], batch)
        _, temporal = self.gru(torch.cat([steps, spatial], dim=-1) if sequence else steps)
        fused = self.alpha * spatial[-1] + (1 - self.alpha) * temporal[-1]
        return self.head(fused.unflatten(0, (len(batch.x), -1)), batch)

    def candidates(self, batch: Batch) -> Candidates:
        """The edges that every step of a window chooses from."""
        with torch.autocast(batch.x.device.type, enabled=False):  # rounding should not choose edges
            weight = self.graph.weight(batch)
            if weight is not None:
                return Candidates.learned(weight, self.config.neighbours, len(batch.x))
            series = self.graph.relabelled(unit_series(batch.x, batch.mask), batch)
            return Candidates.union(self.graph.edges(batch), series, self.config.neighbours)

    def _steps(self, batch: Batch) -> Tensor:
        """x of all steps, [L, M, inputs]."""
        windows, history, nodes, _ = batch.x.shape
        features = [batch.x, batch.mask.to(batch.x.dtype)]
        if self.config.level:
            level = observed_mean(batch.x, batch.mask)
            features = [batch.x - level, features[1], level.expand_as(batch.x)]
        features.append(batch.time_x[:, :, None].expand(-1, -1, nodes, -1))
        if self.identity is not None:
            features.append(self.identity(batch.nodes).expand(windows, history, -1, -1))
        return torch.cat(features, dim=-1).transpose(0, 1).flatten(1, 2)

    def _spatial(self, steps: Tensor, batch: Batch) -> Tensor:
        """H_s of eq. 3, [L, M, inputs] → [L, M, hidden]."""
        adjacency = None
        if self.attention is not None:
            adjacency = self.attention(steps, self.candidates(batch))
        h = steps
        for layer in self.convolutions:
            h = layer(h, adjacency)
        return h


class GraphConvolution(nn.Module):
    """φ(Ã_t X_t W_s) of eq. 3; each head's adjacency moves its share of the features."""

    def __init__(self, inputs: int, outputs: int, config: FusionConfig) -> None:
        super().__init__()
        self.neighbours = nn.Linear(inputs, outputs, bias=False)
        self.own = nn.Linear(inputs, outputs) if config.own else None
        self.norm = nn.LayerNorm(outputs) if config.norm else nn.Identity()

    def forward(self, h: Tensor, adjacency: DynamicAdjacency | None) -> Tensor:
        """[L, M, inputs] → [L, M, outputs]; without an adjacency every node stands alone."""
        spread = self.neighbours(h)
        if adjacency is not None:
            spread = adjacency.gather(spread)
        if self.own is not None:
            spread = spread + self.own(h)
        return torch.relu(self.norm(spread))


class LinearHead(nn.Module):
    """Eq. 6 for all horizon steps at once."""

    def __init__(self, geometry: Geometry, hidden: int) -> None:
        super().__init__()
        self.shape = (geometry.horizon, len(geometry.metrics), 1 + len(geometry.quantiles))
        self.last = nn.Linear(hidden, math.prod(self.shape))

    def forward(self, state: Tensor, batch: Batch) -> Tensor:
        """[B, N, hidden] → [B, H, N, F, 1 + Q]."""
        return self.last(state).unflatten(-1, self.shape).transpose(1, 2)


class AdditiveAttention(nn.Module):
    """Eq. 2 in each head, times the relevance; and the choice of the strongest edges."""

    def __init__(self, inputs: int, config: FusionConfig) -> None:
        super().__init__()
        heads, width = config.heads, config.attention
        self.sparsity = config.sparsity
        self.receiver = nn.Linear(inputs, heads * width, bias=False)  # W₁
        self.sender = nn.Linear(inputs, heads * width, bias=False)  # W₂
        self.vector = nn.Parameter(torch.randn(heads, width) / width**0.5)  # w_a

    def forward(self, steps: Tensor, candidates: Candidates) -> DynamicAdjacency | None:
        """[L, M, inputs] → the adjacency of each step; None if there is no candidate."""
        if not len(candidates.relevance):
            return None
        with torch.autocast(steps.device.type, enabled=False):  # rounding should not choose edges
            receiver, sender = self.receiver(steps.float()), self.sender(steps.float())
            vector = torch.block_diag(*self.vector[..., None])
            attention = _attend(receiver, sender, vector, candidates.index)
            kept = self._strongest(attention.mean(0) * candidates.relevance, candidates.sizes)
            chosen = kept.flatten().nonzero()[:, 0]
            edges = chosen % len(candidates.relevance)
            routes = Routes.of(candidates.index, edges.view(len(steps), -1), steps.shape[1])
            weight = attention.flatten(1).index_select(1, chosen)
            weight = _Attention.apply(receiver, sender, vector, weight, routes)
            return DynamicAdjacency.of(weight * candidates.relevance.index_select(0, edges), routes)

    def _strongest(self, strength: Tensor, sizes: list[int]) -> Tensor:
        """[L, E] whether a step keeps an edge; as many in every step."""
        keep = torch.zeros_like(strength, dtype=torch.bool)
        for window, kept in zip(strength.split(sizes, 1), keep.split(sizes, 1), strict=True):
            count = kept_edges(self.sparsity, window.shape[1])
            kept.scatter_(1, window.topk(count, dim=1, sorted=False).indices, True)
        return keep


def kept_edges(sparsity: float, edges: int) -> int:
    """⌈(1 − s) · E⌉ of a window's E candidates; rounding of s adds none."""
    return math.ceil(round((1 - sparsity) * edges, 6))


@dataclass(frozen=True)
class Candidates:
    """The edges that a batch's steps choose from, sorted by window, receiver and sender."""

    index: Tensor
    """[2, E] int64, sender and receiver among M nodes; no pair twice, no node with itself."""
    relevance: Tensor
    """[E], at least 0."""
    sizes: list[int]
    """Edges of each window."""

    @classmethod
    @torch.no_grad()
    def union(cls, dependencies: Edges, series: Tensor, neighbours: int) -> Candidates:
        """The dependencies and, for each entity, the most correlated others; `series` as of `unit_series`.

        The relevance joins two shares, c + d − c · d: c is the correlation where it is positive, d the weight
        of the dependency as a share of its receiver's largest.
        """
        windows, nodes, _ = series.shape
        total = windows * nodes
        sources = most_correlated(series, neighbours)
        sources = sources + nodes * torch.arange(windows, device=series.device)[:, None, None]
        receivers = torch.arange(total, device=series.device).repeat_interleave(sources.shape[-1])
        others = dependencies.index[0] != dependencies.index[1]
        index, weight = coalesce(
            torch.cat([dependencies.index[:, others], torch.stack([sources.flatten(), receivers])], dim=1),
            torch.cat([dependencies.weight[others].float(), series.new_zeros(len(receivers))]),
            total,
            reduce="sum",
            sort_by_row=False,
        )
        largest = series.new_zeros(total).scatter_reduce(0, index[1], weight, "amax")
        dependency = weight / largest[index[1]].clamp_min(torch.finfo(weight.dtype).tiny)
        flat = series.flatten(0, 1)
        correlation = _dots(flat, flat, index[0], _pointers(index[1], total)).clamp(0, 1)
        return cls(index, correlation + dependency - correlation * dependency, _sizes(index, windows, nodes))

    @classmethod
    def learned(cls, weight: Tensor, neighbours: int, windows: int) -> Candidates:
        """Each entity's sources of the largest learned weight [N, N], in units of the mean weight.

        They are the same in all windows.
        """
        nodes = len(weight)
        count = min(max(neighbours, 1), nodes - 1)
        sources = weight.detach().clone().fill_diagonal_(-1).topk(count, dim=0).indices.T.sort(dim=1).values
        receivers = torch.arange(nodes, device=weight.device).repeat_interleave(count)
        index = torch.stack([sources.flatten(), receivers])
        shift = nodes * torch.arange(windows, device=weight.device)
        relevance = nodes * weight[index[0], index[1]]
        index = (index[:, None] + shift[:, None]).flatten(1)
        return cls(index, relevance.repeat(windows), [nodes * count] * windows)


def unit_series(x: Tensor, mask: Tensor) -> Tensor:
    """[B, L, N, F] → [B, N, F · L] whose dot products are the mean correlation of two entities' metrics.

    Only observed values count: gaps are at a metric's mean. A metric that is constant or not observed is
    zero; the mean is over the others.
    """
    level = observed_mean(x, mask)
    centred = torch.where(mask, x - level, 0)
    size = centred.norm(dim=1, keepdim=True)
    varies = size > _CONSTANT * (1 + level.abs())
    unit = torch.where(varies, centred / size, 0) / varies.sum(-1, keepdim=True).clamp_min(1).sqrt()
    return unit.permute(0, 2, 3, 1).flatten(2)


def most_correlated(series: Tensor, neighbours: int) -> Tensor:
    """[B, N, D] as of `unit_series` → [B, N, k] the other entities that correlate most with each.

    Of equals the first; k is at most N − 1.
    """
    windows, nodes, _ = series.shape
    count = min(neighbours, nodes - 1)
    if not count:
        return torch.zeros(windows, nodes, 0, dtype=torch.long, device=series.device)
    entities = torch.arange(nodes, device=series.device)

    def strongest(rows: Tensor) -> Tensor:
        correlation = series[:, rows] @ series.mT
        rank = (correlation / _TIE).round().double() * nodes - entities  # distinct whole numbers
        rank[:, torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        return rank.topk(count).indices

    blocks = entities.split(max(1, _BLOCK // (windows * nodes)))
    return torch.cat([strongest(rows) for rows in blocks], dim=1)


@dataclass(frozen=True)
class Routes:
    """The edges that each step keeps, ready to gather, both ways."""

    index: Tensor
    """[2, L, a] senders and receivers among M nodes, sorted by receiver."""
    senders: Tensor
    """[K] among the L · M nodes of all steps."""
    receivers: Tensor
    """[K] among the L · M nodes, rising."""
    incoming: Tensor
    """[L · M + 1] where each node's incoming edges begin."""
    order: Tensor
    """[K] all edges sorted by sender."""
    outgoing: Tensor
    """[L · M + 1] where each node's outgoing edges begin in that order."""

    @classmethod
    def of(cls, candidates: Tensor, kept: Tensor, nodes: int) -> Routes:
        """The kept [L, a] of the candidate edges [2, E] between M nodes."""
        index = candidates.index_select(1, kept.flatten()).view(2, *kept.shape)
        steps = torch.arange(len(kept), device=kept.device)[:, None]
        senders, receivers = (index + nodes * steps).flatten(1)
        incoming, outgoing = (_pointers(ends, len(kept) * nodes) for ends in (receivers, senders))
        order = senders.int().argsort(stable=True)  # a radix sort: half the bytes, half the time
        return cls(index, senders, receivers, incoming, order, outgoing)


@dataclass(frozen=True)
class DynamicAdjacency:
    """Ã of every step and head, D̂⁻¹ (A + I): the graph is directed, so a receiver's weights sum to 1."""

    weight: Tensor
    """[heads, K] of the kept edges, before normalisation."""
    degree: Tensor
    """[heads, L · M, 1] their sum over a node's incoming edges and its self-loop of weight 1, a constant."""
    routes: Routes

    @classmethod
    def of(cls, weight: Tensor, routes: Routes) -> DynamicAdjacency:
        """From the weights of the kept edges."""
        offsets = routes.incoming.repeat(len(weight), 1)
        sums = torch.segment_reduce(weight.detach(), "sum", offsets=offsets, axis=1)
        return cls(weight, 1 + sums[..., None], routes)

    def gather(self, h: Tensor) -> Tensor:
        """What each node receives of h [L, M, channels], of each head its share of the channels."""
        with torch.autocast(h.device.type, enabled=False):  # sparse products have no half precision
            heads = h.float().flatten(0, 1).unflatten(-1, (len(self.weight), -1)).transpose(0, 1)
            received = _Gather.apply(self.weight, heads.contiguous(), self.degree, self.routes)
            return received.transpose(0, 1).flatten(1).view_as(h)


@torch.no_grad()
def _attend(receiver: Tensor, sender: Tensor, vector: Tensor, index: Tensor) -> Tensor:
    """σ(w_aᵀ tanh(W₁ x_i + W₂ x_j)) of each head and step, for edges that all steps share.

    Args:
        receiver: [L, M, heads · D], W₁ x.
        sender: [L, M, heads · D], W₂ x.
        vector: [heads · D, heads], w_a of each head in a column.
        index: [2, E], senders and receivers.

    Returns:
        [heads, L, E].
    """
    (steps, _, width), (senders, receivers) = receiver.shape, index
    attention = receiver.new_empty(vector.shape[1], steps, len(senders))
    room = receiver.new_empty(2, len(senders), width)
    for step in range(steps):
        hidden = _hidden(receiver[step], sender[step], receivers, senders, room)
        torch.mm(vector.T, hidden.T, out=attention[:, step])
    return attention.sigmoid_()


def _hidden(receiver: Tensor, sender: Tensor, receivers: Tensor, senders: Tensor, room: Tensor) -> Tensor:
    """tanh(W₁ x_i + W₂ x_j) of one step's edges, written into `room` [2, E, heads · D].

    Fresh memory for every step would cost more than the arithmetic.
    """
    hidden = torch.index_select(receiver, 0, receivers, out=room[0])
    hidden += torch.index_select(sender, 0, senders, out=room[1])
    return hidden.mul_(2).sigmoid_().mul_(2).sub_(1)  # = tanh, whose own kernel is several times slower


class _Attention(torch.autograd.Function):
    """The gradient of the attention that was computed when the edges were chosen.

    Hidden features are computed anew, step by step, and summed over edges by node.
    """

    @staticmethod
    def forward(
        ctx: Any, receiver: Tensor, sender: Tensor, vector: Tensor, attention: Tensor, routes: Routes
    ) -> Tensor:
        ctx.save_for_backward(receiver, sender, vector, attention)
        ctx.routes = routes
        return attention.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        receiver, sender, vector, attention = ctx.saved_tensors
        routes: Routes = ctx.routes
        steps, nodes, width = receiver.shape
        logits = (grads[0] * attention * (1 - attention)).unflatten(1, (steps, -1))
        to_receiver, to_sender = torch.empty_like(receiver), torch.empty_like(sender)
        to_vector = torch.zeros_like(vector)
        edges = logits.shape[2]
        every = torch.arange(edges, device=receiver.device)
        room = receiver.new_empty(2, edges, width)
        for step in range(steps):
            senders, receivers = routes.index[:, step]
            hidden = _hidden(receiver[step], sender[step], receivers, senders, room)
            to_vector += (logits[:, step] @ hidden).T
            slope = torch.mm(logits[:, step].T, vector.T, out=room[1])
            slope *= hidden.square_().neg_().add_(1)
            rows, first = slice(step * nodes, (step + 1) * nodes + 1), step * edges
            order = routes.order[first : first + edges] - first
            to_receiver[step] = _bag(slope, every, routes.incoming[rows] - first)
            to_sender[step] = _bag(slope, order, routes.outgoing[rows] - first)
        return to_receiver, to_sender, to_vector, None, None


class _Gather(torch.autograd.Function):
    """(h_i + Σ_j w_ij h_j) / (1 + Σ_j w_ij) of each head: weight [heads, K], h and result [heads, L · M, c].

    The gradient by way of the degree is within that of the weight.

    Never a message per edge in memory, forward or backward: that would be more than all else together.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, h: Tensor, degree: Tensor, routes: Routes) -> Tensor:
        sums = [_bag(x, routes.senders, routes.incoming, w) for w, x in zip(weight, h, strict=True)]
        received = torch.stack(sums).add_(h).div_(degree)
        ctx.save_for_backward(weight, h, degree, received)
        ctx.routes = routes
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, h, degree, received = ctx.saved_tensors
        routes: Routes = ctx.routes
        slope = grads[0] / degree
        to_degree = torch.linalg.vecdot(slope, received)
        to_weight, to_h = torch.empty_like(weight), torch.empty_like(h)
        receivers = routes.receivers.index_select(0, routes.order)
        for head, sums in enumerate(slope):
            to_weight[head] = _dots(sums, h[head], routes.senders, routes.incoming)
            to_weight[head] -= to_degree[head].index_select(0, routes.receivers)
            sent = weight[head].index_select(0, routes.order)
            to_h[head] = _bag(sums, receivers, routes.outgoing, sent)
        return to_weight, to_h.add_(slope), None, None


def _bag(table: Tensor, index: Tensor, pointers: Tensor, weight: Tensor | None = None) -> Tensor:
    """Row r: the sum of the table's rows index[pointers[r] : pointers[r + 1]], each times its weight.

    A sparse times a dense matrix; torch computes an embedding bag several times faster than that.
    """
    return functional.embedding_bag(
        index, table, pointers, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def _dots(a: Tensor, b: Tensor, columns: Tensor, pointers: Tensor) -> Tensor:
    """[E] dot products of row r of a and row c of b at each entry (r, c) of a sparse matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")  # "beta" to torch
        values = a.new_zeros(len(columns))
        entries = torch.sparse_csr_tensor(pointers, columns, values, (len(a), len(b)), device=a.device)
        return torch.sparse.sampled_addmm(entries, a, b.T, beta=0).values()


def _pointers(rows: Tensor, total: int) -> Tensor:
    """[total + 1] where each row begins among the sorted rows."""
    return functional.pad(torch.bincount(rows, minlength=total).cumsum(0), (1, 0))


def _sizes(index: Tensor, windows: int, nodes: int) -> list[int]:
    sizes: list[int] = torch.bincount(index[1] // nodes, minlength=windows).tolist()
    return sizes

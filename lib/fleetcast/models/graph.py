"""The graph as models see it: the batch's own, none, a shuffled or a learned one; normalised, both ways.

An edge carries load from source to target. `along` moves information with the load, from sources to targets,
`against` back; in both matrices the row is the receiver.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import to_torch_csr_tensor

from fleetcast.models.base import ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.models.layers import NodeEmbedding
from fleetcast.windows.batch import Batch, Edges

#: Seed of the relabelling that makes a shuffled graph: the same one for every model and run.
_SHUFFLE = 20_180_101


class GraphConfig(ModelConfig):
    """Options of a model that reads the graph."""

    looks_around = True

    graph: Literal["true", "identity", "shuffled", "learned"] = "true"
    """Which graph the model sees: the dataset's; none; the dataset's between other nodes, as many edges with
    the same weights, those with the border again with the border; or one that it learns of node embeddings,
    the border's as well. What the true one adds is the graph lift."""


@dataclass(frozen=True)
class Adjacency:
    """A normalised graph in both directions; row = receiver. M = B · N nodes of all windows together."""

    along: Tensor
    """[M, M] sparse, or [N, N] dense where all windows share it: each node gathers from its sources."""
    against: Tensor
    """The same shape: each node gathers from its targets."""

    @classmethod
    def symmetric(cls, edges: Edges, nodes: int) -> Adjacency:
        """D̂^-1/2 Â D̂^-1/2 with Â = A + I (stgnn, eq. 1) of `nodes` = B · N nodes; no edges: the identity."""
        return cls(
            _symmetric(edges.index, edges.weight, nodes), _symmetric(edges.index.flip(0), edges.weight, nodes)
        )

    @classmethod
    def walks(cls, edges: Edges, nodes: int) -> Adjacency:
        """Random walks: a source's load spreads over its targets by weight, and back. No self-loops."""
        return cls(_walk(edges.index, edges.weight, nodes), _walk(edges.index.flip(0), edges.weight, nodes))


class Graph(nn.Module):
    """Turns a batch's edges into the adjacency of the kind that a model is told to see."""

    def __init__(self, config: GraphConfig, geometry: Geometry, rank: int = 10) -> None:
        super().__init__()
        self.kind = config.graph
        learned = config.graph == "learned"
        self.sources = NodeEmbedding(geometry, rank) if learned else None
        self.targets = NodeEmbedding(geometry, rank) if learned else None

    def edges(self, batch: Batch) -> Edges:
        """The edges over B · N nodes; not of a learned graph, which has a weight for every pair."""
        given = batch.edges
        if self.kind == "identity":
            return Edges(given.index[:, :0], given.weight[:0])
        if self.kind == "shuffled":
            nodes = batch.x.shape[2]
            to = _shuffle(batch).to(given.index.device)
            return Edges(given.index - given.index % nodes + to[given.index % nodes], given.weight)
        return given

    def relabelled(self, series: Tensor, batch: Batch) -> Tensor:
        """[B, N, …] the series that the graph takes for each node's: its own; if shuffled, another's."""
        if self.kind != "shuffled":
            return series
        return series[:, _shuffle(batch).argsort().to(series.device)]

    def symmetric(self, batch: Batch) -> Adjacency:
        """As `Adjacency.symmetric`, of the kind asked for."""
        weight = self.weight(batch)
        if weight is None:
            return Adjacency.symmetric(self.edges(batch), batch.x.shape[0] * batch.x.shape[2])
        weight = weight + torch.eye(len(weight), device=weight.device)

        def normalised(received: Tensor) -> Tensor:  # row = receiver
            scale = received.sum(1).rsqrt()
            return scale[:, None] * received * scale

        return Adjacency(normalised(weight.T), normalised(weight))

    def walks(self, batch: Batch) -> Adjacency:
        """As `Adjacency.walks`, of the kind asked for."""
        weight = self.weight(batch)
        if weight is None:
            return Adjacency.walks(self.edges(batch), batch.x.shape[0] * batch.x.shape[2])
        return Adjacency(weight.T, weight / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny))

    def weight(self, batch: Batch) -> Tensor | None:
        """[N, N] learned weight from row (source) to column (target), rows sum to 1 (Graph WaveNet, eq. 5);
        None for a graph of edges."""
        if self.sources is None or self.targets is None:
            return None
        return torch.relu(self.sources(batch.nodes) @ self.targets(batch.nodes).T).softmax(1)


def gather(adjacency: Tensor, h: Tensor, back: Tensor | None = None) -> Tensor:
    """What each node receives, one product for all channels: [M, …] → [M, …].

    No message is ever stored per edge. A dense [N, N] adjacency is that of every window. `back` is a sparse
    one `transposed`: with it the backward product is as fast as the forward one.
    """
    with torch.autocast(h.device.type, enabled=False):  # sparse products have no half precision
        if adjacency.layout == torch.strided:
            windows = h.float().unflatten(0, (-1, len(adjacency))).flatten(2)
            shared = adjacency.float().expand(len(windows), -1, -1)
            return (shared @ windows).flatten(0, 1).view_as(h)
        flat = h.float().flatten(1)
        return (adjacency @ flat if back is None else _Product.apply(adjacency, back, flat)).view_as(h)


def transposed(adjacency: Tensor) -> Tensor:
    """Each node's sources and targets swapped, in the same layout."""
    return adjacency.T if adjacency.layout == torch.strided else adjacency.t().to_sparse_csr()


class _Product(torch.autograd.Function):
    """A constant sparse matrix times h; torch's own backward would transpose the matrix anew each time."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, back: Tensor, h: Tensor) -> Tensor:
        ctx.back = back
        return matrix @ h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.back @ grads[0]


def _shuffle(batch: Batch) -> Tensor:
    """[N] the place that each node's edges go to in a shuffled graph: own entities' to own ones, the border's
    to the border, so that as much load flows into the group as in the true one."""
    generator = torch.Generator().manual_seed(_SHUFFLE)
    own, border = batch.own, batch.x.shape[2] - batch.own
    # A GPU would draw others.
    places = [torch.randperm(count, generator=generator, device="cpu") for count in (own, border)]
    return torch.cat([places[0], own + places[1]])


def _symmetric(index: Tensor, weight: Tensor, nodes: int) -> Tensor:
    """[nodes, nodes] CSR: row index[1] gathers from column index[0]; degrees are sums of incoming weight."""
    index, weight = gcn_norm(index, weight.float(), nodes, add_self_loops=True, dtype=torch.float32)
    return _csr(index, weight, nodes)


def _walk(index: Tensor, weight: Tensor, nodes: int) -> Tensor:
    out = torch.zeros(nodes, device=weight.device).index_add(0, index[0], weight.float())
    return _csr(index, weight.float() / out[index[0]], nodes)


def _csr(index: Tensor, weight: Tensor, nodes: int) -> Tensor:
    with warnings.catch_warnings():
        # CSR is "beta" to torch; times a dense matrix, forward and backward, it is its fastest sparse form.
        warnings.filterwarnings("ignore", "Sparse (CSR|invariant)")
        return to_torch_csr_tensor(index.flip(0), weight, nodes)

"""Graph WaveNet: gated dilated convolutions over time, diffusion over the graph and over a learned one.

Z. Wu et al., "Graph WaveNet for deep spatial-temporal graph modeling", IJCAI 2019. A layer convolves each
node's series (eq. 9), then diffuses over random walks along and against the edges and over an adaptive
adjacency made of node embeddings (eq. 5 to 7). `graph` says which edges the walks follow; the adaptive
adjacency is there whatever it says, and alone where it is "learned".

The look-back is zero-padded (zero is the mean, and not observed) to the receptive field, so the series shrink
to one step, and of each layer's skip only the last step counts: the skips are exactly the published ones,
cropped from the right, at the price of one product. The published last layer ends in a graph convolution that
nothing reads, and its diffusions have a bias that the normalisation after them takes away; there are none
here. As published, batch normalisation makes the windows of a training batch depend on each other; in
evaluation each stands alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fleetcast.errors import InputError
from fleetcast.models.base import Model
from fleetcast.models.geometry import Geometry
from fleetcast.models.graph import Graph, GraphConfig, gather, transposed
from fleetcast.models.layers import NodeEmbedding
from fleetcast.windows.batch import Batch

#: A matrix, row = receiver, and its transpose.
Support = tuple[Tensor, Tensor]


class GraphWavenetConfig(GraphConfig):
    """Options of Graph WaveNet; the defaults are the published ones."""

    blocks: Annotated[int, Field(ge=1)] = 4
    """Blocks of layers; the dilation starts again at 1 in each."""
    layers: Annotated[int, Field(ge=2)] | None = None
    """Layers of a block, of dilation 1, 2, 4, …; None: as many as see the whole look-back (2 for 12 steps).
    Over long look-backs fewer blocks of more layers are faster: of 96 steps, 2 blocks rather than 4."""
    hidden: Annotated[int, Field(ge=1)] = 32
    """Width of the convolutions and of the diffusions."""
    skip: Annotated[int, Field(ge=1)] = 256
    """Width in which all layers meet."""
    end: Annotated[int, Field(ge=1)] = 512
    """Width of the hidden layer between there and the forecast."""
    hops: Annotated[int, Field(ge=1)] = 2
    """Diffusion steps: how many edges information travels in one layer."""
    rank: Annotated[int, Field(ge=1)] = 10
    """Width of the node embeddings of the adaptive adjacency."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of the features that training drops after each diffusion."""
    norm: Literal["batch", "layer"] = "batch"
    """What normalises after each layer. `batch` is the published one; `layer` keeps the windows of a batch
    apart in training, too."""

    def build(self, geometry: Geometry) -> GraphWavenet:
        """A new module with its initial weights. Raises InputError if it sees less than the look-back."""
        return GraphWavenet(self, geometry)

    def dilations(self, history: int) -> list[int]:
        """The dilation of each layer; together with the present step they see 1 + their sum."""
        layers = self.layers or 2
        while self.layers is None and self._field(layers) < history:
            layers += 1
        if self._field(layers) < history:
            raise InputError(
                f"model graph_wavenet: option layers: {layers} in each of {self.blocks} blocks see "
                f"{self._field(layers)} steps, expected at least the look-back of {history}"
            )
        return [2**layer for layer in range(layers)] * self.blocks

    def _field(self, layers: int) -> int:
        return 1 + self.blocks * (2**layers - 1)


class GraphWavenet(Model):
    """The module. Its inputs per node and step are the metrics, whether each was observed, and the time."""

    def __init__(self, config: GraphWavenetConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        hidden, dilations = config.hidden, config.dilations(geometry.history)
        self.padding = 1 + sum(dilations) - geometry.history
        self.graph = None if config.graph == "learned" else Graph(config, geometry)
        self.sources, self.targets = (NodeEmbedding(geometry, config.rank) for _ in range(2))
        for embedding in (self.sources, self.targets):
            nn.init.normal_(embedding.table)
        supports = 1 if self.graph is None else 3
        self.start = nn.Linear(2 * len(geometry.metrics) + geometry.calendar, hidden)
        self.gates = nn.ModuleList(GatedConvolution(hidden, dilation) for dilation in dilations)
        self.diffusions = nn.ModuleList(Diffusion(hidden, supports, config.hops) for _ in dilations[1:])
        norm = nn.BatchNorm1d if config.norm == "batch" else nn.LayerNorm
        self.norms = nn.ModuleList(norm(hidden) for _ in dilations[1:])
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Linear(len(dilations) * hidden, config.skip)
        self.end = nn.Linear(config.skip, config.end)
        self.last = nn.Linear(config.end, geometry.horizon * self.outputs[0] * self.outputs[1])

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        windows, _, nodes, _ = batch.x.shape
        h = torch.relu(self.end(torch.relu(self.skip(self._encode(batch)))))
        return self.last(h).view(windows, nodes, self.geometry.horizon, *self.outputs).transpose(1, 2)

    def _encode(self, batch: Batch) -> Tensor:
        """[B · N, layers · hidden]: the last step of each layer."""
        h, supports, ends = self.start(self._steps(batch)), self._supports(batch), []
        for gate, diffusion, norm in zip(self.gates[:-1], self.diffusions, self.norms, strict=True):
            gated = gate(h)
            ends.append(gated[:, -1])
            diffused = self.dropout(diffusion(gated, supports))
            h = norm((diffused + h[:, -gated.shape[1] :]).flatten(0, 1)).view_as(gated)
        ends.append(self.gates[-1](h)[:, -1])
        return torch.cat(ends, dim=-1)

    def _steps(self, batch: Batch) -> Tensor:
        """[B · N, receptive field, inputs], the look-back last."""
        time = batch.time_x[:, :, None].expand(-1, -1, batch.x.shape[2], -1)
        steps = torch.cat([batch.x, batch.mask.to(batch.x.dtype), time], dim=-1)
        return functional.pad(steps.transpose(1, 2).flatten(0, 1), (0, 0, self.padding, 0))

    def _supports(self, batch: Batch) -> list[Support]:
        """The adaptive adjacency and, of a graph of edges, the walks both ways."""
        adaptive = self.adaptive(batch.nodes)
        if self.graph is None:
            return [(adaptive, adaptive.T)]
        walks = self.graph.walks(batch)
        return [(matrix, transposed(matrix)) for matrix in (adaptive, walks.along, walks.against)]

    def adaptive(self, nodes: Tensor) -> Tensor:
        """[N, N] of the nodes' embeddings (eq. 5): row = receiver, the weights of a source sum to 1."""
        return torch.relu(self.sources(nodes) @ self.targets(nodes).T).softmax(1).T


class Diffusion(nn.Module):
    """Eq. 7: each hop over each support times a matrix of its own, summed: [M, steps, width] → the same."""

    def __init__(self, width: int, supports: int, hops: int) -> None:
        super().__init__()
        self.hops = hops
        self.mix = nn.Linear((1 + supports * hops) * width, width, bias=False)

    def forward(self, h: Tensor, supports: list[Support]) -> Tensor:
        """Input, and as many supports as there are matrices for."""
        # The terms are never laid side by side, which would copy them all.
        weights = iter(self.mix.weight.split(h.shape[-1], dim=1))
        mixed = functional.linear(h, next(weights))
        for matrix, back in supports:
            hop = h
            for _ in range(self.hops):
                hop = gather(matrix, hop, back)
                mixed = mixed + functional.linear(hop, next(weights))
        return mixed


class GatedConvolution(nn.Module):
    """tanh(Θ₁ ⋆ h + b) ⊙ σ(Θ₂ ⋆ h + c) (eq. 9), kernel 2: `dilation` steps fewer than before."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, 2 * width, (2, 1), dilation=(dilation, 1))
        for parameter in self.convolution.parameters():
            parameter.data[:width] *= 2  # Θ₁ and b are kept doubled, for the forward pass

    def forward(self, h: Tensor) -> Tensor:
        """[M, steps, width] → [M, steps − dilation, width]."""
        # As an image in the channels-last layout, so that nothing is copied.
        convolved = self.convolution(h.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        filtered, gate = convolved.sigmoid().chunk(2, dim=-1)
        return (2 * filtered - 1) * gate  # tanh(a) = 2 σ(2a) − 1, and σ is several times faster

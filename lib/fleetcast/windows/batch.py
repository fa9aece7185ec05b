"""The contract between the data and every model: one batch of windows of one entity group.

Letters: B windows, L look-back steps, H horizon steps, N entities that are seen, of which the first O are the
group's own and the others its border, F input metrics, S seasonal lags, C time features, E edges of all B
windows together, Q quantiles. Only own entities are forecast: the border has no targets to be counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """The dependencies in force at each window's origin, as one block-diagonal graph over B · N nodes.

    Node b · N + n is entity n in window b, so a layer sees all windows at once and no edge joins two windows.
    An edge carries load from row 0 (source) to row 1 (target).
    """

    index: Tensor
    """[2, E] int64."""
    weight: Tensor
    """[E] float32, positive."""


@dataclass(frozen=True)
class Batch:
    """B windows of N entities. All values are scaled; where the mask is False a value is a filling."""

    x: Tensor
    """[B, L, N, F] look-back."""
    mask: Tensor
    """[B, L, N, F] bool: observed."""
    time_x: Tensor
    """[B, L, C] time features of the look-back."""
    time_y: Tensor
    """[B, H, C] time features of the horizon: known in advance."""
    seasonal_x: Tensor
    """[B, L, N, F, S] the value one lag (a day, a week) before each step of the look-back."""
    seasonal_x_mask: Tensor
    """[B, L, N, F, S] bool."""
    seasonal: Tensor
    """[B, H, N, F, S] the value one lag before each target step: known in advance."""
    seasonal_mask: Tensor
    """[B, H, N, F, S] bool."""
    edges: Edges
    nodes: Tensor
    """[N] int64: which entities they are, as positions in the list of all that the model was trained on; −1
    for others."""
    y: Tensor
    """[B, H, O, F] targets; zero where not observed."""
    y_mask: Tensor
    """[B, H, O, F] bool: observed, hence counted."""
    origins: Tensor
    """[B] int64: the step of the first target, counted from the dataset's start."""

    @property
    def own(self) -> int:
        """O: how many of the entities are the group's own."""
        return self.y.shape[2]

    def alone(self) -> Batch:
        """The own entities without border and edges, for what looks at no neighbours; the batch itself where
        there is no border."""
        own = self.own
        if own == self.x.shape[2]:
            return self
        parts = ("x", "mask", "seasonal_x", "seasonal_x_mask", "seasonal", "seasonal_mask")
        tensors = {name: getattr(self, name)[:, :, :own] for name in parts}
        edges = Edges(self.edges.index[:, :0], self.edges.weight[:0])
        return dataclasses.replace(self, edges=edges, nodes=self.nodes[:own], **tensors)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        # Work on a GPU waits for a copy to it; the CPU would read a copy that is still on its way.
        later = torch.device(device).type != "cpu"
        return self._each(lambda part: part.to(device, non_blocking=later))

    def pinned(self, device: torch.device) -> Batch:
        """The batch in memory from which a GPU copies while CPU and GPU work."""
        with torch.cuda.device(device):  # each thread has a current device of its own
            return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {
            field.name: change(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "edges"
        }
        return Batch(edges=Edges(change(self.edges.index), change(self.edges.weight)), **tensors)

"""ridge: a linear map of the look-back and the seasonal values, solved in closed form.

One map for each metric and horizon step, shared by all entities (a global model; Hoerl & Kennard 1970 for the
penalty). The normal equations are sums over windows, so one pass over the data gives the exact solution,
whatever the batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetcast.models.base import Batches, Fitted, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch


class RidgeConfig(ModelConfig):
    """Options of ridge."""

    fitted = True

    residual: Literal[False] = False
    """Never: there are no gradients to learn the blend with, and the map holds it anyway."""
    alphas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        1.0,
        10.0,
        1e2,
        1e3,
        1e4,
    )
    """Candidate penalties of Σ (y − ŷ)² + α Σ w², without the intercept; the validation part chooses one for
    each metric."""
    others: bool = False
    """Whether a metric's map also sees the last values of the other metrics."""

    def build(self, geometry: Geometry) -> Ridge:
        """A new module, not yet fitted."""
        return Ridge(self, geometry)


class Ridge(Fitted):
    """The module. What a metric's map sees is past (the same for all horizon steps) or ahead (of one step).

    Past are an intercept, the L look-back values, the S seasonal values of each of their steps, and which
    were not observed; ahead are the time features of the target step, its S seasonal values, and which were
    not observed. A missing seasonal value counts as zero, the mean. Quantiles are those of a normal
    distribution as wide as the validation part's errors.
    """

    weight: Tensor
    """[F, H, P + A] of P past and A ahead features, the intercept first."""
    error: Tensor
    """[F, H] root mean squared error on the validation part."""
    alpha: Tensor
    """[F] the penalty chosen; 0 before the fit."""

    def __init__(self, config: RidgeConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.alphas, self.others = config.alphas, config.others
        metrics, horizon = len(geometry.metrics), geometry.horizon
        self.past = 1 + 2 * geometry.history * (1 + len(geometry.lags)) + 2 * config.others * (metrics - 1)
        self.past += len(geometry.marks)
        self.ahead = geometry.calendar + 2 * len(geometry.lags)
        self.register_buffer("weight", torch.zeros(metrics, horizon, self.past + self.ahead))
        self.register_buffer("error", torch.zeros(metrics, horizon))
        self.register_buffer("alpha", torch.zeros(metrics))

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q]."""
        with torch.autocast(batch.x.device.type, enabled=False):  # weights of many terms that cancel
            mean = self._mapped(self.weight, batch)
        normal = torch.special.ndtri(mean.new_tensor(self.geometry.quantiles))
        return torch.cat([mean[..., None], mean[..., None] + self.error.T[:, None, :, None] * normal], -1)

    def fit(self, train: Batches, validation: Batches) -> None:
        """One pass over the training batches for the normal equations, one over the validation batches for
        the errors of all penalties at once."""
        metrics, horizon, _ = self.weight.shape
        equations = _Equations.zeros(metrics, horizon, self.past, self.ahead)
        for batch in train():
            equations.add(self._past(batch), self._ahead(batch), batch)
        weights = equations.solve(self.alphas)
        squares, count = self._errors(weights.to(self.weight.dtype), validation)
        best = squares.sum(-1).argmin(0)
        metric = torch.arange(len(best))
        self.weight.copy_(weights[best, metric])
        self.error.copy_((squares[best, metric] / count.clamp(min=1)).sqrt())
        self.alpha.copy_(torch.tensor(self.alphas)[best])

    def _errors(self, weights: Tensor, batches: Batches) -> tuple[Tensor, Tensor]:
        """Of weights [K, F, H, P + A]: [K, F, H] summed squared errors, and [F, H] how many targets."""
        squares = torch.zeros(weights.shape[:3], dtype=torch.float64)
        count = torch.zeros(weights.shape[1:3], dtype=torch.float64)
        for batch in batches():
            count += batch.y_mask.sum((0, 2)).T.cpu()
            for candidate, weight in enumerate(weights.to(batch.x.device)):
                error = torch.where(batch.y_mask, self._mapped(weight, batch) - batch.y, 0).double()
                squares[candidate] += error.square().sum((0, 2)).T.cpu()
        return squares, count

    def _mapped(self, weight: Tensor, batch: Batch) -> Tensor:
        """[B, H, N, F] forecasts by weights [F, H, P + A]."""
        past, ahead = weight.split([self.past, self.ahead], -1)
        return torch.einsum("bnfp,fhp->bhnf", self._past(batch), past) + torch.einsum(
            "bhnfa,fha->bhnf", self._ahead(batch), ahead
        )

    def _past(self, batch: Batch) -> Tensor:
        """[B, N, F, P]; a step that was observed is no 1 but a 0, so what never fails gets no weight."""
        x, missing = batch.x.permute(0, 2, 3, 1), ~batch.mask.permute(0, 2, 3, 1)
        before, unknown = (
            part.permute(0, 2, 3, 1, 4).flatten(3)
            for part in (
                torch.where(batch.seasonal_x_mask, batch.seasonal_x, 0),
                ~batch.seasonal_x_mask,
            )
        )
        parts = [torch.ones_like(x[..., :1]), x, missing, before, unknown]
        if self.others:
            metrics = range(x.shape[2])
            other = torch.tensor([[g for g in metrics if g != f] for f in metrics], device=x.device)
            parts += [x[..., -1][..., other], missing[..., -1][..., other]]
        if marks := len(self.geometry.marks):  # a holiday's first hours differ from those that follow them
            parts.append(batch.time_x[:, -1, None, None, -marks:].expand(*x.shape[:3], -1))
        return torch.cat(parts, -1)

    def _ahead(self, batch: Batch) -> Tensor:
        """[B, H, N, F, A]."""
        time = batch.time_y[:, :, None, None].expand(*batch.seasonal.shape[:-1], -1)
        seasonal = torch.where(batch.seasonal_mask, batch.seasonal, 0)
        return torch.cat([time, seasonal, ~batch.seasonal_mask], -1)


@dataclass
class _Equations:
    """The normal equations of every metric and horizon step, over observed targets, as sums that add up.

    The past is the same at all steps, so its products are summed once and corrected by those of the windows
    whose target is missing: for long look-backs many times less work than every step by itself.
    """

    past: Tensor
    """[F, P, P] Σ p pᵀ of past features p, over all windows and entities."""
    unseen: Tensor
    """[F, H, P, P] the part of it without an observed target."""
    cross: Tensor
    """[F, H, P, A + 1] Σ p aᵀ of features ahead a, beside them the target."""
    ahead: Tensor
    """[F, H, A + 1, A + 1] Σ a aᵀ."""

    @classmethod
    def zeros(cls, metrics: int, horizon: int, past: int, ahead: int) -> _Equations:
        shapes = [
            (metrics, past, past),
            (metrics, horizon, past, past),
            (metrics, horizon, past, ahead + 1),
            (metrics, horizon, ahead + 1, ahead + 1),
        ]
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, past: Tensor, ahead: Tensor, batch: Batch) -> None:
        """Adds a batch: past [B, N, F, P], ahead [B, H, N, F, A]."""
        known = torch.cat([ahead, batch.y[..., None]], -1).transpose(1, 2)
        for metric in range(past.shape[2]):  # one by one: the features of all at once are many
            p = past[:, :, metric].flatten(0, 1).double().cpu()
            seen = batch.y_mask[..., metric].transpose(1, 2).flatten(0, 1).cpu()  # [B · N, H]
            a = known[..., metric, :].flatten(0, 1).double().cpu()
            a = torch.where(seen[..., None], a, 0)
            self.past[metric].addmm_(p.T, p)
            self.cross[metric] += (p.T @ a.flatten(1)).view(len(p.T), *a.shape[1:]).transpose(0, 1)
            self.ahead[metric] += a.permute(1, 2, 0) @ a.transpose(0, 1)
            for step in (~seen).any(0).nonzero().flatten().tolist():
                lost = p[~seen[:, step]]
                self.unseen[metric, step].addmm_(lost.T, lost)

    def solve(self, alphas: tuple[float, ...]) -> Tensor:
        """[K, F, H, P + A] the weights with each of K penalties; zero for a step without targets."""
        return torch.stack([self._solve(metric, alphas) for metric in range(len(self.past))], 1)

    def _solve(self, metric: int, alphas: tuple[float, ...]) -> Tensor:
        past = self.past[metric] - self.unseen[metric]
        cross, moment_past = self.cross[metric, ..., :-1], self.cross[metric, ..., -1]
        ahead, moment_ahead = self.ahead[metric, :, :-1, :-1], self.ahead[metric, :, :-1, -1]
        gram = torch.cat([torch.cat([past, cross], -1), torch.cat([cross.mT, ahead], -1)], -2)
        moment = torch.cat([moment_past, moment_ahead], -1)
        penalised = torch.ones_like(moment)
        penalised[:, 0] = past[:, 0, 0] == 0  # the intercept only where it has no equation
        return torch.stack(
            [torch.linalg.solve(gram + torch.diag_embed(alpha * penalised), moment) for alpha in alphas]
        )

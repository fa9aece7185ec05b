"""lightgbm: gradient-boosted trees, one global model for each metric and each of mean and quantiles.

LightGBM (Ke et al. 2017) on a table whose rows are (window, entity, horizon step): all steps share a model,
which sees the step as a feature. Of a long training part a uniform sample of rows is held, so memory is
bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, Literal

import lightgbm as lgb
import numpy as np
import torch
from numpy.typing import NDArray
from pandas.util import hash_array
from pydantic import Field, TypeAdapter
from torch import Tensor

from fleetcast.errors import InputError
from fleetcast.models.base import Batches, Fitted, ModelConfig
from fleetcast.models.geometry import Geometry
from fleetcast.windows.batch import Batch

#: Longest look-back of which each step is a feature; of longer ones as many.
_STEPS = 24
#: Share of `rows` that decides when to stop.
_VALIDATION = 0.25
#: Features that sum up a longer look-back: mean, least, largest, standard deviation.
_SUMMARIES = 4
#: Bytes of a SHA-256.
_DIGEST = 32
_TEXTS = TypeAdapter(list[list[str]])


class LightgbmConfig(ModelConfig):
    """Options of lightgbm."""

    fitted = True

    residual: Literal[False] = False
    """Never: there are no gradients to learn the blend with."""
    rows: Annotated[int, Field(ge=1)] = 200_000
    """Most rows to train on: a uniform sample of all (window, entity, horizon step)."""
    trees: Annotated[int, Field(ge=1)] = 150
    """Most trees of a model."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Trees without a better validation error before a model is complete."""
    num_leaves: Annotated[int, Field(ge=2)] = 31
    """Leaves of a tree."""
    min_data_in_leaf: Annotated[int, Field(ge=1)] = 50
    """Fewest rows of a leaf."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """How much of a tree is added."""
    max_bin: Annotated[int, Field(ge=2)] = 63
    """Bins of a feature's histogram."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    """CPUs of a fit and of a forecast."""

    def build(self, geometry: Geometry) -> Lightgbm:
        """A new module, not yet fitted."""
        return Lightgbm(self, geometry)


class Lightgbm(Fitted):
    """The module. A metric without observed targets in training is forecast as zero, the mean.

    Features of a row are the metric's look-back, its seasonal values at the target step, and by how much it
    is above those of the look-back (at its last step, and in the mean); the last values of all metrics, the
    target's time features, its horizon step, and which entity it is. What was not observed is missing to the
    trees, and so is an entity that was not in training. Of a look-back above 24 steps there are the last 12,
    at most 12 at even distances before those, and its mean, least, largest and standard deviation.
    """

    seed: Tensor
    """[] of the sample of rows, drawn from torch's generator."""

    def __init__(self, config: LightgbmConfig, geometry: Geometry) -> None:
        super().__init__(config, geometry)
        self.config = config
        of_history = len(_steps(geometry.history)) + _SUMMARIES * (geometry.history > _STEPS)
        shared = len(geometry.metrics) + geometry.calendar + 2
        self.features = of_history + 3 * len(geometry.lags) + shared
        self.register_buffer("seed", torch.randint(2**31, ()))
        self._read([[] for _ in geometry.metrics])

    # -- forecasts -------------------------------------------------------------------------------------------

    def raw(self, batch: Batch) -> Tensor:
        """[B, H, N, F, 1 + Q], the quantiles rising: sorted, as separate models may cross (Chernozhukov,
        Fernández-Val & Galichon 2010)."""
        shape = batch.seasonal.shape[:3]
        table = self._table(batch.to("cpu"), *torch.ones(shape).nonzero(as_tuple=True))
        outputs = np.zeros((*self.outputs, len(table)), np.float32)
        for metric, boosters in enumerate(self._boosters):
            features = self._features(table, metric)
            for output, booster in enumerate(boosters):
                outputs[metric, output] = booster.predict(features, num_threads=self.config.num_threads)
        outputs[:, 1:].sort(axis=1)
        return torch.from_numpy(outputs).permute(2, 0, 1).unflatten(0, shape).to(batch.x.device)

    def _table(self, batch: Batch, window: Tensor, step: Tensor, node: Tensor) -> NDArray[np.float32]:
        """[R, D] what is known of rows: each metric's own features, then those that all metrics share."""
        past = _look_back(batch)  # [B, N, F, P]
        seasonal = torch.where(batch.seasonal_mask, batch.seasonal, torch.nan)
        entity = torch.where(batch.nodes < 0, torch.nan, batch.nodes)
        own = torch.cat([past[window, node], seasonal[window, step, node], _above(batch)[window, node]], -1)
        last = torch.where(batch.mask[:, -1], batch.x[:, -1], torch.nan)[window, node]
        place = torch.stack([step, entity[node]], -1)
        table = torch.cat([own.flatten(1), last, batch.time_y[window, step], place], -1)
        return np.asarray(table.float().numpy())

    def _features(self, table: NDArray[np.float32], metric: int) -> NDArray[np.float32]:
        """[R, P] what a metric's models see of a table; the entity is the last column."""
        metrics = len(self.geometry.metrics)
        shared = metrics + self.geometry.calendar + 2
        own = table[:, :-shared].reshape(len(table), metrics, -1)[:, metric]
        return np.concatenate([own, table[:, -shared:]], 1)

    # -- the fit ---------------------------------------------------------------------------------------------

    def fit(self, train: Batches, validation: Batches) -> None:
        """Samples rows in one pass over each part, then trains the models one after the other."""
        rows = self._sample(train, self.config.rows)
        checks = self._sample(validation, max(1, int(_VALIDATION * self.config.rows)))
        metrics = range(len(self.geometry.metrics))
        self._read([self._boost(rows.of(metric), checks.of(metric), metric) for metric in metrics])

    def _sample(self, batches: Batches, most: int) -> _Rows:
        """At most `most` rows with an observed target: those whose hashes are lowest, by rising hash.

        That is a uniform sample which is the same for any order and size of the batches.
        """
        held: list[_Rows] = []
        bound = np.iinfo(np.uint64).max
        for batch in batches():
            batch = batch.to("cpu")
            key = _hashes(batch, int(self.seed))
            seen = batch.y_mask.any(-1).numpy()
            below = key[seen & (key < bound)]
            if len(below) > most:
                bound = np.partition(below, most)[most]
            chosen = seen & (key < bound)
            at = torch.from_numpy(chosen).nonzero(as_tuple=True)
            y = torch.where(batch.y_mask, batch.y, torch.nan)[at]
            held.append(_Rows(key[chosen], self._table(batch, *at), y.numpy()))
            if sum(len(rows.key) for rows in held) > 2 * most:
                held = [_Rows.lowest(held, most)]
                bound = held[0].key[-1]
        return _Rows.lowest(held, most)

    def _boost(self, rows: _Rows, checks: _Rows, metric: int) -> list[str]:
        """The texts of a metric's models: of its mean, then of its quantiles; none without rows."""
        if not len(rows.key):
            return []
        data = self._dataset(rows, metric)
        stop: dict[str, Any] = {}
        if len(checks.key):
            early = lgb.early_stopping(self.config.patience, verbose=False)
            stop = {"valid_sets": [self._dataset(checks, metric, data)], "callbacks": [early]}
        objectives: list[dict[str, Any]] = [{"objective": "regression_l2"}]
        objectives += [{"objective": "quantile", "alpha": level} for level in self.geometry.quantiles]
        return [
            lgb.train(self._options() | objective, data, self.config.trees, **stop).model_to_string()
            for objective in objectives
        ]

    def _dataset(self, rows: _Rows, metric: int, reference: lgb.Dataset | None = None) -> lgb.Dataset:
        features = self._features(rows.table, metric)
        entity = features.shape[1] - 1
        return lgb.Dataset(features, rows.y, reference, categorical_feature=[entity], params=self._options())

    def _options(self) -> dict[str, Any]:
        names = {"num_leaves", "min_data_in_leaf", "learning_rate", "max_bin", "num_threads"}
        fixed = {"deterministic": True, "force_col_wise": True, "seed": 0, "verbosity": -1}
        return self.config.model_dump(include=names) | fixed

    # -- in the store ----------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """uint8 in `state_dict` beside the buffers: a SHA-256, then the models' texts as JSON, [F][1 + Q]."""
        texts = _TEXTS.dump_json(self._texts)
        return torch.frombuffer(bytearray(sha256(texts).digest() + texts), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Reads what `get_extra_state` gave. Raises InputError if it is damaged or another geometry's.

        LightGBM trusts a text that it reads, and a damaged one may end the process: hence the SHA-256. It is
        no shield against one who means harm, so load models only from a store that you trust.
        """
        content = state.cpu().numpy().tobytes()
        digest, texts = content[:_DIGEST], content[_DIGEST:]
        if sha256(texts).digest() != digest:
            raise InputError("the text of the trees is damaged: its SHA-256 is not the one written with it")
        try:
            self._read(_TEXTS.validate_json(texts))
        except (ValueError, lgb.basic.LightGBMError) as error:
            raise InputError(f"not the text of this model's trees: {error}") from error

    def _read(self, texts: list[list[str]]) -> None:
        metrics, outputs = self.outputs
        if len(texts) != metrics or any(len(of_metric) not in (0, outputs) for of_metric in texts):
            raise ValueError(f"expected for each of {metrics} metrics none or {outputs} models")
        boosters = [[lgb.Booster(model_str=text) for text in of_metric] for of_metric in texts]
        if any(booster.num_feature() != self.features for of_metric in boosters for booster in of_metric):
            raise ValueError(f"expected trees of {self.features} features")
        self._texts, self._boosters = texts, boosters


@dataclass
class _Rows:
    """Rows of the training table."""

    key: NDArray[np.uint64]
    """[R]."""
    table: NDArray[np.float32]
    """[R, D]."""
    y: NDArray[np.float32]
    """[R, F], NaN where not observed; [R] of one metric."""

    @classmethod
    def lowest(cls, parts: list[_Rows], most: int) -> _Rows:
        """At most `most` of all rows, those with the lowest keys, by rising key."""
        key = np.concatenate([part.key for part in parts])
        first = np.argsort(key)[:most]
        table = np.concatenate([part.table for part in parts])[first]
        return cls(key[first], table, np.concatenate([part.y for part in parts])[first])

    def of(self, metric: int) -> _Rows:
        """The rows where a metric's target is observed."""
        seen = np.isfinite(self.y[:, metric])
        return _Rows(self.key[seen], self.table[seen], self.y[seen, metric])


def _steps(history: int) -> list[int]:
    """The steps of a look-back that are features by themselves."""
    if history <= _STEPS:
        return list(range(history))
    recent = _STEPS // 2
    before = history - recent
    every = -(-before // recent)
    return [*range(before % every, before, every), *range(before, history)]


def _look_back(batch: Batch) -> Tensor:
    """[B, N, F, P] features of each metric's look-back, NaN where nothing was observed."""
    x = torch.where(batch.mask, batch.x, torch.nan).permute(0, 2, 3, 1)
    history = x.shape[-1]
    if history <= _STEPS:
        return x
    mean = x.nanmean(-1, keepdim=True)
    inside = torch.where(x.isnan(), mean, x)
    low, high = inside.amin(-1, keepdim=True), inside.amax(-1, keepdim=True)
    spread = (x - mean).square().nanmean(-1, keepdim=True).sqrt()
    return torch.cat([x[..., _steps(history)], mean, low, high, spread], -1)


def _above(batch: Batch) -> Tensor:
    """[B, N, F, 2 · S] by how much the look-back is above each season's: its last step, and its mean; NaN
    where one of both was not observed."""
    both = batch.mask[..., None] & batch.seasonal_x_mask
    above = torch.where(both, batch.x[..., None] - batch.seasonal_x, torch.nan)
    return torch.cat([above[:, -1], above.nanmean(1)], -1)


def _hashes(batch: Batch, seed: int) -> NDArray[np.uint64]:
    """[B, H, N] a random number of each row's place in the dataset."""
    key = np.full((), seed, np.uint64)
    for part in (batch.origins.numpy(), np.arange(batch.y.shape[1]), batch.nodes.numpy()):
        key = key[..., None] + part.astype(np.uint64)
        key = hash_array(key.ravel()).reshape(key.shape)
    return key

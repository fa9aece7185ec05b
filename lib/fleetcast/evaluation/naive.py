"""The naive rungs of the ladder: what every model must beat, at the same look-back, split and mask.

Their intervals come from the residuals of the validation part, as a model's do (`intervals`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fleetcast.windows.batch import Batch

#: A batch to its forecast [B, H, N, F] in scaled units.
Forecaster = Callable[[Batch], Tensor]

LAST_VALUE = "last value"
YESTERDAY = "same time yesterday"
LAST_WEEK = "same time last week"


def last_value(batch: Batch) -> Tensor:
    """[B, H, N, F] the last observed value of the look-back, held.

    Where the look-back holds none it is 0, which in scaled units is the mean of the training part.
    """
    steps = torch.arange(batch.x.shape[1], device=batch.x.device)[:, None, None]
    last = torch.where(batch.mask, steps, 0).amax(dim=1, keepdim=True)
    value = torch.where(batch.mask, batch.x, 0.0).gather(1, last)
    return value.expand(-1, batch.time_y.shape[1], -1, -1)


def seasonal(batch: Batch, lag_index: int) -> Tensor:
    """[B, H, N, F] the value one seasonal lag earlier; the last value where that was not observed."""
    known = batch.seasonal_mask[..., lag_index]
    return torch.where(known, batch.seasonal[..., lag_index], last_value(batch))


def naive_rungs(lags: Sequence[int], step: int) -> dict[str, Forecaster]:
    """Name → forecast of every naive rung, for seasonal `lags` in steps of `step` seconds."""
    rungs: dict[str, Forecaster] = {LAST_VALUE: last_value}
    for index, lag in enumerate(lags):
        rungs[lag_name(lag * step)] = partial(seasonal, lag_index=index)
    return rungs


def lag_name(seconds: int) -> str:
    """`86400` → `same time yesterday`."""
    names = {86_400: YESTERDAY, 604_800: LAST_WEEK}
    return names.get(seconds, f"same time {duration(seconds)} ago")


def duration(seconds: int) -> str:
    """`5400` → `90 min`: whole numbers of the largest unit that divides it."""
    for name, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return "1 day" if seconds == 86_400 else f"{seconds // size} {name}"
    return f"{seconds} s"

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
DAILY_MAXIMUM = "daily maximum"
WEEKLY_MAXIMUM = "weekly maximum"

_DAY, _WEEK = 86_400, 604_800


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


def maximum(batch: Batch, lag_index: int) -> Tensor:
    """[B, H, N, F] the highest value of the horizon's span one seasonal lag earlier, held; the last value
    where none was observed there.

    With the lag of a week it is what production autoscalers scale by.
    """
    known = batch.seasonal_mask[..., lag_index]
    highest = torch.where(known, batch.seasonal[..., lag_index], -torch.inf).amax(1, keepdim=True)
    return torch.where(known.any(1, keepdim=True), highest, last_value(batch))


def naive_rungs(lags: Sequence[int], step: int) -> dict[str, Forecaster]:
    """Name → forecast of every naive rung, for seasonal `lags` in steps of `step` seconds.

    The maximum is that of a week before, or of the longest lag if there is no week.
    """
    rungs: dict[str, Forecaster] = {LAST_VALUE: last_value}
    for index, lag in enumerate(lags):
        rungs[lag_name(lag * step)] = partial(seasonal, lag_index=index)
    if lags:
        seconds = [lag * step for lag in lags]
        lag = _WEEK if _WEEK in seconds else max(seconds)
        rungs[maximum_name(lag)] = partial(maximum, lag_index=seconds.index(lag))
    return rungs


def lag_name(seconds: int) -> str:
    """`86400` → `same time yesterday`."""
    names = {_DAY: YESTERDAY, _WEEK: LAST_WEEK}
    return names.get(seconds, f"same time {duration(seconds)} ago")


def maximum_name(seconds: int) -> str:
    """`604800` → `weekly maximum`."""
    names = {_DAY: DAILY_MAXIMUM, _WEEK: WEEKLY_MAXIMUM}
    return names.get(seconds, f"maximum {duration(seconds)} ago")


def skill_rung(rungs: Sequence[str]) -> str | None:
    """What skill is measured against: same time last week if there, else yesterday, else last value."""
    return next((name for name in (LAST_WEEK, YESTERDAY, LAST_VALUE) if name in rungs), None)


def duration(seconds: int) -> str:
    """`5400` → `90 min`: whole numbers of the largest unit that divides it."""
    for name, size in (("days", _DAY), ("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return "1 day" if seconds == _DAY else f"{seconds // size} {name}"
    return f"{seconds} s"

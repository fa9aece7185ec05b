"""Time features: what the clock says of a step, known for the future as well."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DAY, _WEEK = 86_400, 604_800
#: The first of January 1970 was a Thursday; weeks begin on Monday.
_MONDAY = 4 * _DAY
#: Cycles per period: two harmonics of the day, one of the week.
_CYCLES = ((_DAY, 1), (_DAY, 2), (_WEEK, 1))

#: C, the number of features.
FEATURES = 2 * len(_CYCLES)


def time_features(start: int, step: int, first: int, last: int) -> Tensor:
    """[last − first, C] sine and cosine of the day and the week at steps `first` to `last`.

    `start` is the Unix time of step 0 and `step` the width of a step [s]. Angles are taken of whole seconds
    within the period, so no precision is lost to large times.
    """
    seconds = start + step * np.arange(first, last, dtype=np.int64) - _MONDAY
    angles = [2 * np.pi * cycles * (seconds % period) / period for period, cycles in _CYCLES]
    features = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.from_numpy(np.stack(features, axis=1).astype(np.float32))

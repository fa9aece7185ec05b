"""Time features: sine and cosine of the day, of half the day, of the week."""

from datetime import UTC, datetime

import pytest
import torch
from fleetcast.windows.calendar import FEATURES, time_features

HALF = 0.5**0.5


def at(*when: int) -> list[float]:
    return time_features(int(datetime(*when, tzinfo=UTC).timestamp()), 300, 0, 1)[0].tolist()


@pytest.mark.parametrize("year, month, day", [(1970, 1, 5), (2018, 1, 1), (2024, 2, 26)])
def test_the_week_begins_on_monday_at_midnight(year, month, day):
    assert at(year, month, day) == pytest.approx([0, 1, 0, 1, 0, 1])
    assert at(year, month, day, 6)[:4] == pytest.approx([1, 0, 0, -1], abs=1e-6)
    assert at(year, month, day, 21)[:4] == pytest.approx([-HALF, HALF, -1, 0], abs=1e-6)


def test_half_a_week_is_thursday_noon():
    assert at(2018, 1, 4, 12) == pytest.approx([0, -1, 0, 1, 0, -1], abs=1e-6)


def test_features_of_the_future_are_those_computed_once_it_has_come():
    start, step = 1_514_765_700, 900
    early = time_features(start, step, 0, 2000)
    assert early.shape == (2000, FEATURES)
    assert early.dtype == torch.float32
    assert torch.equal(early[1300:1400], time_features(start, step, 1300, 1400))
    assert torch.equal(early[1300:1400], time_features(start + 1300 * step, step, 0, 100))


def test_large_times_are_as_exact_as_small_ones():
    weeks = 604_800 * 5_000
    assert torch.equal(time_features(weeks, 1, 0, 100), time_features(0, 1, 0, 100))

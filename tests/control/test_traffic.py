"""Traffic has the shapes of the experiments, the given level, and repeats by its seed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
import torch
from fleetcast.control.cluster import Cluster, ClusterOptions, generate
from fleetcast.control.traffic import Pattern, TrafficOptions, constant, replay
from fleetcast.control.traffic import generate as make
from fleetcast.errors import InputError
from numpy.typing import NDArray

_CLUSTER: Cluster = generate(ClusterOptions(services=6, rate=200))


def _total(pattern: Pattern, **options: Any) -> NDArray[np.float32]:
    given = TrafficOptions(patterns=(pattern,), **({"arrivals": "poisson"} | options))
    return make(given, _CLUSTER).rates[0].sum(1).numpy()


@pytest.mark.parametrize("pattern", get_args(Pattern))
def test_three_days_of_the_given_level(pattern: Pattern) -> None:
    total = _total(pattern, level=1.5)
    assert len(total) == 72 * 720
    assert total.mean() == pytest.approx(300, rel=1e-3)
    assert total.min() > 0


def test_a_wave_has_its_period_and_amplitude() -> None:
    total = _total("sine", amplitude=0.5, period=24)
    assert total.max() / total.mean() == pytest.approx(1.5, rel=1e-2)
    np.testing.assert_allclose(total[: 24 * 720], total[24 * 720 : 48 * 720], rtol=1e-3)


def test_bursts_are_bumps_of_minutes() -> None:
    total = _total("bursts", amplitude=0)
    above = total > 1.3 * np.median(total)
    starts = int((np.diff(above.astype(int)) == 1).sum())
    assert 20 <= starts <= 50
    assert 2 <= above.sum() * 5 / 60 / starts <= 40
    assert np.abs(np.diff(total)).max() < 0.1 * total.mean()  # they come smoothly


def test_peaks_come_at_once() -> None:
    total = _total("peaks", amplitude=0)
    assert np.abs(np.diff(total)).max() > 0.3 * total.mean()


def test_a_flash_crowd_comes_within_two_minutes_and_leaves_over_an_hour() -> None:
    total = _total("flash_crowd", amplitude=0, hours=24)
    top = int(total.argmax())
    base = float(np.median(total[: top - 30])) if top > 60 else float(np.median(total))
    assert total[top] > 2 * base
    assert total[top - 24] < 1.2 * base
    assert total[min(top + 360, len(total) - 1)] > 1.2 * base


def test_regimes_change_the_level_for_good() -> None:
    total = _total("regimes", amplitude=0, seed=1)
    assert len(np.unique(total.round(1))) >= 3


def test_arrivals_in_spells_are_over_dispersed_with_the_same_mean() -> None:
    for arrivals in ("mmpp", "negative_binomial"):
        total = _total("sine", amplitude=0, arrivals=arrivals, dispersion=0.04)
        assert total.mean() == pytest.approx(200, rel=0.02)
        assert total.std() / total.mean() > 0.15


def test_spells_last_for_minutes() -> None:
    total = _total("sine", amplitude=0, arrivals="mmpp")
    busy = total > 200
    lasts = busy.sum() * 5 / int((np.diff(busy.astype(int)) == 1).sum())
    assert lasts == pytest.approx(20, rel=0.25)


def test_what_classes_ask_for_drifts_around_their_shares() -> None:
    rates = make(TrafficOptions(arrivals="poisson"), _CLUSTER).rates[0]
    shares = (rates / rates.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(shares.mean(0), _CLUSTER.share, atol=0.03)
    assert (shares.std(0) > 0.005).all()


def test_environments_take_patterns_in_turn_and_repeat_by_their_seed() -> None:
    options = TrafficOptions(hours=1, seed=3)
    together = make(options, _CLUSTER, 4).rates
    alone = make(options.model_copy(update={"seed": 5}), _CLUSTER).rates
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(together[0], together[3])  # the same pattern


def test_rates_hold_for_a_step_and_the_last_one_on() -> None:
    rates = constant(7, seconds=20, step=5)
    assert rates.rates.shape == (1, 4, 1)
    rates.rates[0, :, 0] = torch.arange(4)
    assert [float(rates.at(time)) for time in (0, 4.9, 5, 19, 20, 99)] == [0, 0, 1, 3, 3, 3]
    assert rates.ahead(5, 10, 3)[0, :, 0].tolist() == [1.5, 3, 3]


def _series(values: list[float | None]) -> pl.DataFrame:
    start = datetime(2024, 1, 1, tzinfo=UTC)
    times = [start + timedelta(minutes=5 * number) for number in range(len(values))]
    return pl.DataFrame({"time": times, "request_rate": values})


def test_a_series_of_telemetry_is_replayed_over_its_gaps() -> None:
    options = TrafficOptions(hours=0.25, arrivals="poisson")
    total = replay(_series([10, None, 30, 20]), options, _CLUSTER).rates[0].sum(1)
    assert float(total.mean()) == pytest.approx(200, rel=1e-3)
    assert float(total[60] / total[0]) == pytest.approx(2, rel=0.01)  # straight through what is missing
    assert float(total[120] / total[0]) == pytest.approx(3, rel=0.01)


def test_nothing_to_replay_is_refused() -> None:
    with pytest.raises(InputError, match="1 bins of request_rate, expected at least 2"):
        replay(_series([10, None]), TrafficOptions(), _CLUSTER)

"""Time features: sine and cosine of the day, of half the day, of the week; holidays and events."""

from datetime import UTC, datetime

import pytest
import torch
from fleetcast.errors import InputError
from fleetcast.windows.calendar import FEATURES, Calendar, CalendarOptions, time_features
from pydantic import ValidationError

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


# -- local time, holidays, events --------------------------------------------------------------------------


def seconds(*when: int) -> int:
    return int(datetime(*when, tzinfo=UTC).timestamp())


def test_days_are_counted_in_local_time_on_both_sides_of_a_change_of_clocks():
    berlin = Calendar(timezone="Europe/Berlin")
    for noon in (seconds(2018, 3, 24, 11), seconds(2018, 3, 26, 10)):  # an hour ahead of UTC, then two
        found = time_features(noon, 300, 0, 1, berlin)[0]
        assert found[:2].tolist() == pytest.approx([0, -1], abs=1e-6)
    assert torch.equal(time_features(0, 300, 0, 999, Calendar(timezone="UTC")), time_features(0, 300, 0, 999))


def test_a_holiday_is_its_local_day_in_shares_of_steps():
    options = CalendarOptions(timezone="Europe/Berlin", holidays=("DE",))
    start = seconds(2018, 9, 24)
    calendar = options.resolve(start, start + 14 * 86_400)
    assert calendar.names == ("holiday DE",)
    assert calendar.within(start, start + 14 * 86_400) == [
        ("holiday DE", seconds(2018, 10, 2, 22), seconds(2018, 10, 3, 22))
    ]
    found = time_features(start, 3 * 3600, 0, 14 * 8, calendar)
    assert found.shape == (14 * 8, calendar.features) == (112, FEATURES + 1)
    on = found[:, -1].nonzero().flatten().tolist()
    first = 8 * 8 + 7  # the step from 21:00 UTC, of which two of three hours are the holiday's
    assert on == list(range(first, first + 9))
    assert found[first, -1] == pytest.approx(2 / 3)
    assert found[first + 8, -1] == pytest.approx(1 / 3)


def test_parts_of_a_country_have_their_own_holidays():
    def days(code: str) -> int:
        year = (seconds(2018, 1, 1), seconds(2019, 1, 1))
        return len(CalendarOptions(holidays=(code,)).resolve(*year).within(*year))

    assert days("DE-BY") > days("DE")


def test_events_of_one_name_are_one_feature_and_a_file_may_list_them(tmp_path):
    file = tmp_path / "events.csv"
    file.write_text("name,start,end\nsale,2018-01-20,\nmatch,2018-01-09T18:00,2018-01-09T20:00+00:00\n")
    sale = {"name": "sale", "start": "2018-01-05T06:00:00", "end": "2018-01-06T00:00:00"}
    options = CalendarOptions.model_validate(
        {"timezone": "Asia/Tokyo", "events": [sale], "events_file": str(file)}
    )
    calendar = options.resolve(seconds(2018, 1, 1), seconds(2018, 2, 1))
    assert {mark.name: mark.spans for mark in calendar.marks} == {
        "sale": (
            (seconds(2018, 1, 4, 21), seconds(2018, 1, 5, 15)),
            (seconds(2018, 1, 19, 15), seconds(2018, 1, 20, 15)),
        ),
        "match": ((seconds(2018, 1, 9, 9), seconds(2018, 1, 9, 20)),),
    }


def test_the_year_after_the_telemetry_is_known_too():
    end = seconds(2018, 3, 1)
    calendar = CalendarOptions(holidays=("US",)).resolve(seconds(2018, 1, 1), end)
    assert calendar.within(seconds(2018, 7, 4), seconds(2018, 7, 5)) != []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"timezone": "Mars/Olympus"},
            "unknown time zone 'Mars/Olympus', expected one such as Europe/Berlin",
        ),
        ({"holidays": ["XY"]}, "unknown country 'XY', expected a code of two letters"),
        ({"holidays": ["DE-XY"]}, "unknown part 'XY' of DE, expected one of BB, "),
        ({"holidays": ["DE", "DE"]}, "expected each country once"),
        (
            {"events": [{"name": "sale", "start": "2018-01-02", "end": "2018-01-01"}]},
            "event sale: end .* must be after start",
        ),
    ],
)
def test_what_cannot_be_is_named(given, message):
    with pytest.raises(ValidationError, match=message):
        CalendarOptions.model_validate(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,start,end\nsale,soon,\n", "start .*got 'soon'"),
        ("what,when\nsale,2018-01-01\n", "expected rows of name, start and end, but name"),
        ("name,start,end\nsale,2018-01-02,2018-01-01\n", "must be after start"),
    ],
)
def test_a_file_of_events_that_cannot_be_read_is_named(tmp_path, text, message):
    file = tmp_path / "events.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=f"--events-file {file}: .*{message}"):
        CalendarOptions(events_file=str(file)).resolve(0, 1)
    with pytest.raises(InputError, match="cannot be read"):
        CalendarOptions(events_file=str(tmp_path / "none.csv")).resolve(0, 1)

"""One plot style: labelled with units, dated in UTC, intervals behind the forecast, embedded whole."""

import base64
from datetime import UTC, datetime

import numpy as np
from fleetcast import plots
from matplotlib.dates import date2num

TIME = np.arange("2018-01-08T00", "2018-01-10T00", dtype="datetime64[h]")
LOAD = np.sin(np.arange(48) / 4)


def test_a_forecast_has_its_unit_its_intervals_and_its_gaps():
    figure, (axes,) = plots.subplots("CPU time, fraction of capacity")
    plots.line(axes, TIME[:24], np.where(np.arange(24) == 5, np.nan, LOAD[:24]), "observed", plots.OBSERVED)
    wide, narrow = (LOAD[24:] - 2, LOAD[24:] + 2), (LOAD[24:] - 1, LOAD[24:] + 1)
    plots.fan(axes, TIME[24:], LOAD[24:], {"90 %": wide, "50 %": narrow})
    plots.legend(figure, axes)
    figure.draw_without_rendering()
    assert axes.get_title() == "" and axes.get_title(loc="left") == "CPU time, fraction of capacity"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "observed",
        "forecast",
        "90 %",
        "50 %",
    ]
    assert np.isnan(axes.lines[0].get_ydata()).sum() == 1
    tallest, smaller = (band.get_paths()[0].get_extents().height for band in axes.collections)
    assert tallest > smaller
    assert "2018-Jan" in axes.xaxis.get_offset_text().get_text()


def test_holidays_are_shaded_within_what_is_drawn_and_named_once():
    figure, (axes,) = plots.subplots("load")
    plots.line(axes, TIME, LOAD, "observed", plots.OBSERVED)
    seen = axes.get_xlim()

    def day(number: int) -> datetime:
        return datetime(2018, 1, number, tzinfo=UTC)

    spans = [("holiday", day(8), day(9)), ("holiday", day(9), day(20)), ("sale", day(1), day(2))]
    plots.shade(axes, spans)
    plots.legend(figure, axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["observed", "holiday"]
    assert axes.get_xlim() == seen
    assert [round(patch.get_width(), 1) for patch in axes.patches] == [
        1.0,
        round(seen[1] - date2num(day(9)), 1),
    ]


def test_the_size_of_an_image_does_not_grow_with_the_points():
    def size(points):
        figure, (axes,) = plots.subplots("load")
        axes.plot(np.linspace(0, 1, points), np.sin(np.linspace(0, 20, points)))
        return len(plots.png(figure))

    assert size(100_000) < 2 * size(200)


def test_an_image_is_a_png():
    figure, _ = plots.subplots("load")
    head, data = plots.data_uri(plots.png(figure)).split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")

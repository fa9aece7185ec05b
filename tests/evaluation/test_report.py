"""The nightly report is one page that stands alone and says plainly whether the model beat the naive."""

import dataclasses
import html.parser
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation.metrics import Scores
from fleetcast.evaluation.naive import skill_rung
from fleetcast.evaluation.page import number, percent
from fleetcast.evaluation.report import (
    COLUMNS,
    NightlyReport,
    ladder_table,
    render,
    text_table,
    verdict,
)
from fleetcast.schemas import QUANTILES
from fleetcast.windows.graph import LastGraph

ISSUED = datetime(2018, 1, 9, 0, 0, tzinfo=UTC)
Z = np.array([-1.645, -1.282, -0.674, 0, 0.674, 1.282, 1.645, 2.326])


def scores(spread, horizon=24, metrics=2, seed=0):
    """A forecast whose error grows with the lead time, its quantiles right on average."""
    rng = np.random.default_rng(seed)
    y = 0.4 + 0.15 * rng.normal(size=(40, horizon, 6, metrics))
    spread = spread * np.linspace(0.6, 1.2, horizon)[:, None, None]
    mean = y - spread * np.random.default_rng(7).normal(size=y.shape)
    quantiles = mean[..., None] + spread[..., None] * Z
    return Scores.of(y, rng.random(y.shape) > 0.05, mean, quantiles, QUANTILES, [0.02] * metrics, scale=0.15)


def loads(entity, start, steps, step, seed):
    """Observed load with a daily cycle, every metric, one gap."""
    rng = np.random.default_rng(seed)
    times = [start + timedelta(seconds=step * i) for i in range(steps)]
    day = np.sin(2 * np.pi * np.arange(steps) * step / 86_400 - 2)
    value = 0.35 + 0.05 * seed + 0.15 * day + 0.02 * rng.normal(size=steps)
    frame = pl.DataFrame({"time": times, "value": value}, schema_overrides={"time": pl.Datetime("ms", "UTC")})
    gap = pl.int_range(pl.len()).is_between(steps // 3, steps // 3 + steps // 20)
    return frame.select(pl.lit(entity).alias("entity"), "time", pl.when(~gap).then("value").alias("value"))


def forecasts(entity, start, steps, step, seed):
    """A forecast of `loads` without noise or gap, its intervals widening."""
    frame = loads(entity, start, steps, step, seed).with_columns(mean=pl.col("value").interpolate())
    spread = 0.02 + 0.06 * pl.int_range(pl.len()) / steps
    bands = {"q05": -1.645, "q25": -0.674, "q75": 0.674, "q95": 1.645}
    return frame.drop("value").with_columns(
        **{name: pl.col("mean") + z * spread for name, z in bands.items()}
    )


def report(horizon=24, step=3600, metrics=("cpu", "memory"), entities=16):
    names = [f"m_{1930 + i}" for i in range(entities)]
    start = ISSUED - timedelta(seconds=3 * horizon * step)
    history = [loads(n, start, 3 * horizon, step, i % 7) for i, n in enumerate(names)]
    forecast = [forecasts(n, ISSUED, horizon, step, i % 7) for i, n in enumerate(names)]

    def per_metric(frames):
        return pl.concat(frame.with_columns(metric=pl.lit(metric)) for frame in frames for metric in metrics)

    history, forecast = per_metric(history), per_metric(forecast)
    f = len(metrics)
    return NightlyReport(
        issued=ISSUED,
        store="s3://capacity/fleet-a",
        model="stgnn",
        entities=entities,
        horizon=horizon,
        step=step,
        marks=[],
        metrics=metrics,
        normalised=(),
        ladder=[
            ("last value", scores(0.09, horizon, f)),
            ("same time yesterday", scores(0.06, horizon, f)),
            ("same time last week", scores(0.07, horizon, f)),
            ("stgnn", scores(0.045, horizon, f)),
        ],
        mase_scale=np.full(f, 0.05),
        summary=[
            ("Rows read", 12_345_678),
            ("Rows rejected", 1_203),
            ("Entities", entities),
            ("Test windows", 40),
            ("Trained for", "14 epochs"),
            ("Windows per second", 1234.56),
        ],
        stages=pl.DataFrame(
            {
                "stage": ["ingest", "shard", "train", "forecast"],
                "status": ["skipped", "done", "done", "done"],
                "seconds": [0.0, 12.345, 184.2, 9.81],
                "peak_mb": [None, 512.3, 1480.7, 734.0],
                "note": ["nothing new", "4,608 windows", "14 epochs, best 9", "23,040 rows"],
            }
        ),
        rejected=pl.DataFrame(
            {"table": ["machine_usage"], "reason": ["cpu <101> is out of range"], "rows": [1203]}
        ),
        fallbacks=pl.DataFrame({"reason": ["too little history"], "entities": [2]}),
        total_history=history.group_by("metric", "time").agg(pl.col("value").mean() * entities),
        total_forecast=forecast.group_by("metric", "time").agg(
            pl.col("mean", "q05", "q25", "q75", "q95").sum()
        ),
        peaks=forecast.sort("mean").group_by("entity", "metric").last(),
        entity_history=history,
        entity_forecast=forecast,
        graph=LastGraph(
            time=1_515_448_800,
            slice=3600,
            kinds=("batch",),
            entities=2,
            total=1,
            edges=pl.DataFrame({"source": [names[0]], "target": [names[1]], "weight": [1.0]}),
            metric="cpu",
            normalised=(),
            load={names[0]: 0.4, names[1]: 0.5},
        ),
    )


class Page(html.parser.HTMLParser):
    """What the tests ask of a page: its words, its images, that every tag is closed."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.images, self.tags = [], [], [], []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def full():
    return render(report())


def test_the_page_needs_nothing_but_itself(full):
    page = Page(full)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http://" not in full and "https://" not in full and "url(" not in full
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in page.images)
    # 2 totals, 6 entities, 2 errors by lead time, 1 calibration, 1 graph.
    assert len(page.images) == 12
    assert len(full) < 3_000_000


def test_the_page_shows_what_was_given(full):
    text = Page(full).text
    for words in (
        "Load forecast of 2018-01-09 00:00 UTC",
        "16 entities, 1 day ahead in steps of 1 h, by stgnn",
        "s3://capacity/fleet-a",
        "Rows read 12,345,678",
        "Windows per second 1,235",
        "ingest skipped 0 – nothing new",
        "shard done 12.3 512 4,608 windows",
        "machine_usage cpu <101> is out of range 1,203",
        "too little history 2",
        "CPU time, fraction of capacity",
        "Who depends on whom Dependencies (batch) of the 1 h from 2018-01-08 22:00 UTC",
        "From To Weight m_1930 m_1931 1.00",
        "All times are UTC",
    ):
        assert words in text, words


def test_names_from_the_trace_cannot_write_html(full):
    assert "cpu <101>" not in full and "cpu &lt;101&gt;" in full


def test_the_highest_expected_peak_comes_first():
    given = report()
    top = given.peaks.filter(metric="cpu").sort("mean", "entity", descending=[True, False])
    first = re.search(r'<tbody>\s*<tr><td class="entity" title="\w+">(\w+)</td>', render(given))
    assert first and first[1] == top["entity"][0]


def test_empty_tables_are_sentences():
    given = report()
    empty = {name: getattr(given, name).clear() for name in COLUMNS}
    text = Page(render(dataclasses.replace(given, **empty, ladder=[], graph=None))).text
    for sentence in (
        "No rows were rejected.",
        "Every entity was forecast by stgnn.",
        "No total was forecast.",
        "No peaks were forecast.",
        "No forecast was scored.",
        "No stage was recorded.",
        "There are no dependencies at the end of the telemetry",
        "There are no test errors to compare stgnn with a naive forecast.",
    ):
        assert sentence in text


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="stages has no column peak_mb"):
        render(
            dataclasses.replace(
                report(), stages=pl.DataFrame({"stage": [], "status": [], "seconds": [], "note": []})
            )
        )


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (0.03, "better than the best naive forecast, same time yesterday, by 50.0 % ("),
        (
            0.0599,
            "no better than the best naive forecast, same time yesterday: they differ by less than 1.0 % (",
        ),
        (
            0.09,
            "no better than the best naive forecast, same time yesterday: its error is 0.428 against",
        ),
    ],
)
def test_the_verdict_is_in_words(spread, words):
    rungs = [("last value", scores(0.1)), ("same time yesterday", scores(0.06)), ("stgnn", scores(spread))]
    table = ladder_table(rungs, ("cpu", "memory"), np.ones(2))
    assert verdict(table, "stgnn").startswith(f"stgnn is {words}")


def test_the_ladder_has_a_row_per_metric_and_rung():
    given = report()
    table = ladder_table(given.ladder, given.metrics, given.mase_scale)
    assert table["metric"].to_list() == ["cpu"] * 4 + ["memory"] * 4
    row = table.row(by_predicate=(pl.col("metric") == "cpu") & (pl.col("rung") == "stgnn"), named=True)
    assert row["scaled_mae"] == pytest.approx(row["mae"] / 0.15)
    assert row["mase"] == pytest.approx(row["mae"] / 0.05)
    assert row["skill"] == pytest.approx(1 - 0.045 / 0.07)
    assert row["coverage_90"] == pytest.approx(0.9, abs=0.03)
    of_base = table.filter(rung="same time last week")["skill"]
    assert of_base.to_list() == [0, 0]


def test_skill_is_against_last_week_else_yesterday_else_last_value():
    rungs = ["last value", "same time yesterday", "same time last week", "stgnn"]
    assert [skill_rung(rungs[:n]) for n in (0, 1, 2, 3)] == [None, *rungs[:3]]


def test_rungs_that_counted_other_targets_are_refused():
    with pytest.raises(InputError, match="stgnn and last value did not count the same targets"):
        ladder_table(
            [("last value", scores(0.1)), ("stgnn", scores(0.1, seed=3))],
            ("cpu", "memory"),
            np.ones(2),
        )


def test_figures_have_three_digits_and_separators():
    shown = {
        0.123456: "0.123",
        12.345: "12.3",
        0.043: "0.0430",
        999.7: "1,000",
        1234.5: "1,234",
        1_000_000: "1,000,000",
        0.0: "0",
        5e-7: "5.00e-07",
    }
    assert {value: number(value) for value in shown} == shown
    assert number(None) == number(float("nan")) == percent(None) == "–"
    assert percent(0.1234) == "12.3 %"


def test_the_terminal_table_is_aligned():
    rows = [
        {"stage": "ingest", "seconds": 12.5, "rows": 1_234_567},
        {"stage": "shard", "seconds": None, "rows": 8},
    ]
    assert text_table(rows).splitlines() == [
        "stage   seconds       rows",
        "──────  ───────  ─────────",
        "ingest     12.5  1,234,567",
        "shard         –          8",
    ]
    assert text_table(pl.DataFrame(rows)) == text_table(rows)

"""The ladder on a page and in Markdown: who is best, what is a tie, at what cost, and on which data."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from fleetcast import plots
from fleetcast.errors import InputError
from fleetcast.evaluation import ladder_plots
from fleetcast.evaluation.backtest import Measured
from fleetcast.evaluation.ladder import Cost, DataSet, GraphLift, Rung, Standing
from fleetcast.evaluation.ladder_report import (
    LadderReport,
    PaperRun,
    Stopped,
    render,
    verdict,
)
from fleetcast.evaluation.metrics import PerEntity, Scores, per_origin
from fleetcast.evaluation.papers import FUSION, STGNN
from fleetcast.evaluation.peaks import Peaks
from fleetcast.schemas import QUANTILES
from scipy.stats import norm
from test_report import Page

ORIGINS, H, N = 60, 6, 3
Z = norm.ppf(QUANTILES)
MEDIAN = QUANTILES.index(0.5)


def loads(metrics, origins=ORIGINS):
    """[B, H, N, F] hourly windows of a load with a daily cycle; the same for every rung."""
    random = np.random.default_rng(0)
    time = np.arange(origins + H)
    series = (
        0.4
        + 0.2 * np.sin(time / 24 * 2 * np.pi)[:, None, None]
        + 0.05 * random.normal(size=(len(time), N, metrics))
    )
    return np.stack([series[o : o + H] for o in range(origins)])


def measured(spread, seed=0, metrics=1, origins=ORIGINS):
    """A forecast off by `spread`, more so far ahead, its quantiles right on average."""
    y = loads(metrics, origins)
    random = np.random.default_rng([seed, int(1e6 * spread)])
    wide = spread * np.linspace(0.7, 1.3, H)[:, None, None]
    mean = y - wide * random.normal(size=y.shape)
    quantiles = mean[..., None] + wide[..., None] * Z
    seen = np.random.default_rng(1).random(y.shape) > 0.05
    given = (y, seen, mean, quantiles[..., MEDIAN], quantiles)
    sums = per_origin(*given, QUANTILES, 0.15)
    return Measured(
        Scores.of(y, seen, mean, quantiles, QUANTILES, [0.1] * metrics, quantiles[..., MEDIAN], scale=0.15),
        None,
        dict(enumerate(sums)),
        Peaks.of(*given, QUANTILES, np.full((N, metrics), 0.55)),
        PerEntity.of(y, seen, quantiles[..., MEDIAN], np.arange(N), 0.15),
    )


def rung(name, family, spread, seeds=3, cost=None, **options):
    costs = cost or (Cost() if family == "naive" else Cost(12_345, 14, 3.21, 45.6 / spread, 7.89))
    return Rung(name, family, {seed: measured(spread, seed, **options) for seed in range(seeds)}, costs)


def data_set(rungs, name="machines", metrics=("cpu",), windows=ORIGINS):
    f = len(metrics)
    return DataSet(
        name=name,
        description=f"What {name} did.",
        metrics=metrics,
        normalised=(),
        std=np.full(f, 0.15),
        mase_scale=np.full(f, 0.05),
        start=1_514_764_800,
        step=3600,
        horizon=H,
        split="60 : 20 : 20",
        entities=N,
        windows=windows,
        rungs=rungs,
    )


NAIVE = [
    rung("last value", "naive", 0.12, seeds=1),
    rung("same time yesterday", "naive", 0.1, seeds=1),
    rung("same time last week", "naive", 0.08, seeds=1),
]
MODELS = [
    rung("ridge", "statistical", 0.05, seeds=1),
    rung("lstm", "sequence", 0.0501),
    rung("stgnn", "graph", 0.03),
]


def lift(model, data="machines", **spreads):
    """A graph model by its errors on each graph."""
    tried = [rung(f"{model}, {graph}", "graph", spread) for graph, spread in spreads.items()]
    return GraphLift(
        model, Standing.of(data_set(tried, data)), {graph: f"{model}, {graph}" for graph in spreads}
    )


LIFTS = [
    lift("stgnn", true=0.04, identity=0.05, shuffled=0.0501, learned=0.045),
    lift("fusion", true=0.05, identity=0.0501, shuffled=0.04),
]


def report(**changes):
    two = [rung("last value", "naive", 0.12, 1, metrics=2), rung("fusion", "graph", 0.06, metrics=2)]
    made = LadderReport(
        title="The ladder of May",
        data=[data_set(NAIVE + MODELS), data_set(two, "services <of A>", ("cpu", "memory"))],
        search="Thirty trials of each model, chosen on the validation part.",
        stopped=[Stopped("informer", "machines", "out of <memory> | killed")],
        graph_lift=LIFTS,
        papers=[PaperRun(FUSION, "services <of A>"), PaperRun(STGNN, "machines")],
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def pages():
    return render(report())


@pytest.fixture(scope="module")
def page(pages):
    return pages.html


@pytest.fixture(scope="module")
def markdown(pages):
    return pages.markdown


def text_of(report):
    """Its Markdown, without plots."""
    return render(report, pictures=False).markdown


def rows(markdown, heading):
    """Name → cells of the first table whose title or section begins so."""
    at = markdown.index(heading)
    lines = markdown[at:].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| "))
    names = [cell.strip() for cell in lines[first].strip("|").split("|")]
    found = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")]
        found[cells[0]] = dict(zip(names, cells, strict=True))
    return found


def test_the_plots_of_the_markdown_are_files_beside_it(pages):
    shown = re.findall(r"!\[.+\]\(plots/(.+)\)", pages.markdown)
    assert sorted(shown) == sorted(pages.plots), "each once"
    assert all(image.startswith(b"\x89PNG") for image in pages.plots.values())
    assert len(shown) == pages.html.count("<img ")


def test_the_page_needs_nothing_but_itself(page):
    read = Page(page)
    assert not {"script", "link", "iframe"} & set(read.tags)
    assert "http://" not in page and "https://" not in page and "url(" not in page
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in read.images)
    # Skill and the graph; of each data set lead time, time of day, calibration, cost; provisioning by metric.
    assert len(read.images) == 2 + 2 * 4 + 3


def test_every_section_is_there_and_names_its_data(page, markdown):
    for heading in (
        "How to read this",
        "The ladder",
        "machines: high load",
        "machines: provisioning",
        "machines: cost",
        "What the graph is worth",
        "The papers’ tables",
        "What was stopped",
        "The search",
    ):
        assert f">{heading}</h" in page and f"# {heading}\n" in markdown, heading
    text = Page(page).text
    for words in (
        "What machines did.",
        "3 entities, cpu, memory; 6 h ahead in steps of 1 h; split 60 : 20 : 20; 60 test windows.",
        "machines: error by lead time",
        "machines: error by time of day",
        "machines: calibration",
        "machines: error against the time to fit",
        "machines: cpu, idle against shortfall",
        "Thirty trials of each model",
        "doi 10.20944/preprints202602.1772.v1",
    ):
        assert words in text, words


def test_names_cannot_write_html_or_break_a_table(page, markdown):
    for text in (page, markdown):
        assert "<of A>" not in text and "<memory>" not in text
        assert "services &lt;of A&gt;" in text and "out of &lt;memory&gt;" in text
    assert rows(markdown, "## What was stopped")["informer"]["Why"] == "out of &lt;memory&gt; ¦ killed"


def test_the_ladder_is_sorted_by_skill_with_ranks_and_ties(markdown):
    found = rows(markdown, "**machines: scaled MAE")
    assert next(iter(found)) == "stgnn" and list(found)[-1] == "last value"
    assert found["stgnn"]["Rank"] == "1" and found["stgnn"]["Against the best, %"] == "–"
    assert {found[name]["Rank"] for name in ("ridge", "lstm")} == {"2 (2–3)", "3 (2–3)"}
    assert found["same time last week"]["Skill"] == "0.0 %"
    assert float(found["stgnn"]["Skill"].split()[0]) == pytest.approx(100 * (1 - 0.03 / 0.08), abs=2)
    assert "±" in found["lstm"]["Scaled MAE"] and "±" not in found["ridge"]["Scaled MAE"], "one seed"


def interval(cell):
    """(difference, low, high) of `better: -6.0 (-7.3 to -4.9)`."""
    difference, low, _, high = cell.split(": ")[-1].replace("(", "").replace(")", "").split()
    return float(difference), float(low), float(high)


def test_every_rung_is_held_against_the_best_and_against_ridge(markdown):
    found = rows(markdown, "**machines: scaled MAE")
    standing = Standing.of(data_set(NAIVE + MODELS))
    for against, other in (("Against the best, %", "stgnn"), ("Against ridge, %", "ridge")):
        assert found[other][against] == "–"
        for name in found.keys() - {other}:
            expected = 100 * np.array(standing.resampled.compare(name, other).relative)
            assert interval(found[name][against]) == pytest.approx(expected, abs=0.5), (name, other)
    assert found["stgnn"]["Against ridge, %"].startswith("-")
    assert found["last value"]["Against ridge, %"].startswith("+")
    assert "Against ridge, %" not in rows(markdown, "**services &lt;of A&gt;: scaled MAE")["fusion"]


def test_figures_are_those_of_the_scores(markdown):
    found = rows(markdown, "**machines, cpu (CPU")["ridge"]
    scores = MODELS[0].scores
    assert float(found["MAE"]) == pytest.approx((scores.abs_error.sum() / scores.n.sum()), rel=0.01)
    assert float(found["Scaled MAE"]) == pytest.approx(float(found["MAE"]) / 0.15, rel=0.01)
    assert float(found["90 %"].split()[0]) == pytest.approx(90, abs=3)
    assert float(found["of the median entity"]) == pytest.approx(
        float(MODELS[0].seeds[0].entities.median()[0]), abs=1e-3
    )
    needed = {"RMSE", "WAPE", "MASE", "R²", "Pinball", "WIS", "Inside 50 %", "80 %"}
    assert needed <= set(found) and "–" not in found.values()


def test_several_metrics_have_a_column_each_and_their_mean_decides(markdown):
    found = rows(markdown, "**services &lt;of A&gt;: scaled MAE")["fusion"]
    of_metrics = [float(found[metric]) for metric in ("cpu", "memory")]
    assert float(found["Scaled MAE"].split()[0]) == pytest.approx(np.mean(of_metrics), abs=2e-3)
    assert "**services &lt;of A&gt;, memory (memory in use, fraction of capacity)" in markdown


def test_all_data_sets_stand_side_by_side(markdown):
    found = rows(markdown, "## The ladder")
    assert (
        found["fusion"]["machines: skill"] == "–" and found["fusion"]["services &lt;of A&gt;: skill"] != "–"
    )
    assert next(iter(found)) == "last value", "the only one on both"


def test_high_load_and_provisioning_are_those_of_the_states(markdown):
    found = rows(markdown, "### machines: high load")["stgnn"]
    peaks = MODELS[2].peaks
    assert float(found["MAE"]) == pytest.approx(float(peaks.abs_error[0] / peaks.n[0]), rel=0.01)
    assert found["Misses"] == "0" and float(found["Caught, 50 %"].split()[0]) > 50
    found = rows(markdown, "### machines: provisioning")
    assert set(found) == {"stgnn", "ridge", "lstm", "same time last week", "same time yesterday"}
    assert float(found["stgnn"]["90 %: idle"]) < float(found["same time last week"]["90 %: idle"])


def test_costs_are_listed_and_unknown_ones_are_a_dash(markdown):
    found = rows(markdown, "### machines: cost")
    assert found["lstm"]["Parameters"] == "12,345" and found["lstm"]["ms per forecast"] == "7.89"
    assert (found["lstm"]["Epochs"], found["lstm"]["Seeds"], found["ridge"]["Seeds"]) == ("14", "3", "1")
    assert found["last value"]["Seconds to fit"] == "–"


def test_each_graph_is_held_against_none_and_against_a_shuffled_one(markdown):
    found = rows(markdown, "## What the graph is worth")
    assert list(found)[:4] == ["stgnn, true", "stgnn, identity", "stgnn, shuffled", "stgnn, learned"]
    for one in LIFTS:
        standing = one.standing
        for graph in one.rungs:
            row = found[f"{one.model}, {graph}"]
            assert float(row["Scaled MAE"].split()[0]) == pytest.approx(np.mean(one.errors[graph]), abs=1e-3)
            for other in ("identity", "shuffled"):
                cell = row[f"Against {other}, %"]
                if graph == other:
                    assert cell == "–"
                    continue
                gap = standing.resampled.compare(one.rungs[graph], one.rungs[other])
                assert cell.split(": ")[0] == gap.verdict
                assert interval(cell) == pytest.approx(100 * np.array(gap.relative), abs=0.051)
    assert found["stgnn, true"]["Against identity, %"].startswith("better: -")
    assert found["stgnn, shuffled"]["Against identity, %"].startswith("tie: ")
    assert found["fusion, true"]["Against shuffled, %"].startswith("worse: +")


def test_words_say_whether_the_true_graph_pays(markdown):
    words = next(line for line in markdown.splitlines() if line.startswith("machines: the true graph of"))
    of_stgnn, of_fusion = words.rstrip(".").split("; ")
    assert of_stgnn.startswith("machines: the true graph of stgnn clearly pays against identity, -")
    assert ", and clearly pays against shuffled, -" in of_stgnn
    assert of_fusion.startswith("the true graph of fusion ties against identity, ")
    assert ", and costs against shuffled, +" in of_fusion and of_fusion.count("% (interval ") == 2


def test_the_plot_of_the_graphs_has_an_interval_for_each(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "png", lambda figure: figures.append(figure) or b"")
    ladder_plots.lift("machines", LIFTS)
    drawn = {bars.get_label(): bars.lines for bars in figures[0].axes[0].containers}
    assert list(drawn) == ["true", "shuffled", "learned"]
    for graph, (points, _, (intervals,)) in drawn.items():
        gaps = [one.against("identity")[graph] for one in LIFTS if graph in one.rungs]
        found = [
            [x, *ends[:, 0]] for x, ends in zip(points.get_xdata(), intervals.get_segments(), strict=True)
        ]
        np.testing.assert_allclose(found, [100 * np.array(gap.relative) for gap in gaps])


def test_a_model_without_the_identity_graph_is_listed_and_not_drawn():
    alone = report(data=[], papers=[], graph_lift=[lift("fusion", true=0.05, learned=0.04)])
    text = text_of(alone)
    assert "the true graph of fusion was held against no other." in text
    assert rows(text, "## What the graph is worth")["fusion, true"]["Against identity, %"] == "–"
    assert "what the graph changes" not in Page(render(alone, pictures=False).html).text


def test_the_papers_figures_stand_beside_ours_on_named_data(markdown):
    found = rows(markdown, "**Temporal-structural fusion.")
    assert found["Fusion"]["MSE, paper"] == "0.0027" and found["Fusion"]["MAPE, paper"] == "4.63 %"
    assert "±" in found["Fusion"]["MAE, ours"]
    assert found["Informer"]["MAE, ours"] == "–" and found["Informer"]["Our forecast"] == "informer"
    assert (
        "Paper: Alibaba cluster trace, part and scaling not stated. Ours: services &lt;of A&gt;" in markdown
    )
    found = rows(markdown, "**Spatiotemporal graph network.")
    assert found["STGNN"]["R², paper"] == "0.941" and found["STGNN"]["R², ours"] != "–"


def test_skill_without_a_week_before_is_against_yesterday():
    given = data_set([NAIVE[0], NAIVE[1], MODELS[2]])
    text = text_of(report(data=[given], papers=[]))
    found = rows(text, "**machines: scaled MAE")
    assert found["same time yesterday"]["Skill"] == "0.0 %"


def test_a_rung_that_stopped_everywhere_is_named_and_ranks_nowhere():
    given = data_set([*NAIVE, Rung("informer", "sequence", {})])
    text = text_of(report(data=[given]))
    assert rows(text, "## The ladder")["informer"]["machines: skill"] == "–"
    assert "informer" not in rows(text, "**machines: scaled MAE")
    assert rows(text, "## What was stopped")["informer"]["Data"] == "machines"


def test_a_report_without_anything_says_so():
    empty = data_set([Rung("informer", "sequence", {})])
    text = Page(render(report(data=[empty], stopped=[], graph_lift=[], papers=[]), pictures=False).html).text
    for sentence in (
        "machines: no forecast was scored.",
        "Every trial came to its end.",
        "No graph model was tried on several graphs.",
        "No paper’s table was rerun.",
    ):
        assert sentence in text
    assert "The search" in Page(render(report(data=[], papers=[]), pictures=False).html).text


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        (
            NAIVE + MODELS,
            "stgnn is best. It beats ridge by # and beats the best naive forecast (same time last "
            "week) by #. All others are worse beyond chance. The best graph model (stgnn) beats the "
            "best sequence model (lstm) by #.",
        ),
        (
            NAIVE + MODELS[:2],
            "ridge is best. It beats the best naive forecast (same time last week) by #. It cannot be"
            " told apart from lstm.",
        ),
        (
            [MODELS[0], rung("stgnn", "graph", 0.0502), rung("dlinear", "sequence", 0.0488)],
            "dlinear is best. It ties with ridge at #. It cannot be told apart from ridge, stgnn. The"
            " best graph model (stgnn) ties with the best sequence model (dlinear) at #.",
        ),
        (
            [MODELS[1], rung("stgnn", "graph", 0.08)],
            "lstm is best. All others are worse beyond chance. The best graph model (stgnn) loses to "
            "the best sequence model (lstm) by #.",
        ),
        (
            [NAIVE[2], rung("ridge", "statistical", 0.1, seeds=1)],
            "same time last week, a naive forecast, is best. It beats ridge by #. All others are "
            "worse beyond chance.",
        ),
        (NAIVE[2:], "same time last week, a naive forecast, is best. No other forecast was scored."),
    ],
)
def test_the_verdict_names_the_best_its_worth_and_what_ties(rungs, words):
    found = verdict(Standing.of(data_set(rungs)))
    assert re.sub(r"\S+ % \(interval \S+ to [^)]+\)", "#", found) == f"machines: {words}"


def test_a_gain_is_positive_in_words_and_its_interval_rises():
    found = verdict(Standing.of(data_set(NAIVE + MODELS)))
    for gain, low, high in re.findall(r"by (\S+) % \(interval (\S+) to (\S+)\)", found):
        assert 0 < float(low) < float(gain) < float(high) < 100


def test_one_window_leaves_intervals_unknown():
    rungs = [rung(name, "naive", spread, 1, origins=1) for name, spread in (("a", 0.1), ("b", 0.2))]
    cell = rows(text_of(report(data=[data_set(rungs)])), "**machines: scaled MAE")["b"]
    assert cell["Against the best, %"].endswith(" (– to –)")


def test_entities_of_earlier_versions_are_unknown():
    seeds = {0: dataclasses.replace(NAIVE[0].seeds[0], entities=None)}
    text = render(
        report(data=[data_set([dataclasses.replace(NAIVE[0], seeds=seeds)])]), pictures=False
    ).markdown
    found = rows(text, "**machines, cpu (CPU")["last value"]
    assert found["of the median entity"] == "–" and found["Scaled MAE"] != "–"


def test_without_thresholds_the_report_says_so():
    seeds = {0: dataclasses.replace(NAIVE[0].seeds[0], peaks=None)}
    text = render(
        report(data=[data_set([dataclasses.replace(NAIVE[0], seeds=seeds)])]), pictures=False
    ).markdown
    assert "No thresholds of high load were given." in text


def test_rungs_on_other_targets_are_refused():
    other = rung("dlinear", "sequence", 0.05, origins=ORIGINS - 1)
    with pytest.raises(InputError, match="cover other origins"):
        text_of(report(data=[data_set([*NAIVE, other])]))

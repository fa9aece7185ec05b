"""The report of a backtest: every rung on every data set, as one HTML page or as Markdown.

rung = Rung("ridge", "statistical", seeds={0: measured})
report = LadderReport(title="…", data=[DataSet(…, rungs=[rung, …])], search="…")
render(report).html      # needs nothing but itself: style and plots are inside
render(report).markdown  # the same words and tables, with its plots as files
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fleetcast.evaluation import dependencies, document
from fleetcast.evaluation import ladder_plots as draw
from fleetcast.evaluation import metrics as m
from fleetcast.evaluation import peaks as p
from fleetcast.evaluation.compare import Gap, Ranked
from fleetcast.evaluation.document import Pages, Section, Table
from fleetcast.evaluation.ladder import IDENTITY, RIDGE, SHUFFLED, TRUE, DataSet, GraphLift, Rung, Standing
from fleetcast.evaluation.naive import duration
from fleetcast.evaluation.page import number, percent
from fleetcast.evaluation.papers import PaperTable
from fleetcast.schemas import describe

#: Quantiles whose alarms and provisioning the tables show, where the forecasts have them.
LEVELS = (0.5, 0.9, 0.99)
_TIES_NAMED = 3


@dataclass(frozen=True)
class Stopped:
    """A trial that did not come to its end."""

    model: str
    data: str
    reason: str


@dataclass(frozen=True)
class PaperRun:
    """A paper's table, rerun on one of the report's data sets."""

    table: PaperTable
    data: str


@dataclass(frozen=True)
class LadderReport:
    """Everything the report shows."""

    title: str
    data: Sequence[DataSet]
    search: str
    """The search budget in words: what was tried for each model, and on which part it was chosen."""
    stopped: Sequence[Stopped] = ()
    graph_lift: Sequence[GraphLift] = ()
    papers: Sequence[PaperRun] = ()


def render(report: LadderReport, pictures: bool = True) -> Pages:
    """The whole report; plots take time and may be left out.

    Raises InputError if rungs of a data set did not count the same targets.
    """
    standings = [Standing.of(data) for data in report.data]
    verdicts = [verdict(standing) for standing in standings]
    return document.pages(report.title, verdicts, sections(report, standings, pictures))


def sections(report: LadderReport, standings: Sequence[Standing], pictures: bool = True) -> list[Section]:
    """The whole report in order; plots take time and may be left out."""
    found = [_how_to_read(), _overview(standings, pictures)]
    for standing in standings:
        found += _data_set(standing, pictures)
    found += [_graph_lift(report.graph_lift, pictures), _papers(report, standings)]
    return [*found, _stopped(report), Section("The search", (report.search,))]


# -- words ---------------------------------------------------------------------------------------------------


def verdict(standing: Standing) -> str:
    """The best rung, what it is worth and what ties with it; the best graph model and sequence model."""
    if not standing.places:
        return f"{standing.data.name}: no forecast was scored."
    best, naive = standing.places[0], standing.naive
    sentences = [f"{best.name}{', a naive forecast,' if best.name == naive else ''} is best."]
    held = {RIDGE: RIDGE, naive: f"the best naive forecast ({naive})"}
    outcomes = [
        _outcome(gap, words) for other, words in held.items() if (gap := standing.gap(best.name, other))
    ]
    if outcomes:
        sentences.append(f"It {' and '.join(outcomes)}.")
    if len(standing.places) == 1:
        sentences.append("No other forecast was scored.")
    elif best.ties:
        sentences.append(f"It cannot be told apart from {_names(best.ties)}.")
    else:
        sentences.append("All others are worse beyond chance.")
    graph, sequence = standing.best("graph"), standing.best("sequence")
    if gap := standing.gap(graph, sequence):
        sentences.append(
            f"The best graph model ({graph}) {_outcome(gap, f'the best sequence model ({sequence})')}."
        )
    return f"{standing.data.name}: {' '.join(sentences)}"


def _outcome(gap: Gap, other: str) -> str:
    """`beats ridge by 5.1 % (interval 3.9 to 6.3)`."""
    difference, low, high = gap.relative
    if gap.verdict == "tie":
        return f"ties with {other} at {_span(difference, low, high, '+')}"
    if gap.verdict == "worse":
        return f"loses to {other} by {_span(difference, low, high)}"
    return f"beats {other} by {_span(-difference, -high, -low)}"


def _span(difference: float, low: float, high: float, sign: str = "-") -> str:
    """Shares as `5.1 % (interval 3.9 to 6.3)`."""
    return f"{_points(difference, sign)} % (interval {_points(low)} to {_points(high)})"


def _change(gap: Gap | None) -> str:
    """Percentage points as `+5.1 (3.9 to 6.3)`."""
    if gap is None:
        return "–"
    difference, low, high = gap.relative
    return f"{_points(difference, '+')} ({_points(low)} to {_points(high)})"


def _points(share: float, sign: str = "-") -> str:
    """Percentage points; with a `+` before what is not below 0 if `sign` is one."""
    decimals = 1 if abs(share) < 1 else 0
    return f"{share * 100:{sign}z.{decimals}f}" if np.isfinite(share) else "–"


def _names(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    if len(names) <= _TIES_NAMED + 1:
        return ", ".join(names) or "–"
    return f"{', '.join(names[:_TIES_NAMED])} and {len(names) - _TIES_NAMED} more"


def _how_to_read() -> Section:
    return Section(
        "How to read this",
        (
            "Every forecast of a data set was made from the same look-back and is scored on the same "
            "targets of the test part, which no model has seen and no option was chosen on. The error that "
            "decides is the scaled MAE: mean absolute error ÷ standard deviation of the training part (each "
            "entity’s own, where the windows are scaled by entity), the mean over metrics; lower is better. "
            "Absolute errors are taken of the median forecast, squared ones of the mean, as each is the best "
            "answer to its own error.",
            "Skill is 1 − error ÷ error of the forecast that repeats last week (where a data set has no "
            "week before, of yesterday, else of the last value): 0 % is as good as repeating, 100 % is "
            "perfect, below 0 % is worse. “±” is the standard deviation over seeds.",
            "Intervals of a difference are of 95 %: origins are drawn anew in blocks of neighbours, the "
            "same for both forecasts, and so are seeds. “Against ridge, %: -5.0 (-6.1 to -3.9)” is an error "
            "5 % below that of ridge, a linear model, and the interval. Where it holds 0 the two are a tie, "
            "and a rank such as “3 (1–5)” says from which to which place a forecast may stand. Each pair is "
            "compared on its own, so among many pairs a few differences are chance. Of a model with one "
            "seed nothing is known of how much training by chance matters.",
        ),
    )


# -- all data sets -------------------------------------------------------------------------------------------


def _overview(standings: Sequence[Standing], pictures: bool) -> Section:
    """Every rung on every data set, by its mean skill; those that lack a data set stand below."""
    families = {rung.name: rung.family for standing in standings for rung in standing.data.rungs}
    places = [{place.name: place for place in standing.places} for standing in standings]

    def rank(name: str) -> tuple[int, float, str]:
        found = [place[name] for place in places if name in place]
        worth = [-place.error if place.skill is None else place.skill for place in found]
        return len(standings) - len(found), -float(np.mean(worth)) if worth else 0.0, name

    order = sorted(families, key=rank)
    columns = ["Forecast", "Family"]
    for standing in standings:
        columns += [f"{standing.data.name}: skill", "rank"]
    rows = []
    for name in order:
        cells = [name, families[name]]
        for place in places:
            cells += [_skill(place[name]), _rank(place[name])] if name in place else ["–", "–"]
        rows.append(tuple(cells))
    scored = [name for name in order if any(name in place for place in places)]
    table = Table(tuple(columns), rows, words=frozenset({"Family"}))
    words = "The ladder on all data sets, sorted by mean skill. “–”: not tried, or stopped (see below)."
    drawn = pictures and any(place.skill is not None for s in standings for place in s.places)
    return Section(
        "The ladder", (words,), (table,) if rows else (), (draw.skills(standings, scored),) if drawn else ()
    )


def _skill(place: Ranked) -> str:
    return percent(place.skill)


def _rank(place: Ranked) -> str:
    return f"{place.first}–{place.last}" if place.first != place.last else str(place.first)


# -- one data set --------------------------------------------------------------------------------------------


def _data_set(standing: Standing, pictures: bool) -> list[Section]:
    data = standing.data
    setting = (
        f"{number(data.entities)} entities, {', '.join(data.metrics)}; {duration(data.horizon * data.step)} "
        f"ahead in steps of {duration(data.step)}; split {data.split}; {number(data.windows)} test windows."
    )
    if not standing.places:
        return [Section(data.name, (data.description, setting, "No forecast was scored."))]
    return [
        Section(
            data.name,
            (data.description, setting),
            (_ladder(standing), *(_details(standing, f) for f in range(len(data.metrics)))),
            (draw.by_horizon(standing), draw.by_time(standing), draw.calibration(standing))
            if pictures
            else (),
        ),
        _peaks(standing),
        _provisioning(standing, pictures),
        _cost(standing, pictures),
        dependencies.section(data.graph, data.name, pictures),
    ]


def _ladder(standing: Standing) -> Table:
    data, best = standing.data, standing.places[0]
    several = data.metrics if len(data.metrics) > 1 else ()
    against = {"the best": best.name} | ({RIDGE: RIDGE} if RIDGE in standing.rungs else {})
    rows = []
    for at, place in enumerate(standing.places, start=1):
        rung = standing.rungs[place.name]
        of_metrics = rung.figures(data)[: len(several)]
        rows.append(
            (
                place.name,
                str(at) if place.first == place.last else f"{at} ({_rank(place)})",
                _skill(place),
                _seeds(standing.errors(place.name)),
                *(_change(standing.gap(place.name, other)) for other in against.values()),
                *(number(float(np.mean(figures["scaled_mae"]))) for figures in of_metrics),
            )
        )
    changes = (f"Against {other}, %" for other in against)
    return Table(
        ("Forecast", "Rank", "Skill", "Scaled MAE", *changes, *several),
        rows,
        f"{data.name}: scaled MAE" + (", mean over metrics and of each" if several else ""),
        marked=frozenset({best.name, *best.ties}),
    )


def _details(standing: Standing, f: int) -> Table:
    """Every figure of one metric."""
    data = standing.data
    metric = data.metrics[f]
    titles = {
        "scaled_mae": "Scaled MAE",
        "median_scaled_mae": "of the median entity",
        "mae": "MAE",
        "rmse": "RMSE",
        "wape": "WAPE",
        "mase": "MASE",
        "r2": "R²",
        "mape": "MAPE",
        "mape_share": "of targets",
        "pinball": "Pinball",
        "wis": "WIS",
        "coverage_50": "Inside 50 %",
        "coverage_80": "80 %",
        "coverage_90": "90 %",
    }
    shares = {"wape", "mape", "mape_share", "coverage_50", "coverage_80", "coverage_90"}
    rows = []
    for name, rung in standing.rungs.items():
        figures = rung.figures(data)[f]
        rows.append((name, *(_seeds(figures[figure], figure in shares) for figure in titles)))
    return Table(
        ("Forecast", *titles.values()),
        rows,
        f"{data.name}, {_metric(data, metric)}: every figure; "
        "MAE, RMSE, pinball and WIS in the metric’s unit",
        folded=True,
    )


def _seeds(values: Sequence[float], share: bool = False) -> str:
    """Mean ± standard deviation over seeds, with as many decimals; the mean alone of one seed."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "–"
    mean = float(np.mean(known))
    if share:
        mean *= 100
    words = f"{mean:.1f}" if share else number(mean)
    if len(known) > 1:
        spread = float(np.std(known, ddof=1)) * (100 if share else 1)
        decimals = len(words.partition(".")[2])
        words += f" ± {number(spread) if 'e' in words else f'{spread:,.{decimals}f}'}"
    return f"{words} %" if share else words


def _peaks(standing: Standing) -> Section:
    data = standing.data
    found = {name: peaks for name, rung in standing.rungs.items() if (peaks := rung.peaks) is not None}
    title = f"{data.name}: high load"
    if not found:
        return Section(title, ("No thresholds of high load were given.",), level=3)
    words = (
        "High is a load above the entity’s own 95 % quantile of the training part. MAE and bias (mean "
        "forecast − load; below 0: peaks are forecast too low) are over such targets. An alarm is a window "
        "in which the quantile named passes the threshold, right if the load does so in that window: "
        "caught is the share of such windows that had an alarm, right the share of alarms that were so. "
        "Peak’s time off: mean distance between the highest median and the highest load; a level forecast "
        "has its peak at the first step."
    )
    tables = tuple(_peak_table(standing, found, f) for f in range(len(data.metrics)))
    return Section(title, (words,), tables, level=3)


def _peak_table(standing: Standing, found: dict[str, p.Peaks], f: int) -> Table:
    data = standing.data
    first = next(iter(found.values()))
    at = [(level, first.levels.index(level)) for level in LEVELS if level in first.levels]
    columns = ["Forecast", "MAE", "Bias", "Peak’s time off"]
    for level, _ in at:
        columns += [f"Caught, {_level(level)}", f"Right, {_level(level)}"]
    columns += ["Hits", "Misses", "False alarms"] if at else []
    rows = []
    for name, peaks in found.items():
        off = float(p.time_to_peak(peaks)[f]) * data.step / 60
        cells = [name, number(float(p.mae(peaks)[f])), number(float(p.bias(peaks)[f])), f"{number(off)} min"]
        for _, q in at:
            cells += [percent(float(p.recall(peaks)[f, q])), percent(float(p.precision(peaks)[f, q]))]
        if at:
            # Counts of all seeds; of one seed they are easier to compare.
            seeds, q = len(standing.rungs[name].seeds), at[-1][1]
            counts = (peaks.hits, p.misses(peaks), p.false_alarms(peaks))
            cells += [number(round(int(count[f, q]) / seeds)) for count in counts]
        rows.append(tuple(cells))
    counted = f"; hits, misses and false alarms of the {_level(at[-1][0])} quantile" if at else ""
    title = f"{data.name}, {_metric(data, data.metrics[f])}{counted}"
    return Table(tuple(columns), rows, title, folded=f > 0)


def _metric(data: DataSet, metric: str) -> str:
    """With what it measures, where that is known."""
    words = describe(metric, data.normalised)
    return metric if words == metric else f"{metric} ({words})"


def _level(level: float) -> str:
    return f"{level * 100:g} %"


def _provisioning(standing: Standing, pictures: bool) -> Section:
    data = standing.data
    words = (
        "What it costs to provision a quantile of the forecast at every step: idle is the mean of what "
        "stays unused, shortfall of what is missing, both in the metric’s unit per entity and step; short "
        "is how many minutes of a day the load lies above. A forecast is better where it needs less idle "
        "capacity for the same shortfall. The best forecasts, ridge and the best naive one."
    )
    tables = tuple(_provisioning_table(standing, f) for f in range(len(data.metrics)))
    drawn = tuple(draw.provisioning(standing, f) for f in range(len(data.metrics))) if pictures else ()
    return Section(f"{data.name}: provisioning", (words,), tables, drawn, level=3)


def _provisioning_table(standing: Standing, f: int) -> Table:
    data = standing.data
    columns, rows = ["Forecast"], []
    levels = standing.rungs[standing.shown[0]].scores.levels
    at = [(level, levels.index(level)) for level in LEVELS if level in levels]
    for level, _ in at:
        columns += [f"{_level(level)}: idle", "shortfall", "short, min a day"]
    for name in standing.shown:
        one = standing.rungs[name].scores.pooled()
        idle, shortfall, short = m.idle(one)[0, f], m.shortfall(one)[0, f], m.under_provisioned(one)[0, f]
        cells = [name]
        for _, q in at:
            cells += [number(float(idle[q])), number(float(shortfall[q])), number(float(short[q] * 1440))]
        rows.append(tuple(cells))
    title = f"{data.name}, {_metric(data, data.metrics[f])}"
    return Table(tuple(columns), rows, title, folded=f > 0)


def _cost(standing: Standing, pictures: bool) -> Section:
    rows = [_cost_row(rung) for rung in standing.rungs.values()]
    columns = (
        "Forecast",
        "Family",
        "Seeds",
        "Parameters",
        "Epochs",
        "Seconds per epoch",
        "Seconds to fit",
        "ms per forecast",
    )
    words = (
        "Costs are of one seed. A forecast is one window of one group of entities. In the plot the figures "
        "beside the points are ranks in the ladder, in whose order the table is, too."
    )
    table = Table(columns, rows, f"{standing.data.name}: what each forecast costs", frozenset({"Family"}))
    picture = draw.cost(standing) if pictures else None
    return Section(f"{standing.data.name}: cost", (words,), (table,), (picture,) if picture else (), level=3)


def _cost_row(rung: Rung) -> tuple[str, ...]:
    cost = rung.cost
    epochs = "–" if cost.epochs is None else f"{cost.epochs:.3g}"
    figures = (cost.seconds_per_epoch, cost.fit_seconds, cost.forecast_ms)
    whole = (number(len(rung.seeds)), number(cost.parameters), epochs)
    return (rung.name, rung.family, *whole, *(number(value) for value in figures))


# -- graphs, papers, what was stopped ------------------------------------------------------------------------


def _graph_lift(lifts: Sequence[GraphLift], pictures: bool) -> Section:
    title = "What the graph is worth"
    if not lifts:
        return Section(title, ("No graph model was tried on several graphs.",))
    words = (
        "The same model told to see the true dependencies, none (identity), the true ones between shuffled "
        "entities, or a graph that it learns. A graph pays where its error is below that of identity, and "
        "what it says of the entities pays where it is also below that of shuffled; else the graph is worth "
        "nothing here, whatever the model’s name says. “Against” is the change of the scaled MAE with its "
        "interval of 95 %; below 0: better, and a tie where the interval holds 0."
    )
    by_data: dict[str, list[GraphLift]] = {}
    for lift in lifts:
        by_data.setdefault(lift.standing.data.name, []).append(lift)
    drawn = [draw.lift(data, found) for data, found in by_data.items()] if pictures else []
    return Section(
        title,
        (words, *(f"{data}: {'; '.join(map(_worth, found))}." for data, found in by_data.items())),
        tuple(_lift_table(data, found) for data, found in by_data.items()),
        tuple(picture for picture in drawn if picture),
    )


def _worth(lift: GraphLift) -> str:
    """Whether the true graph pays, in words."""
    verbs = {"better": "clearly pays", "tie": "ties", "worse": "costs"}
    found = [
        f"{verbs[gap.verdict]} against {other}, {_span(*gap.relative, sign='+')}"
        for other in (IDENTITY, SHUFFLED)
        if (gap := lift.against(other).get(TRUE))
    ]
    return f"the true graph of {lift.model} {', and '.join(found) or 'was held against no other'}"


def _lift_table(data: str, lifts: Sequence[GraphLift]) -> Table:
    """A row for each model and graph."""
    rows = []
    for lift in lifts:
        for graph, errors in lift.errors.items():
            gaps = [lift.against(other).get(graph) for other in (IDENTITY, SHUFFLED)]
            against = [f"{gap.verdict}: {_change(gap)}" if gap else "–" for gap in gaps]
            rows.append((f"{lift.model}, {graph}", _seeds(errors), *against))
    return Table(
        ("Model, graph", "Scaled MAE", f"Against {IDENTITY}, %", f"Against {SHUFFLED}, %"), rows, data
    )


def _papers(report: LadderReport, standings: Sequence[Standing]) -> Section:
    title = "The papers’ tables"
    if not report.papers:
        return Section(title, ("No paper’s table was rerun.",))
    words = (
        "The papers’ own figures beside ours. They were measured on other data and other hardware, so a "
        "figure does not compare with its neighbour; the order of the methods does. Ours are the mean over "
        "metrics, in units of the training part’s standard deviation (MAE, RMSE) or its square (MSE)."
    )
    by_name = {standing.data.name: standing for standing in standings}
    tables = tuple(_paper_table(run, by_name.get(run.data)) for run in report.papers)
    return Section(
        title, (words, *(f"{run.table.title}: {run.table.source}." for run in report.papers)), tables
    )


def _paper_table(run: PaperRun, standing: Standing | None) -> Table:
    table = run.table
    titles = {"mse": "MSE", "mae": "MAE", "mape": "MAPE", "rmse": "RMSE", "r2": "R²"}
    columns = (
        "Method",
        *(f"{titles[figure]}, paper" for figure in table.figures),
        *(f"{titles[figure]}, ours" for figure in table.figures),
        "Our forecast",
    )
    rows = []
    for method, figures in table.rows.items():
        name = table.rungs[method]
        theirs = (_paper_figure(figure, value) for figure, value in zip(table.figures, figures, strict=True))
        known = standing is not None and name in standing.rungs
        ours = [_ours(standing, name, figure) if standing and known else "–" for figure in table.figures]
        rows.append((method, *theirs, *ours, name))
    title = f"{table.title}. Paper: {table.data}. Ours: {run.data}"
    return Table(columns, rows, title, frozenset({"Our forecast"}))


def _paper_figure(figure: str, value: float) -> str:
    return f"{value * 100:.2f} %" if figure == "mape" else f"{value:.4f}".rstrip("0")


def _ours(standing: Standing, name: str, figure: str) -> str:
    """Mean over metrics in scaled units, ± over seeds."""
    data = standing.data
    unit = {"mse": data.std**2, "mae": data.std, "rmse": data.std}.get(figure, np.ones(len(data.metrics)))
    by_metric = np.array([figures[figure] for figures in standing.rungs[name].figures(data)])
    return _seeds((by_metric / unit[:, None]).mean(0).tolist(), share=figure == "mape")


def _stopped(report: LadderReport) -> Section:
    title = "What was stopped"
    if not report.stopped:
        return Section(title, ("Every trial came to its end.",))
    rows = [(trial.model, trial.data, trial.reason) for trial in report.stopped]
    words = "These trials did not come to their end, so they are in no table above, or with fewer seeds."
    return Section(
        title, (words,), (Table(("Model", "Data", "Why"), rows, words=frozenset({"Data", "Why"})),)
    )

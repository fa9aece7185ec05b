"""The main job: from new raw files to a published forecast and its report; complete stages are skipped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from fleetcast.config import Options, Seconds
from fleetcast.errors import InputError, in_one_line
from fleetcast.evaluation import dependencies
from fleetcast.evaluation.metrics import Scores
from fleetcast.evaluation.naive import duration
from fleetcast.evaluation.report import NightlyReport, ladder_table, render, text_table
from fleetcast.forecasting.levels import LevelOptions, compare_levels
from fleetcast.forecasting.predict import ForecastOptions
from fleetcast.forecasting.run import OVERVIEW, forecast, read_selected
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.shards import SOURCE_KIND, shard
from fleetcast.ingest.sources import SourceShardOptions, load, windows_of
from fleetcast.runtime import PeakMemory
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.mapping import TabularOptions
from fleetcast.training.options import TrainOptions
from fleetcast.training.register import SELECTED
from fleetcast.training.run import train_model
from fleetcast.windows import manifest as manifests
from fleetcast.windows.graph import last_graph
from fleetcast.windows.manifest import Manifest, ShardOptions

log = logging.getLogger("fleetcast")


#: Wrong clocks that the report names.
_CLOCKS = 3
#: Windows of a night: long enough for weekly cycles, and no longer after a year.
_EIGHT_WEEKS = 8 * 7 * 86_400


class NightlyShardOptions(SourceShardOptions):
    """As of the shard job, but of the last eight weeks: what a night costs does not grow with the store. What
    is not given of a table's windows is taken from the table (`windows_of`)."""

    span: Seconds | None = Field(_EIGHT_WEEKS, ge=1)
    """How much telemetry becomes windows [s, or 56d]: the last so many whole steps, and the entities that
    there is telemetry of in them; all of it if None."""

    def resolve(self, derived: dict[str, Any]) -> ShardOptions:
        """What is given, else `derived`, else the defaults here."""
        return super().resolve({"span": _EIGHT_WEEKS} | derived)


class NightlyOptions(Options):
    """The options of every stage."""

    ingest: IngestOptions = IngestOptions()
    """From raw rows to telemetry and dependencies."""
    tabular: TabularOptions | None = None
    """A table of any origin instead of raw files, with the names of its columns."""
    shard: NightlyShardOptions = NightlyShardOptions()
    """From telemetry to windows."""
    train: TrainOptions = TrainOptions()
    """From windows to a model."""
    forecast: ForecastOptions = ForecastOptions()
    """From the model to forecasts."""
    levels: tuple[Literal["machine", "container", "service"], ...] = ()
    """Several levels in one night, each with windows, a model and forecasts of its own below `levels/`, in
    place of --shard.level. Containers with services or machines are compared and reconciled."""
    hierarchy: LevelOptions = LevelOptions()
    """How levels are compared."""
    retrain: Seconds = Field(0, ge=0)
    """The selected model forecasts until the telemetry has grown by so much since its own [s, or 7d], if it
    fits the windows; 0 trains whenever the windows have changed."""

    @model_validator(mode="after")
    def _one_dataset(self) -> NightlyOptions:
        """All stages work on the dataset that `shard` builds."""
        if self.tabular is None:  # a table's windows are only known once it is read
            self.shard.resolve({})
        name = self.shard.windows
        if len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels {', '.join(self.levels)}: expected each once")
        if self.levels and (name != "default" or "level" in self.shard.model_fields_set):
            raise ValueError("with levels, expected neither shard.windows nor shard.level")
        for stage in (self.train, self.forecast):
            if stage.windows not in ("default", name):
                raise ValueError(
                    f"windows {stage.windows!r} differ from those of shard, {name!r}; give only shard.windows"
                )
        return self

    def of_dataset(self) -> tuple[TrainOptions, ForecastOptions]:
        """The options of training and forecasting on the dataset that `shard` builds."""
        name = {"windows": self.shard.windows}
        return self.train.model_copy(update=name), self.forecast.model_copy(update=name)


@dataclass
class _Stages:
    """Runs stages one after the other and remembers what each took."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(
        self, name: str, stage: Callable[[], dict[str, Any]], note: Callable[[dict[str, Any]], str]
    ) -> None:
        log.info("— %s", name)
        started, peak = time.monotonic(), PeakMemory()
        figures = stage()
        skipped = bool(figures.pop("skipped", False))
        of_tasks = int(figures.pop("peak_bytes", 0) or 0)  # in a skipped stage that of an earlier run
        largest = max(0 if skipped else of_tasks, peak.bytes())
        self.figures[name] = figures
        self.rows.append(
            {
                "stage": name,
                "status": "skipped" if skipped else "done",
                "seconds": round(time.monotonic() - started, 1),
                "peak_mb": round(largest / 2**20),
                "note": note(figures),
            }
        )

    def told(self) -> dict[str, dict[str, Any]]:
        """Stage → how it went."""
        return {
            row["stage"]: {name: row[name] for name in ("status", "seconds", "note")} for row in self.rows
        }


def nightly(store: Store, source: str | None, options: NightlyOptions) -> dict[str, Any]:
    """Runs all stages on a source, or on the table of the options if there is none; writes the report, prints
    the summary, and returns the run's figures.

    If training fails but an earlier model is selected, that one forecasts, and then the failure is raised: a
    forecast is out, but the result is not whole.
    """
    stages = _Stages()
    stages.run("ingest", lambda: load(store, source, options.ingest, options.tabular), _read)
    if options.levels:
        return _every_level(store, stages, options)
    figures, failure = _level(store, stages, options)
    if failure is not None:
        raise failure
    return figures


def _every_level(store: Store, ingested: _Stages, options: NightlyOptions) -> dict[str, Any]:
    """All stages of each level in its own store, all to the same end; then what they say of each other."""
    telemetry = store.read_json(f"telemetry/{MANIFEST}")
    kinds = {SOURCE_KIND[level] for level in options.levels} & set(telemetry["spans"])
    ends = [telemetry["spans"][kind]["last"] + telemetry["settings"]["step"] for kind in kinds]
    whole = windows_of(options.shard, options.tabular, telemetry).step
    until = min(ends, default=0) // whole * whole or None
    figures, failures = dict[str, dict[str, Any]](), list[Exception]()
    for level in options.levels:
        log.info("— level %s", level)
        only = {} if level == "container" else {"renamed": None}
        shard_options = options.shard.model_copy(update={"level": level, "until": until, **only})
        stages = _Stages(list(ingested.rows), dict(ingested.figures))
        of_level = store.level(level).open_or_create()
        figures[level], failure = _level(
            of_level, stages, options.model_copy(update={"shard": shard_options})
        )
        if failure is not None:
            failures.append(failure)
    together: dict[str, Any] = {}
    if "container" in options.levels and len(options.levels) > 1:
        stages = _Stages()
        stages.run(
            "levels",
            lambda: compare_levels(store, options.levels, options.hierarchy),
            lambda found: "; ".join(found["verdicts"]),
        )
        together = {"comparison": stages.figures["levels"], "stages": stages.told()}
        print(
            "\n".join(
                [*stages.figures["levels"]["verdicts"], f"Report: {stages.figures['levels']['report']}"]
            )
        )
    if failures:
        raise failures[0]
    return {"levels": figures, **together}


def _level(store: Store, stages: _Stages, options: NightlyOptions) -> tuple[dict[str, Any], Exception | None]:
    """From telemetry to the published forecast and its report; and why training failed, if it did."""
    train_options, forecast_options = options.of_dataset()
    stages.run(
        "shard",
        lambda: shard(
            store, windows_of(options.shard, options.tabular, store.read_json(f"telemetry/{MANIFEST}"))
        ),
        lambda f: f"{f['entities']} entities, {f['shards']} shards",
    )
    failure: Exception | None = None
    told: str | None = None
    try:
        stages.run(
            "train",
            lambda: _kept(store, options) or train_model(store, train_options),
            lambda f: f.get("kept") or f"{f['epochs']} epochs",
        )
    except Exception as error:
        if not store.exists(SELECTED):
            raise
        failure, told = error, in_one_line(error)
        log.error("training failed; the model selected before forecasts", exc_info=told is None)
    stages.run("forecast", lambda: forecast(store, forecast_options), lambda f: f"{f['rows']:,} rows")
    page = write_report(store, options.shard.windows, stages)
    if failure is not None:
        whose = InputError if told else RuntimeError
        wrong = whose(f"training failed ({told or failure}); the forecast is of the model selected before")
        wrong.__cause__ = failure
        return {}, wrong
    return {
        "forecast": stages.figures["forecast"]["forecast"],
        "report": page,
        "stages": stages.told(),
        **{name: stages.figures["ingest"][name] for name in ("rows_read", "rows_rejected", "values_nulled")},
        **({"clocks": off} if (off := stages.figures["ingest"].get("clocks")) else {}),
        "windows": stages.figures["shard"]["windows"],
        **{name: stages.figures["forecast"][name] for name in ("entities", "gone", "cold_starts")},
        **{name: stages.figures["train"][name] for name in ("test_error", "coverage")},
    }, None


def _read(figures: dict[str, Any]) -> str:
    """What ingest read, and clocks that it did not believe."""
    off = [
        f"{one['column']} of {one['file']} is off by {one['offset']:+,} s"
        for one in figures.get("clocks", ())
    ]
    more = f", and {len(off) - _CLOCKS} more" if len(off) > _CLOCKS else ""
    return "; ".join([f"{sum(figures['rows_read'].values()):,} rows", *off[:_CLOCKS]]) + more


def _kept(store: Store, options: NightlyOptions) -> dict[str, Any] | None:
    """The figures of the selected model and why it is `kept`, or None if another has to be trained."""
    if not options.retrain or not store.exists(SELECTED):
        return None
    data, selected = manifests.load(store, options.shard.windows), read_selected(store)
    try:
        selected.check(data)
    except InputError as error:
        log.info("train: %s", error)
        return None
    end = selected.manifest.get("end")
    if end is None:
        log.info("train: %s does not say until when it has seen telemetry", selected.folder)
        return None
    age = data.start + data.step * data.steps - end
    if age >= options.retrain:
        log.info("train: %s has seen telemetry until %s before", selected.folder, duration(age))
        return None
    reason = f"{selected.folder} is kept: {duration(age)} old, below --retrain {duration(options.retrain)}"
    log.info("train: %s", reason)
    summary = store.read_json(f"{selected.folder}/metrics.json")["summary"]
    return {**summary, "model": selected.folder, "selected": selected.rung, "kept": reason, "skipped": True}


def write_report(store: Store, windows: str, stages: _Stages) -> str:
    """Renders the report of the forecast that was just published; prints its tables; returns its place."""
    folder = stages.figures["forecast"]["forecast"]
    report = build_report(store, manifests.load(store, windows), folder, stages)
    page = f"reports/{folder.split('/')[1]}/index.html"
    with store.write(page) as file:
        file.write(render(report).encode())
    ladder = ladder_table(report.ladder, report.metrics, report.mase_scale)
    shown = ["metric", "rung", "mae", "rmse", "scaled_mae", "coverage_50", "coverage_80", "coverage_90"]
    tables = [
        pl.DataFrame(
            [
                (label, f"{value:,}" if isinstance(value, int) else str(value))
                for label, value in report.summary
            ],
            schema=["figure", "value"],
            orient="row",
        ),
        report.rejected,
        ladder.select(shown),
        report.stages,
    ]
    for table in tables:
        if len(table):
            print(text_table(table), end="\n\n")
    place = f"{store.uri}/{page}"
    print(f"Report: {place}")
    return place


def build_report(store: Store, data: Manifest, folder: str, stages: _Stages) -> NightlyReport:
    """The report's frames from the published forecast, the served model and the stages' figures."""
    published = store.read_json(f"{folder}/{MANIFEST}")
    overview = store.read_json(f"{folder}/{OVERVIEW}")
    selected = read_selected(store)
    scores = store.read_json(f"{selected.folder}/scores.json")
    read = stages.figures["ingest"]
    fallbacks = published["figures"]["fallbacks"]
    issued = datetime.fromtimestamp(data.start + data.step * data.steps, UTC)
    rejected = [
        (table, reason, rows)
        for table, reasons in read["rows_rejected"].items()
        for reason, rows in reasons.items()
    ]
    nulled = sum(count for columns in read["values_nulled"].values() for count in columns.values())
    return NightlyReport(
        issued=issued,
        store=store.uri,
        model=selected.name,
        entities=published["figures"]["entities"],
        horizon=data.horizon,
        step=data.step,
        marks=_marks(data),
        metrics=data.metrics,
        normalised=data.normalised,
        ladder=[(rung, Scores.from_json(state)) for rung, state in scores.items()],
        mase_scale=np.asarray(selected.manifest["seasonal_error"]),
        summary=[
            ("rows read", sum(read["rows_read"].values())),
            ("rows rejected", sum(row[2] for row in rejected)),
            ("values made null", nulled),
            ("entities", published["figures"]["entities"]),
            ("entities that are gone, not forecast", published["figures"]["gone"]),
            ("entities that have just begun, by their kin", published["figures"]["cold_starts"]),
            ("steps", data.steps),
            *((f"{part} windows", data.windows(part)) for part in manifests.PARTS),
            ("forecast rows", published["figures"]["rows"]),
            ("entities with the naive forecast", sum(fallbacks.values())),
        ],
        stages=pl.DataFrame(stages.rows),
        rejected=pl.DataFrame(rejected, ["table", "reason", "rows"], orient="row"),
        fallbacks=pl.DataFrame(list(fallbacks.items()), ["reason", "entities"], orient="row"),
        total_history=_history(data, [({"metric": m}, part) for m, part in overview["total"].items()]),
        total_forecast=_forecast(data, [({"metric": m}, part) for m, part in overview["total"].items()]),
        peaks=pl.DataFrame(
            [
                {
                    **{key: peak[key] for key in ("entity", "metric", "mean", "q95")},
                    "time": _time(data, data.steps + peak["step"]),
                }
                for peak in overview["peaks"]
            ]
        ),
        entity_history=_history(data, [(_key(peak), peak) for peak in overview["peaks"]]),
        entity_forecast=_forecast(data, [(_key(peak), peak) for peak in overview["peaks"]]),
        total_note=published["total"],
        graph=last_graph(store, data, dependencies.MOST),
    )


def _key(peak: dict[str, Any]) -> dict[str, str]:
    return {"entity": peak["entity"], "metric": peak["metric"]}


def _time(data: Manifest, step: int) -> datetime:
    return datetime.fromtimestamp(data.start, UTC) + timedelta(seconds=data.step * step)


def _marks(data: Manifest) -> list[tuple[str, datetime, datetime]]:
    """Holidays and events from three horizons before the forecast to its end."""
    first, last = (data.start + data.step * (data.steps + n * data.horizon) for n in (-3, 1))
    found = data.calendar.within(first, last)
    return [(name, datetime.fromtimestamp(a, UTC), datetime.fromtimestamp(b, UTC)) for name, a, b in found]


def _history(data: Manifest, series: list[tuple[dict[str, str], dict[str, Any]]]) -> pl.DataFrame:
    """One row for each key and step before the origin."""
    frames = []
    for key, part in series:
        values = part["history"]
        times = [_time(data, data.steps - len(values) + i) for i in range(len(values))]
        value = pl.Series("value", values, pl.Float64)
        frames.append(
            pl.DataFrame({"time": times}).with_columns(value, **{k: pl.lit(v) for k, v in key.items()})
        )
    return pl.concat(frames)


def _forecast(data: Manifest, series: list[tuple[dict[str, str], dict[str, Any]]]) -> pl.DataFrame:
    """One row for each key and step from the origin on."""
    times = [_time(data, data.steps + h) for h in range(data.horizon)]
    frames = [
        pl.DataFrame({"time": times, **part["forecast"]}).with_columns(
            **{k: pl.lit(v) for k, v in key.items()}
        )
        for key, part in series
    ]
    return pl.concat(frames)

"""A night on a table of any origin: from its files and a mapping of their columns to a published forecast."""

from __future__ import annotations

import runpy
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fleetcast.config import parse
from fleetcast.errors import InputError
from fleetcast.forecasting.nightly import NightlyOptions, _read, nightly
from fleetcast.store import Store
from fleetcast.windows import manifest

JOBS = Path(__file__).parents[2] / "jobs"
START = np.datetime64("2024-01-01", "ms")
#: Minutes of a day's file, and what a night has at most.
MINUTES = 240


def write_day(folder: Path, day: int) -> None:
    """A file of two services' load in percent, which the second has from the first five minutes later."""
    at = START + 60_000 * (MINUTES * day + np.arange(MINUTES))
    web = 50 + 30 * np.sin(np.arange(MINUTES) / 10)
    rows = {"when": np.tile(at, 2), "name": ["web"] * MINUTES + ["db"] * MINUTES}
    load = np.concatenate([web, np.roll(web, 5)])
    pl.DataFrame({**rows, "load (%)": load}).write_csv(folder / f"day-{day}.csv")


def test_the_report_names_clocks_that_are_off() -> None:
    off = {"column": "TimeStamp", "used": "Time"}
    clocks = [{**off, "file": f"{n}.csv", "offset": 200_000_000} for n in range(5)]
    assert _read({"rows_read": {"table": 1000}}) == "1,000 rows"
    assert _read({"rows_read": {"table": 1000}, "clocks": clocks[:1]}) == (
        "1,000 rows; TimeStamp of 0.csv is off by +200,000,000 s"
    )
    assert _read({"rows_read": {"table": 1000}, "clocks": clocks}).endswith(
        "2.csv is off by +200,000,000 s, and 2 more"
    )


def options(folder: Path) -> NightlyOptions:
    """Nothing is said of level, metrics, step, look-back and horizon."""
    return NightlyOptions.model_validate(
        {
            "tabular": {
                "table": str(folder / "day-*.csv"),
                "entity": "name",
                "time": "when",
                "metrics": {"cpu": {"column": "load (%)", "unit": "percent"}},
                "edges": str(folder / "calls.csv"),
            },
            "shard": {"lags": []},
            "retrain": "7d",
            "train": {"epochs": 1, "batch_size": 8, "steps_per_epoch": 5, "stgnn": {"hidden": 4}},
        }
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_files_and_a_mapping_become_a_forecast_and_a_further_file_the_next(
    tmp_path: Path,
) -> None:
    write_day(tmp_path, 0)
    (tmp_path / "calls.csv").write_text("source,target\nweb,db\n")
    store = Store(str(tmp_path / "store"))
    figures = nightly(store, None, options(tmp_path))
    assert figures["rows_read"] == {"table": 2 * MINUTES, "edges": 1}
    made = manifest.load(store, "default")
    assert (made.level, made.names, made.metrics, made.step) == ("service", ("db", "web"), ("cpu",), 60)
    assert (made.history, made.horizon) == (12, 12), "as many steps as suit a table of this length"
    rows = pl.read_parquet(f"{store.root}/{figures['forecast']}/*.parquet")
    assert sorted(rows["time"].unique().dt.epoch("s") - START.astype(int) // 1000) == [
        60 * (MINUTES + step) for step in range(12)
    ]
    assert rows["mean"].is_between(0, 1).all(), "percents are fractions"
    page = store.read_bytes(f"reports/{figures['forecast'].split('/')[1]}/index.html").decode()
    assert "Who depends on whom" in page
    assert "web" in page

    write_day(tmp_path, 1)
    later = nightly(store, None, options(tmp_path))
    assert later["stages"]["train"]["status"] == "skipped", "its model is kept"
    assert later["rows_read"]["table"] == 4 * MINUTES
    assert later["forecast"] > figures["forecast"]


@pytest.mark.parametrize("job", ["nightly", "ingest"])
@pytest.mark.parametrize(
    "given", [[], ["--source", "raw", "--tabular.table", "t.csv", "--tabular.metrics", "cpu"]]
)
def test_a_job_takes_a_source_or_a_table(job: str, given: list[str]) -> None:
    config: Any = runpy.run_path(str(JOBS / f"{job}.py"))["Config"]
    with pytest.raises(InputError, match=r"expected exactly one of --source and --tabular\.table"):
        parse(config, ["--store", "s", *given])


def test_the_mapping_in_the_readme_is_one(tmp_path: Path) -> None:
    readme = (JOBS.parent / "README.md").read_text()
    mapping = readme[readme.index("    tabular:\n") :].split("\n\n")[0]
    (tmp_path / "table.yaml").write_text(textwrap.dedent(mapping))
    for job in ("nightly", "backtest"):
        config: Any = runpy.run_path(str(JOBS / f"{job}.py"))["Config"]
        made = parse(config, ["--store", "s", "--config", str(tmp_path / "table.yaml")])
        assert made.tabular.names == ("cpu", "request_rate", "latency")
        assert made.tabular.labels == {"service"}
        assert made.shard.resolve({}).horizon == 3600


@pytest.mark.parametrize("example", ["online-boutique-24h", "online-boutique-nezha"])
def test_the_mappings_among_the_examples_are_of_the_nightly_job(example: str) -> None:
    config: Any = runpy.run_path(str(JOBS / "nightly.py"))["Config"]
    file = str(JOBS.parent / "examples" / f"{example}.yaml")
    made = parse(config, ["--store", "s", "--config", file, "--tabular.table", "t.csv"])
    assert made.tabular.table == "t.csv"
    assert made.shard.resolve({}).windows == example

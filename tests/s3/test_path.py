"""The whole path of the data on S3: from raw files to the server, to the bit as on a local disk."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fleetcast.config import S3Options
from fleetcast.errors import InputError, in_one_line
from fleetcast.forecasting.nightly import NightlyOptions, nightly
from fleetcast.ingest import run as ingesting
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.shards import shard
from fleetcast.ingest.synthesize import synthesize
from fleetcast.models.stgnn import StgnnConfig
from fleetcast.serving.local import Local
from fleetcast.serving.options import ServeOptions
from fleetcast.store import MANIFEST, Store
from fleetcast.traces.mapping import TabularOptions
from fleetcast.traces.synthesis import SynthesizeOptions
from fleetcast.traces.tabular import load
from fleetcast.training.options import TrainOptions
from fleetcast.training.run import train_model
from fleetcast.tuning.options import TuneOptions
from fleetcast.tuning.run import tune
from object_store import BUCKET, serve
from proxy import Fault

pytestmark = pytest.mark.usefixtures("ray_cluster")

JOBS = Path(__file__).parents[2] / "jobs"
TRACE = SynthesizeOptions(machines=4, days=4, seed=1)
NIGHT = NightlyOptions.model_validate(
    {
        "shard": {
            "step": "1h",
            "history": "4h",
            "horizon": "4h",
            "group_size": 2,
            "metrics": ("cpu", "memory"),
            "lags": ["1d"],
        },
        "train": {"epochs": 2, "batch_size": 4, "steps_per_epoch": 5, "stgnn": {"hidden": 4}},
    }
)


#: What jobs hand on to each other and to people.
NOUNS = ("telemetry", "entities", "dependencies", "rejected", "windows", "models", "forecasts")


def parts(store: Store) -> dict[str, bytes]:
    """All that is data: tables and weights, without what says when and where they were made."""
    names = [name for noun in NOUNS for name in store.list(noun)]
    return {n: store.read_bytes(n) for n in names if n.endswith((".parquet", ".safetensors"))}


@pytest.fixture(scope="module")
def nights(
    ray_cluster: None, use_s3: Callable[..., S3Options], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Store]:
    """The stores of a night on S3, raw files and all, and of the same night on a local disk."""
    folder = tmp_path_factory.mktemp("night")
    found = []
    for root in (f"s3://{BUCKET}/{folder.name}", str(folder)):
        synthesize(TRACE, Store(f"{root}/raw"))
        store = Store(f"{root}/store")
        nightly(store, f"{root}/raw", NIGHT)
        found.append(store)
    return found[0], found[1]


def test_a_night_on_s3_is_the_same_to_the_bit(nights):
    there, here = (parts(store) for store in nights)
    assert there.keys() == here.keys()
    assert {name.split("/")[0] for name in there} == set(NOUNS)
    assert [name for name in there if there[name] != here[name]] == []


def test_a_second_night_on_s3_has_nothing_to_do_and_leaves_nothing_behind(nights):
    there = nights[0]
    raw = there.uri.replace("/store", "/raw")
    assert {stage["status"] for stage in nightly(there, raw, NIGHT)["stages"].values()} == {"skipped"}
    assert there.list("_work") == []


def test_a_long_lived_server_sees_a_newer_forecast_and_another_model(nights, use_s3):
    there = nights[0]
    service = Local(ServeOptions(store=there.uri, clock="trace", s3=use_s3()))
    assert service.snapshot is not None, service.reason
    assert service.models.live is not None, service.models.reason
    first = service.snapshot.folder
    later = "forecasts/issued=20300101T000000Z"
    manifest = there.read_json(f"{first}/{MANIFEST}")
    for name in sorted(there.list(first), key=lambda name: name.endswith(MANIFEST)):
        with there.write(name.replace(first, later)) as file:
            file.write(there.read_bytes(name))
    selected = there.read_json("models/selected.json")
    other = "last value" if selected["rung"] != "last value" else "stgnn"
    there.write_json("models/selected.json", {**selected, "rung": other})
    service.refresh()
    assert service.snapshot.folder == later, service.reason
    assert service.snapshot.manifest == manifest
    assert service.models.live.selected.rung == other
    there.remove(later)
    there.write_json("models/selected.json", selected)


def test_windows_that_have_lost_a_shard_are_named_and_built_again(nights):
    there = nights[0]
    before = parts(there)
    lost = next(name for name in before if name.startswith("windows/"))
    there.remove(lost)
    options = NIGHT.train.model_copy(update={"seed": 7, "epochs": 1, "max_failures": 0})
    with pytest.raises(Exception) as failure:
        train_model(there, options)
    told = in_one_line(failure.value)
    assert told is not None
    assert lost in told
    assert "\n" not in told
    assert not shard(there, NIGHT.shard)["skipped"]
    assert parts(there) == before


def test_a_part_or_a_day_that_is_lost_is_made_again_from_the_raw_file(nights, use_s3):
    there = nights[0]
    raw = there.uri.replace("/store", "/raw")
    before = parts(there)
    for folder in ("telemetry/", "ingested/parts/machine/"):
        there.remove(next(name for name in there.list(folder) if "manifest" not in name))
        if folder != "telemetry/":
            there.remove("telemetry")  # so that the part is needed again
        assert not ingesting.ingest(there, raw, NIGHT.ingest)["skipped"]
        assert parts(there) == before


def test_a_raw_file_that_vanishes_after_it_was_found_is_named(bucket, monkeypatch):
    raw, store = Store(f"{bucket}/raw"), Store(f"{bucket}/store")
    synthesize(TRACE, raw)
    lost = next(name for name in raw.list("") if name.startswith("machine_usage"))
    discover = ingesting.discover

    def found_and_lost(*arguments: Any) -> Any:
        found = discover(*arguments)
        raw.remove(lost)
        return found

    monkeypatch.setattr(ingesting, "discover", found_and_lost)
    with pytest.raises(InputError, match=rf"^{raw.uri}/{lost}: the file vanished while it was read$"):
        ingesting.ingest(store, raw.uri, IngestOptions())
    monkeypatch.undo()
    synthesize(TRACE, raw)
    assert ingesting.ingest(store, raw.uri, IngestOptions())["rows_read"]["machine_usage"]


def test_a_full_server_publishes_nothing_and_with_more_room_ingest_goes_on(use_s3, tmp_path):
    raw = Store(str(tmp_path / "raw"))
    synthesize(TRACE, raw)
    few = ("-volume.max=3", "-master.volumeSizeLimitMB=1")
    with serve(tmp_path / "server", *few) as place:
        use_s3(endpoint_url=place.endpoint, profile="fleet", attempts=2)
        store = Store(f"s3://{BUCKET}/store").open_or_create()
        with pytest.raises(OSError, match="InternalError") as failure:
            for number in range(100):
                with store.write(f"_work/filling/{number}") as file:
                    file.write(np.random.default_rng(number).bytes(1 << 20))
        assert failure.value.filename == f"{store.uri}/_work/filling/{number}"
        with pytest.raises((InputError, OSError)) as failure:
            ingesting.ingest(store, raw.uri, NIGHT.ingest)
        told = in_one_line(failure.value)
        assert told is not None
        assert f"{store.uri}/" in told
        assert "\n" not in told
        assert not store.exists(f"telemetry/{MANIFEST}")
        assert store.read_json("store.json"), "what is there can be read"
    with serve(tmp_path / "server") as place:
        use_s3(endpoint_url=place.endpoint, profile="fleet")
        store = Store(store.uri)
        there, here = store, Store(str(tmp_path / "here"))
        for one in (there, here):
            assert not ingesting.ingest(one, raw.uri, NIGHT.ingest)["skipped"]
        assert parts(there) == parts(here)
    use_s3()


@pytest.mark.slow
def test_training_that_lost_its_store_goes_on_from_its_checkpoint_to_the_same_weights(
    faulty, bucket, dataset
):
    random = np.random.default_rng(4)
    cycle = np.sin(2 * np.pi * np.arange(220) / 96)[:, None, None]
    values = (0.5 + 0.2 * cycle + 0.05 * random.normal(size=(220, 3, 2))).astype(np.float32)
    here, _ = dataset(values, groups=[["e0", "e1"], ["e2"]], history=8, lags=(96,))
    there = Store(f"{bucket}/store")
    there.fs.put(f"{here.root}/", f"{there.root}/", recursive=True)
    options = TrainOptions(
        windows="test",
        epochs=3,
        patience=3,
        batch_size=8,
        steps_per_epoch=4,
        stgnn=StgnnConfig(hidden=4),
        max_failures=0,
    )
    # The checkpoint of the first epoch is kept; of those that follow the server takes none.
    full = Fault("error", 10**6, "PUT", "tensors.safetensors", 500, "InternalError", passes=1)
    faulty.add(full)
    with pytest.raises(Exception) as failure:
        train_model(there, options)
    told = in_one_line(failure.value)
    assert told is not None
    assert "tensors.safetensors: InternalError" in told
    assert "\n" not in told
    full.times = 0
    before = len(faulty.requests)
    again = train_model(there, options)["model"]
    restored = [one for one in faulty.requests[before:] if "checkpoint" in one.path and one.method == "GET"]
    assert restored, "it goes on from what the first run has left"
    undisturbed = train_model(here, options)["model"]
    assert again == undisturbed
    weights = f"{again}/weights.safetensors"
    assert there.read_bytes(weights) == here.read_bytes(weights)


@pytest.mark.slow
def test_a_study_on_s3_finds_what_it_finds_on_a_local_disk(bucket, tmp_path):
    hours = np.arange(240)
    random = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "when": np.datetime64("2024-01-01", "ms") + hours * np.timedelta64(3600, "s"),
            "host": ["h0"] * 240,
            "cpu": 0.4 + 0.2 * np.sin(2 * np.pi * hours / 24) + 0.05 * random.normal(size=240),
        }
    )
    found = []
    for root in (bucket, str(tmp_path)):
        with Store(root).write("load.parquet") as file:
            table.write_parquet(file)
        options = TuneOptions(
            tabular={"table": f"{root}/load.parquet", "entity": "host", "time": "when", "metrics": ("cpu",)},
            fit={"epochs": 1, "steps_per_epoch": 2, "batch_size": 8},
            seeds=1,
            options={"fusion": {"hidden": 8, "direct": 8}},
            grid="heads",
            points=(1, 4),
        )
        store = Store(f"{root}/store")
        figures = tune(store, options)
        assert (figures["trials"], figures["stopped"]) == (2, {})
        assert store.list("backtests/_work") == []
        found.append([study["values"] for study in store.read_json("tuning/default/studies.json")])
    assert found[0] == found[1]


@pytest.mark.parametrize("given", ["days", "days/*.csv", "days/2.csv"])
def test_a_folder_or_pattern_of_tables_on_s3_is_the_same(bucket, tmp_path, given):
    found = []
    for root in (bucket, str(tmp_path)):
        for day in (1, 2):
            with Store(root).write(f"days/{day}.csv") as file:
                file.write(f"at,load\n2024-01-0{day},{day}\n2024-01-0{day} 01:00,{day}\n".encode())
        names = r"(?P<entity>\d)\.csv"
        options = TabularOptions(table=f"{root}/{given}", file_name=names, time="at", metrics="load")
        store = Store(f"{root}/store")
        first = load(store, options)
        assert load(store, options)["skipped"]
        found.append((first, parts(store)))
    assert found[0] == found[1]
    assert found[0][0]["files"] == (1 if "2" in given else 2)


ARGUMENTS = {
    "ingest": ["--source", "{root}/raw"],
    "synthesize": ["--machines", "2", "--days", "1"],
    "nightly": ["--source", "{root}/raw"],
    "backtest": [],
    "control": ["--what-if"],
    "tune": ["--grid", "heads", "--windows", "default"],
    **{name: [] for name in ("shard", "train", "forecast", "promote")},
}


@pytest.mark.parametrize("job", sorted(path.stem for path in JOBS.glob("*.py")))
@pytest.mark.parametrize("profile", ["forger", "reader"])
def test_every_job_ends_in_one_line_where_its_keys_are_not_enough(
    job, profile, bucket, use_s3, monkeypatch, capsys
):
    Store(bucket).open_or_create()
    options = use_s3(profile=profile)
    place = "--out" if job == "synthesize" else "--store"
    given = [one.format(root=bucket) for one in ARGUMENTS[job]]
    s3 = ["--s3.endpoint-url", options.endpoint_url, "--s3.profile", profile, "--s3.region", "us-east-1"]
    monkeypatch.setattr(sys, "argv", [f"{job}.py", place, f"{bucket}/none", *given, *s3])
    # What inspect remembers of `__main__` would be wrong for whoever loads the job under another name.
    monkeypatch.setattr(inspect, "modulesbyfile", {})
    monkeypatch.setattr(inspect, "_filesbymodname", {})
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert end.value.code == 1
    error = json.loads(shown.out.splitlines()[-1])["error"]
    assert "Traceback" not in shown.err
    assert bucket in error
    assert "\n" not in error
    if profile == "forger":
        assert "expected keys that may do this" in error

"""The forecast job: entity groups as Ray Data tasks, then one atomic publication."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import reduce
from typing import Any

import pyarrow as pa

from fleetcast import memory
from fleetcast.errors import InputError
from fleetcast.forecasting import overview
from fleetcast.forecasting.predict import ForecastOptions, Selected, predict, rows
from fleetcast.ingest.make import make
from fleetcast.store import MANIFEST, Store, fingerprint
from fleetcast.training.register import SELECTED
from fleetcast.windows import manifest as manifests
from fleetcast.windows.manifest import Manifest, Shard

log = logging.getLogger("fleetcast")

OVERVIEW = "overview.json"
#: Most files of a forecast; of more groups than that, several share a file.
_MOST_FILES = 256


def forecast(store: Store, options: ForecastOptions) -> dict[str, Any]:
    """Forecasts every entity from the end of the telemetry and publishes `forecasts/issued=…`.

    A forecast is a function of the windows, the selected model and the options: where that one is published
    already, nothing is done. Raises InputError if no model is selected, or it does not fit the windows.
    """
    store.open_existing()
    data = manifests.load(store, options.windows)
    selected = read_selected(store)
    selected.check(data)
    issued, folder = _issued(data), folder_of(data)
    digest = fingerprint(
        [data.fingerprint, selected.folder, selected.rung, selected.naive, options.model_dump(mode="json")]
    )
    published = store.read_json(f"{folder}/{MANIFEST}")
    if published is not None and published["fingerprint"] == digest:
        log.info("forecast: %s is published", folder)
        return {**published["figures"], "forecast": folder, "skipped": True}

    work = f"_work/forecasts/{digest}"
    shards = data.last_shards
    share = -(-len(shards) // _MOST_FILES)
    plan: dict[str, dict[str, Any]] = {
        f"{work}/rows/part-{first:05d}.parquet": {
            "shards": [shard.model_dump() for shard in shards[first : first + share]],
            "overview": f"{work}/overview/part-{first:05d}.json",
            "digest": digest,
        }
        for first in range(0, len(shards), share)
    }

    def work_on(item: dict[str, Any]) -> dict[str, Any]:
        tables, shares, fallbacks, gone, cold = [], [], Counter[str](), 0, 0
        for shard in item["shards"]:
            found = predict(store, data, Shard(**shard), selected, options)
            tables.append(rows(found, data, selected.rung, selected.naive))
            shares.append(overview.of_group(found, data))
            fallbacks.update(reason for reason in found.fallback if reason)
            gone += found.gone.shape[1]
            cold += sum(kind is not None for kind in found.cold)
        table = pa.concat_tables(tables).unify_dictionaries()
        store.write_json(item["overview"], reduce(overview.together, shares))
        store.write_table(item["target"], table)
        return {"rows": len(table), "fallbacks": dict(fallbacks), "gone": gone, "cold": cold}

    room = memory.windows(data, 1, data.last_shards)
    receipts = list(make(store, plan, work_on, f"{work}/receipts", "forecast: groups", room).values())
    shares = (store.read_json(item["overview"]) for item in plan.values())
    fallbacks: Counter[str] = Counter()
    for receipt in receipts:
        fallbacks.update(receipt["fallbacks"])
    figures = {
        "issued": f"{issued:%Y-%m-%dT%H:%M:%SZ}",
        "entities": data.entities - sum(receipt["gone"] for receipt in receipts),
        "gone": sum(receipt["gone"] for receipt in receipts),
        "cold_starts": sum(receipt["cold"] for receipt in receipts),
        "rows": sum(receipt["rows"] for receipt in receipts),
        "model": selected.rung,
        "fallbacks": dict(sorted(fallbacks.items())),
        "peak_bytes": max(receipt.get("peak_bytes", 0) for receipt in receipts),
    }
    _publish(store, work, folder, data, selected, digest, figures, shares)
    return {**figures, "forecast": folder, "skipped": False}


def _issued(data: Manifest) -> datetime:
    """When the telemetry ends."""
    return datetime.fromtimestamp(data.start + data.step * data.steps, UTC)


def folder_of(data: Manifest) -> str:
    """Where the forecast from the end of these windows is published."""
    return f"forecasts/issued={_issued(data):%Y%m%dT%H%M%SZ}"


def read_selected(store: Store) -> Selected:
    """The model that `models/selected.json` points at. Raises InputError if there is none."""
    found = store.read_json(SELECTED)
    if found is None:
        raise InputError(f"{store.uri}: no model is selected ({SELECTED} is missing); run train first")
    return Selected(store, found["model"], found["rung"], found["naive"], found["reason"])


def _publish(
    store: Store,
    work: str,
    folder: str,
    data: Manifest,
    selected: Selected,
    digest: str,
    figures: dict[str, Any],
    shares: Iterator[dict[str, Any]],
) -> None:
    """Everything into one folder that appears whole."""
    shifts = selected.calibration["total_shifts"][selected.rung]
    shown = overview.of_cluster(shares, data, shifts)
    store.write_json(f"{work}/rows/{OVERVIEW}", shown)
    store.write_json(
        f"{work}/rows/{MANIFEST}",
        {
            "fingerprint": digest,
            "figures": figures,
            "windows": data.name,
            "level": data.level,
            "metrics": list(data.metrics),
            "normalised": list(data.normalised),
            "step": data.step,
            "horizon": data.horizon,
            "model": selected.folder,
            "rung": selected.rung,
            "naive": selected.naive,
            "total": "The sum over entities of their means; its interval is as wide as the total's own "
            "errors on the validation part were large.",
        },
    )
    store.publish(f"{work}/rows", folder)
    store.remove(work)

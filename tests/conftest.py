"""Fixtures that the tests of several rooms share."""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before polars and Ray are imported: tests have few cores and want no noise. Keys of S3 are those of the
# server for tests, where Ray's processes find them too, and nobody's own.
os.environ |= {
    "AWS_SHARED_CREDENTIALS_FILE": f"{tempfile.gettempdir()}/fleetcast-keys-{os.getpid()}",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "POLARS_MAX_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}

import fsspec
import numpy as np
import polars as pl
import pytest
from fleetcast import schemas
from fleetcast.config import S3Options
from fleetcast.store import MANIFEST, Store
from fleetcast.store import use_s3 as reach
from fleetcast.traces.synthesis.prometheus import DAY, Cluster
from fleetcast.windows import build, manifest
from fleetcast.windows.manifest import Manifest, Scaler, Shard
from numpy.typing import NDArray
from object_store import BUCKET, ObjectStore, serve
from real_prometheus import backfill, running

#: Slices of an hour do not begin where the steps of a quarter of an hour do.
START = int(datetime(2018, 1, 1, 0, 15, tzinfo=UTC).timestamp())  # 1514765700
METRICS = ("cpu", "memory")

#: Unix time of the slice, source, target, weight; entity n is called `e<n>`.
Edge = tuple[int, str, str, float]


@pytest.fixture
def plan() -> Callable[..., Manifest]:
    """`plan(steps, …)` → the manifest of a dataset whose shards have `width` steps, without its files."""

    def make(
        steps: int,
        groups: Iterable[Iterable[str]] = (("e0", "e1"),),
        *,
        borders: Iterable[Iterable[str]] | None = None,
        width: int | None = None,
        history: int = 6,
        horizon: int = 4,
        lags: tuple[int, ...] = (4, 8),
        max_gap: int = 3,
        metrics: tuple[str, ...] = METRICS,
        split: tuple[float, float, float] = (0.6, 0.2, 0.2),
    ) -> Manifest:
        groups = tuple(tuple(group) for group in groups)
        borders = tuple(tuple(border) for border in borders or [()] * len(groups))
        halo = manifest.context(history, lags, max_gap)
        shards = tuple(
            Shard(
                path=f"windows/test/{group}-{low}.parquet",
                edges=f"windows/test/{group}-{low}-edges.parquet",
                group=group,
                start=low,
                stop=min(low + width, steps) + (low + width >= steps),
                first=max(0, low - halo),
                last=min(steps, low + width + horizon - 1),
            )
            for width in [width or steps]
            for group in range(len(groups))
            for low in range(0, steps, width)
        )
        return Manifest(
            name="test",
            level="machine",
            metrics=metrics,
            start=START,
            step=900,
            steps=steps,
            history=history,
            horizon=horizon,
            lags=lags,
            max_gap=max_gap,
            slice=3600,
            boundaries=manifest.boundaries(steps, split, history, horizon),
            groups=groups,
            borders=borders,
            scaler=Scaler(mean=(0,) * len(metrics), std=(1,) * len(metrics)),
            seasonal_error=(),
            observed=(),
            shards=shards,
            fingerprint="test",
        )

    return make


@pytest.fixture
def dataset(tmp_path, plan) -> Callable[..., tuple[Store, Manifest]]:
    """`dataset(values [T, N, F], edges, …)` → a store with this telemetry as windows, and their manifest.

    Missing values are NaN; entity n is `e<n>`; everything else is as in `plan`.
    """
    number = itertools.count()

    def make(
        values: NDArray[np.float32], edges: Iterable[Edge] = (), scale: str = "metric", **options
    ) -> tuple[Store, Manifest]:
        steps, entities, _ = values.shape
        options = {"groups": [[f"e{n}" for n in range(entities)]], **options}
        draft = plan(steps, **options)
        store = Store(str(tmp_path / f"store-{next(number)}")).open_or_create()
        store.write_table("telemetry.parquet", telemetry(values, draft).to_arrow())
        store.write_table("dependencies.parquet", dependencies(edges).to_arrow())

        grid = build.Grid.of(draft, schemas.DEPENDENCY_KINDS)
        units = pl.DataFrame({"entity": draft.names, "unit": draft.names})
        places = build.Places.of(draft, units)
        rows = build.split_telemetry(store, "telemetry.parquet", "rows.arrow", places, grid)["groups"]
        links = build.split_dependencies(store, "dependencies.parquet", "links.arrow", places, grid)["groups"]
        statistics = [
            build.build_shard(
                store,
                grid,
                shard,
                draft.groups[shard.group],
                draft.borders[shard.group],
                [build.RowGroup("rows.arrow", i) for i, group in enumerate(rows) if group == shard.group],
                [build.RowGroup("links.arrow", i) for i, group in enumerate(links) if group == shard.group],
                (shard.path, shard.edges),
            )
            for shard in draft.shards
        ]
        found = build.summarise(statistics, [shard.group for shard in draft.shards], scale == "entity")
        known = {"scaler": found.scaler, "seasonal_error": found.seasonal_error, "observed": found.observed}
        finished = draft.model_copy(update=known)
        store.write_json(f"windows/test/{MANIFEST}", finished.model_dump(mode="json"))
        return store, manifest.load(store, "test")

    return make


def telemetry(values: NDArray[np.float32], draft: Manifest) -> pl.DataFrame:
    """A row for each entity and step with anything observed, as ingest writes them."""
    steps, entities, _ = values.shape
    time = 1000 * (draft.start + draft.step * np.arange(steps))
    columns = {metric: values[:, :, f].ravel() for f, metric in enumerate(draft.metrics)}
    return (
        pl.DataFrame(
            {
                "entity": np.tile([f"e{n}" for n in range(entities)], steps),
                "time": np.repeat(time, entities),
                **columns,
            }
        )
        .with_columns(pl.col("time").cast(pl.Datetime("ms", "UTC")), pl.col(draft.metrics).fill_nan(None))
        .filter(~pl.all_horizontal(pl.col(draft.metrics).is_null()))
    )


def dependencies(edges: Iterable[Edge]) -> pl.DataFrame:
    """Edges as ingest writes them, all calls."""
    rows = [(1000 * time, source, target, "call", weight) for time, source, target, weight in edges]
    schema = {
        "time": pl.Datetime("ms", "UTC"),
        "source": pl.String,
        "target": pl.String,
        "kind": pl.String,
        "weight": pl.Float32,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """One S3 server for all tests that need it; each keeps to a prefix of its own."""
    with serve(tmp_path_factory.mktemp("s3")) as place:
        keys = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
        place.write_profiles(keys)
        yield place
        keys.unlink()


@pytest.fixture(scope="module")
def use_s3(object_store: ObjectStore) -> Iterator[Callable[..., S3Options]]:
    """`use_s3(endpoint_url=…, …)`: `s3://` is reached so from now on, without options the server with all
    rights. Returns the options."""
    with pytest.MonkeyPatch.context() as patch:

        def use(**options: Any) -> S3Options:
            patch.setitem(fsspec.config.conf, "s3", {})
            given = {"endpoint_url": object_store.endpoint, "region": "us-east-1", "profile": "fleet"}
            made = S3Options(**given | options)
            reach(made)
            return made

        use()
        yield use


@pytest.fixture
def on_s3(use_s3: Callable[..., S3Options]) -> Callable[[Store], Store]:
    """`on_s3(store)` → the files of a local store on the S3 server, under a prefix of their own."""
    use_s3()

    def copy(local: Store) -> Store:
        there = Store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
        for name in local.list(""):
            there.fs.put_file(local.path(name), there.path(name))
        return there

    return copy


@pytest.fixture(scope="session")
def scraped_cluster() -> Cluster:
    """Two days, of the last four, of a small Kubernetes cluster of a known load."""
    return Cluster(start=(int(time.time()) // DAY - 3) * DAY)


@pytest.fixture(scope="session")
def prometheus_server(scraped_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real Prometheus that has scraped it."""
    folder = tmp_path_factory.mktemp("prometheus")
    backfill(folder, scraped_cluster.openmetrics())
    with running(folder) as url:
        yield url


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for all tests that need it; jobs use the one that they find."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=500 << 20,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()

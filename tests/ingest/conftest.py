"""What the tests of ingest share: raw files, and jobs that run without Ray."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from fleetcast.ingest import archives, make, pull, run
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.store import Store

Figures = dict[str, Any]


class Tasks:
    """Stands in for `runtime.spread`: one after the other in this process; counts, and dies on demand."""

    def __init__(self) -> None:
        self.done = 0
        self.dies_after: int | None = None

    def __call__(
        self,
        items: list[Any],
        work: Callable[[Any], Figures],
        what: str,
        measure: str = "rows",
        memory: int = 0,
        most: int | None = None,
    ) -> list[Figures]:
        receipts = []
        for item in items:
            if self.done == self.dies_after:
                raise KeyboardInterrupt
            receipt = work(json.loads(json.dumps(item)))
            receipts.append(json.loads(json.dumps(receipt)) | {"peak_bytes": 1})
            self.done += 1
        return receipts


@pytest.fixture
def tasks(monkeypatch) -> Tasks:
    tasks = Tasks()
    monkeypatch.setattr(run, "spread", tasks)
    monkeypatch.setattr(make, "spread", tasks)
    monkeypatch.setattr(pull, "spread", tasks)
    monkeypatch.setattr(archives, "spread", tasks)
    monkeypatch.setattr(archives, "worker_logs", nullcontext)
    monkeypatch.setattr(archives, "log_to", lambda *_: SimpleNamespace(stop=lambda: None))
    return tasks


@pytest.fixture
def ingested(tasks) -> Callable[..., tuple[Store, Figures]]:
    """`ingested(source, store, option=…)` → the store and the job's figures, without Ray."""

    def work(source: Path, store: Path, **options: Any) -> tuple[Store, Figures]:
        made = Store(str(store))
        return made, ingest(made, str(source), IngestOptions(**options))

    return work


@pytest.fixture
def put() -> Callable[[Path, bytes], Path]:
    """Writes raw rows in the form that the file's name asks for."""

    def write(path: Path, rows: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name.endswith(".csv.gz"):
            rows = gzip.compress(rows)
        elif path.name.endswith(".tar.gz"):
            archive = io.BytesIO()
            with tarfile.open(fileobj=archive, mode="w:gz") as tar:
                member = tarfile.TarInfo("rows.csv")
                member.size = len(rows)
                tar.addfile(member, io.BytesIO(rows))
            rows = archive.getvalue()
        path.write_bytes(rows)
        return path

    return write


@pytest.fixture
def table() -> Callable[[Store, str], pl.DataFrame]:
    """`table(store, "telemetry")` → all rows of a folder, or of its files with a prefix, in one order."""

    def read(store: Store, folder: str) -> pl.DataFrame:
        files = [path for path in store.list(folder.split("/")[0], ".parquet") if folder in path]
        frame: Any = pl.concat([pl.from_arrow(store.read_table(path)) for path in files])
        plain = frame.with_columns(pl.col(pl.Categorical).cast(pl.String))
        return plain.sort(plain.columns)

    return read

"""Backtests that run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from fleetcast.errors import InputError
from fleetcast.evaluation.ladder_report import render
from fleetcast.runtime import Failed
from fleetcast.training.loop import DivergedError


class InProcess:
    """Stands in for `runtime.tasks` and `runtime.spread`: item after item; counts, and dies on demand."""

    def __init__(self) -> None:
        self.done: list[str] = []
        """Names of the searches and trials that were run."""
        self.dies_after: int | None = None

    def tasks(
        self, items: list[Any], work: Callable[[Any], Any], what: str, name: Callable[[Any], str], *_: Any
    ) -> list[Any]:
        found: list[Any] = []
        for item in items:
            if what in ("search", "trial"):
                if len(self.done) == self.dies_after:
                    raise KeyboardInterrupt
                self.done.append(f"{what}: {name(item)}")
            try:
                found.append(work(item))
            except (DivergedError, InputError) as error:
                found.append(Failed(f"{type(error).__name__}: {error}"))
        return found

    def spread(
        self, items: list[Any], work: Callable[[Any], Any], what: str, measure: str = "rows", memory: int = 0
    ) -> list[dict[str, Any]]:
        sent = json.loads(json.dumps(items))
        return [{**json.loads(json.dumps(work(item))), "peak_bytes": 1, "seconds": 1} for item in sent]


@pytest.fixture(scope="module")
def in_process() -> Iterator[InProcess]:
    """The tasks of all backtests of a test module, without Ray."""
    instead = InProcess()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleetcast.backtesting.run.tasks", instead.tasks)
        for module in ("make", "run", "synthesize"):
            patch.setattr(f"fleetcast.ingest.{module}.spread", instead.spread)
        yield instead


@pytest.fixture
def tasks(in_process, monkeypatch) -> InProcess:
    """The same, with nothing counted yet, and reports without plots, which take most of the time."""
    monkeypatch.setattr("fleetcast.backtesting.run.render", partial(render, pictures=False))
    in_process.done.clear()
    in_process.dies_after = None
    return in_process

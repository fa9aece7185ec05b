"""What is served now: the newest forecast and the selected model of a store, taken up as they change.

A newer one is loaded beside the one that answers and replaces it in one step, so no request waits and none
sees half of each. One that cannot be used is refused, with the reason, and the old one stays.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleetcast.errors import InputError
from fleetcast.forecasting.run import read_selected
from fleetcast.serving.live import Answer, Asked, Live, Points
from fleetcast.serving.options import ServeOptions
from fleetcast.serving.snapshot import Snapshot, newest
from fleetcast.store import MANIFEST
from fleetcast.training.register import SELECTED

log = logging.getLogger("fleetcast")


class NotReady(Exception):
    """There is no valid forecast, or no model; the message says why."""


class Overloaded(Exception):
    """More live requests than may wait."""


@dataclass(frozen=True)
class Found:
    """A live answer, and what it is of."""

    answer: Answer
    metrics: tuple[str, ...]
    normalised: tuple[str, ...]
    """Those whose unit nobody knows."""
    step: int
    """Width of a step [s]."""
    model: str


class Forecasts:
    """The newest published forecast."""

    def __init__(self, options: ServeOptions) -> None:
        self.options, self.store = options, options.open()
        self.snapshot: Snapshot | None = None
        self.reason = "no forecast has been looked for yet"
        """Why there is no snapshot, or why a newer one was refused; empty if all is well."""
        self._seen: object = self  # nothing that a store could have

    def refresh(self) -> None:
        """Takes up the newest forecast if it is another than the one that answers."""
        try:
            folder = newest(self.store, "reconciled" if self.options.reconciled else "forecasts")
            mark = folder and (folder, self.store.read_json(f"{folder}/{MANIFEST}"))
            if mark == self._seen:
                return
            if folder is None:
                self.reason = f"{self.store.uri}: no forecast is published; run the nightly job"
                return
            found = Snapshot.load(self.store, folder)
            _ = found.overview, found.details, found.places  # before the first request
        except (InputError, OSError, KeyError, ValueError) as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.error("serve: the newest forecast is refused: %s", self.reason)
            return
        self._seen, self.snapshot, self.reason = mark, found, ""
        log.info("serve: %s, %d entities, %s", folder, len(found.entities), found.manifest["rung"])


class Models:
    """The selected model, and the state of all entities."""

    def __init__(self, options: ServeOptions) -> None:
        self.store, self.options = options.open(), options
        self.live: Live | None = None
        self.reason = "no model has been looked for yet"
        """Why there is no model, or why another one was refused; empty if all is well."""
        self._seen: object = self  # nothing that a store could have

    def refresh(self) -> None:
        """Takes up another selected model, or newer windows; what was sent since is kept."""
        try:
            selected = self.store.read_json(SELECTED)
            if selected is None:
                self.reason = f"{self.store.uri}: no model is selected; run train or promote"
                return
            windows = read_selected(self.store).manifest["windows"]
            made_of = self.store.read_json(f"windows/{windows}/{MANIFEST}") or {}
            mark = (selected, made_of.get("fingerprint"))
            if mark == self._seen:
                return
            found = Live.load(self.store, windows, self.options.unknown_entities)
        except (InputError, OSError, KeyError, ValueError) as error:
            self.reason = f"{type(error).__name__}: {error}"
            log.error("serve: the selected model is refused: %s", self.reason)
            return
        if self.live is not None:
            found.take_over(self.live)
        self._seen, self.live, self.reason = mark, found, ""
        log.info("serve: %s answers live requests", found.selected.rung)

    def forecast(self, asked: Sequence[Asked]) -> list[Found | InputError | NotReady]:
        """An answer, or what is wrong, for each request."""
        live = self.live
        if live is None:
            return [NotReady(self.reason)] * len(asked)
        about = (live.data.metrics, live.data.normalised, live.data.step, live.selected.rung)
        return [one if isinstance(one, InputError) else Found(one, *about) for one in live.forecast(asked)]

    def add(self, points: Sequence[Points]) -> tuple[int, dict[str, int]] | NotReady:
        """Keeps telemetry: how many values, and why others are not."""
        live = self.live
        return NotReady(self.reason) if live is None else live.add(points)


def watch(refresh: Callable[[], None], seconds: float) -> threading.Event:
    """Calls `refresh` every so many seconds in a thread, until the event that it returns is set."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(seconds):
            refresh()

    threading.Thread(target=look, name="refresh", daemon=True).start()
    return stop

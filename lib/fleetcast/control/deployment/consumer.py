"""Reads scrapes, decides, commits; goes on where it, or the one before it, stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from fleetcast.control.deployment.broker import FAILURES, Broker, Moved
from fleetcast.control.deployment.decider import Decider
from fleetcast.control.deployment.messages import Entry

log = logging.getLogger("fleetcast")

#: Messages that are read at once, and how long the first of them is waited for [s].
_AT_ONCE, _WAIT = 64, 0.5
#: Delays that are remembered.
_KEPT = 1000
#: How long it waits before it tries a broker again that has failed [s].
_AGAIN = 1.0


class Consumer:
    """One cluster's loop. Only one may commit at a time: another that does makes this one begin anew."""

    def __init__(self, broker: Broker, decider: Decider) -> None:
        self.broker, self.decider = broker, decider
        self.last: Entry | None = None
        """The newest action, also of the consumer before this one."""
        self.given = 0
        """Actions of this consumer."""
        self.delays: deque[float] = deque(maxlen=_KEPT)
        """From a message's arrival here to its commit [s]."""
        self.heard = 0.0
        """When the last message came [Unix s]; 0 before the first."""
        self.failure: str | None = None
        """Why nothing is read now, or None."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.rehydrate()

    def rehydrate(self) -> None:
        """Sees the last messages once more, up to the one that was last answered for."""
        self.offset = self.broker.offset()
        found = self.broker.before(self.offset, 2 * self.decider.memory)
        self.decider.replay([body for _, body in found])
        newest = self.broker.last_action()
        self.last = None if newest is None else Entry.model_validate_json(newest)
        log.info("control: goes on after %s, %d messages seen again", self.offset, len(found))

    def step(self, wait: float = _WAIT) -> int:
        """Answers for the messages that are there, or that come within `wait` seconds; returns how many."""
        messages = self.broker.read(self.offset, _AT_ONCE, wait)
        for offset, body in messages:
            started = time.perf_counter()
            self.heard = time.time()
            found = self.decider.answer(offset, body, self.broker.killed())
            entry, wrong = (found, None) if isinstance(found, Entry) else (None, found)
            written = None if entry is None else entry.model_dump_json().encode()
            self.broker.commit(self.offset, offset, written, wrong, body)
            self.offset = offset
            self.delays.append(time.perf_counter() - started)
            if entry is not None:
                self.last, self.given = entry, self.given + 1
            else:
                log.warning("control: message %s is kept aside: %s", offset, wrong)
        return len(messages)

    def run(self) -> None:
        """Steps until `stop`. A broker that fails is tried again; what another consumer has answered for is
        not answered for twice."""
        while not self._stop.is_set():
            try:
                self.step()
                self.failure = None
            except Moved as error:
                log.warning("control: another consumer is at work: %s", error)
                self._begin_again()
            except FAILURES as error:
                self.failure = f"{type(error).__name__}: {error}"
                log.error("control: %s", self.failure)
                self._stop.wait(_AGAIN)
                self._begin_again()

    def _begin_again(self) -> None:
        try:
            self.rehydrate()
        except FAILURES as error:  # it is tried again
            self.failure = f"{type(error).__name__}: {error}"

    def start(self) -> threading.Thread:
        """Runs in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="control", daemon=True)
        self._thread.start()
        return self._thread

    @property
    def alive(self) -> bool:
        """Whether the thread of `start` still runs."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Ends `run` after the step that it is in."""
        self._stop.set()

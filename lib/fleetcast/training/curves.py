"""Losses by epoch for TensorBoard, for those who watch a fit there; the same figures are in history.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fleetcast.training.loop import Run

#: Hears of a run, and of its figures, after each epoch.
Watch = Callable[[Run, dict[str, float]], None]


@contextmanager
def curves(folder: str | None) -> Iterator[Watch]:
    """Writes a run's figures into `folder` as it goes; nothing if that is None, or on other ranks than 0.

    A run that goes on after a kill adds to what is there.
    """
    if folder is None:
        yield lambda *_: None
        return
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(folder, write_to_disk=True)

    def watch(run: Run, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, run.progress.epoch)
        writer.flush()

    try:
        yield watch
    finally:
        writer.close()

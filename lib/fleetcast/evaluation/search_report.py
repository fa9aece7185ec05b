"""The page of a search: what was tried, how far each try came, and what the best one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from fleetcast import plots
from fleetcast.evaluation import document
from fleetcast.evaluation.document import Pages, Section, Table
from fleetcast.evaluation.page import Picture, number

#: Tries that the table shows, best first.
_SHOWN = 20


@dataclass(frozen=True)
class Try:
    """One configuration that was tried."""

    settings: dict[str, Any]
    loss: float
    """The lowest validation loss; ∞ if it diverged or failed."""
    epochs: int
    history: list[float]
    """The lowest validation loss so far, after each epoch."""
    failure: str = ""
    """Why it did not come to its end, if it neither did nor diverged."""


def render(model: str, data: str, tries: Sequence[Try], scheduler: str) -> Pages:
    """The page; at least one try came to its end."""
    ranked = sorted(tries, key=lambda one: one.loss)
    best = ranked[0]
    what = ", ".join(f"{name} {number(value)}" for name, value in best.settings.items())
    verdict = (
        f"{data}: of {len(tries)} tries of {model} the best has a validation loss of {number(best.loss)}: "
    )
    names = list(best.settings)
    rows = [
        (
            str(rank),
            number(one.loss) if np.isfinite(one.loss) else "failed" if one.failure else "diverged",
            str(one.epochs),
            *(number(one.settings.get(name)) for name in names),
        )
        for rank, one in enumerate(ranked[:_SHOWN], start=1)
    ]
    words = (
        "The loss is the mean squared error of the mean plus the mean pinball loss of the quantiles, in "
        "units of the training part, on the validation part; the test part has no say. "
        + {
            "asha": "Optuna proposes; ASHA stops the half that is behind after 2, 4, 8, … epochs.",
            "pbt": "All learn side by side; every other epoch the worst go on from a copy of the best, with "
            "learning rate and weight decay changed.",
        }[scheduler],
    )
    table = Table(("Try", "Validation loss", "Epochs", *names), rows, marked=frozenset({"1"}))
    section = Section("The tries, best first", words, (table,), (_picture(tries),))
    return document.pages(f"Search of {model}", [f"{verdict}{what}."], [section])


def _picture(tries: Sequence[Try]) -> Picture:
    figure, (axes,) = plots.subplots("validation loss", width=5.4)
    best = min(tries, key=lambda one: one.loss)
    for one in tries:
        chosen = one is best
        axes.plot(
            range(1, one.epochs + 1),
            np.where(np.isfinite(one.history), one.history, np.nan),
            "-o",
            color=plots.MODEL if chosen else plots.QUIET,
            markersize=3,
            alpha=1 if chosen else 0.4,
            zorder=3 if chosen else 2,
            label="best" if chosen else None,
        )
    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plots.legend(figure, axes)
    return Picture("Validation loss by epoch", plots.png(figure), "The validation loss of every try by epoch")

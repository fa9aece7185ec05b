"""The one plot style: light, legible on paper and on a phone, told apart without colour vision.

figure, (axes,) = plots.subplots(ylabel="CPU time, fraction of capacity")
plots.line(axes, time, history, "observed", plots.OBSERVED)
plots.fan(axes, time, mean, {"90 %": (q05, q95), "50 %": (q25, q75)})
html = f'<img src="{plots.data_uri(plots.png(figure))}">'
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

#: Okabe & Ito (2008) without its yellow, which vanishes on paper. The first is the model's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MODEL = PALETTE[0]
OBSERVED = "#333333"
QUIET = "#8a8f98"
#: What tells shaded stretches of different names apart.
_HATCHES = ("", "///", "...", "xxx")

STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": OBSERVED,
    "axes.labelsize": 9,
    # Dashes as well as colours, for print without colour.
    "axes.prop_cycle": cycler(color=PALETTE)
    + cycler(linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 1)))),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlecolor": OBSERVED,
    "axes.titlesize": 9,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "xtick.color": OBSERVED,
    "ytick.color": OBSERVED,
}


def use_style() -> None:
    """Makes STYLE the default of all figures made from here on; `subplots` does so by itself."""
    matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]


def subplots(*quantities: str, width: float = 4.2, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches with one axes for each quantity, side by side.

    What the y axis shows, and its unit, stands above it, where it reads without turning the head and is never
    cut off. This is no pyplot figure, so nothing must be closed and threads do not meet.
    """
    use_style()
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, len(quantities), squeeze=False)[0])
    for one, quantity in zip(axes, quantities, strict=True):
        one.set_title(quantity)
    return figure, axes


def line(axes: Axes, time: ArrayLike, value: ArrayLike, label: str, color: str) -> None:
    """A series over UTC time (datetime64); NaN leaves a gap."""
    axes.plot(np.asarray(time), np.asarray(value), label=label, color=color, linestyle="-")
    _dates(axes)


def fan(
    axes: Axes,
    time: ArrayLike,
    mean: ArrayLike,
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]],
    color: str = MODEL,
) -> None:
    """A forecast over UTC time (datetime64): its mean and `bands`, label → (low, high), widest first."""
    time = np.asarray(time)
    line(axes, time, mean, "forecast", color)
    for depth, (label, (low, high)) in enumerate(bands.items(), start=1):
        shade = 0.15 + 0.15 * (depth - 1)
        axes.fill_between(
            time, np.asarray(low), np.asarray(high), color=color, alpha=shade, lw=0, label=label
        )


def shade(axes: Axes, spans: Iterable[tuple[str, datetime, datetime]]) -> None:
    """Stretches of UTC time (name, start, end) behind what is drawn, cut off where it ends; each name once in
    the legend."""
    low, high = axes.get_xlim()
    hatches: dict[str, str] = {}
    for name, start, end in spans:
        left, right = max(date2num(start), low), min(date2num(end), high)
        if left >= right:
            continue
        label = None if name in hatches else name
        hatch = hatches.setdefault(name, _HATCHES[len(hatches) % len(_HATCHES)])
        axes.axvspan(left, right, facecolor="0.92", edgecolor="0.7", hatch=hatch, lw=0, zorder=0, label=label)
    axes.set_xlim(low, high)


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The legend of one axes, below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.2
    )


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG: its size does not grow with the number of points."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """A PNG to embed in a page."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _dates(axes: Axes) -> None:
    locator = AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))

"""What the HTML pages share: how figures are written, plots to embed, the templates and their style sheet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fleetcast import plots
from fleetcast.schemas import describe


def template(name: str) -> jinja2.Template:
    """A template of this folder. What it is given is escaped; what it misses is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fleetcast.evaluation", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "percent": percent,
        "moment": moment,
        "unit": describe,
    }
    environment.filters |= filters
    return environment.get_template(name)


def number(value: Any) -> str:
    """Three significant digits, thousands separated; whole numbers in full; `–` where there is none."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "–"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 999.5:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """`0.1234` → `12.3 %`."""
    return "–" if value is None or not np.isfinite(value) else f"{value * 100:.1f} %"


def moment(value: datetime) -> str:
    """`2024-05-01 13:05`, in UTC."""
    return value.strftime("%Y-%m-%d %H:%M")


@dataclass(frozen=True)
class Picture:
    """One plot of the page, its title and a description for those who cannot see it."""

    title: str
    png: bytes
    alt: str
    wide: bool = False
    """Whether it has the whole width of a page."""

    @property
    def image(self) -> str:
        """A data URI, to embed in a page."""
        return plots.data_uri(self.png)


def lead_time(axes: Axes, horizon: int, step: int) -> NDArray[np.float64]:
    """[H] the time from the last observation to each of the targets (`step` in seconds), in the unit of the x
    axis that it labels."""
    ahead = np.arange(1, horizon + 1) * step
    size, unit = next(
        pair for pair in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if ahead[-1] >= pair[0]
    )
    axes.set_xlabel(f"lead time, {unit}")
    axes.set_xlim(0, ahead[-1] / size)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 3, 6, 10]))
    return np.asarray(ahead / size)

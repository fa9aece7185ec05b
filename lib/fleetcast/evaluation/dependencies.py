"""Who depends on whom: the last graph of a dataset as a plot and a table, for the reports.

The picture is laid out in layers, callers to the left of those that they call; where much of the graph goes
round in circles, what is close stands close. The same graph gives the same picture.
"""

from __future__ import annotations

from datetime import UTC, datetime

import networkx as nx
import numpy as np
import polars as pl

from fleetcast import plots
from fleetcast.evaluation.document import Section, Table
from fleetcast.evaluation.naive import duration
from fleetcast.evaluation.page import Picture, number
from fleetcast.schemas import describe
from fleetcast.windows.graph import LastGraph

TITLE = "Who depends on whom"
NONE = "There are no dependencies at the end of the telemetry: no entity is forecast from another."
#: Entities that a plot can name, edges that it can tell apart for each of them, edges that the table lists.
MOST = 60
_EDGES_EACH = 2
LISTED = 10
_LONGEST_NAME = 24
#: Share of the entities in circles above which there are no layers.
_CIRCLING = 0.2
_SWEEPS = 8

Place = tuple[float, float]


def section(graph: LastGraph | None, of: str = "", pictures: bool = True) -> Section:
    """The section of a report, or below that `of` one of several data sets; it says so where there are no
    edges."""
    title, level = (f"{of}: {TITLE.lower()}", 3) if of else (TITLE, 2)
    if graph is None:
        return Section(title, (NONE,), level=level)
    shown = (picture(graph, title),) if pictures else ()
    return Section(title, (caption(graph),), (strongest(graph),), shown, level)


def caption(graph: LastGraph) -> str:
    """What the picture shows, and of what it is a part."""
    shown, drawn = len(_drawn(graph)), _nodes(graph)
    start = datetime.fromtimestamp(graph.time, UTC)
    whole = (
        f"all {number(graph.total)} edges between {number(graph.entities)} entities"
        if shown == graph.total
        else f"the strongest {number(shown)} of {number(graph.total)} edges, between {len(drawn)} of "
        f"{number(graph.entities)} entities: those through which most flows"
    )
    kinds = ", ".join(graph.kinds) or "of no known kind"
    return (
        f"Dependencies ({kinds}) of the {duration(graph.slice)} from {start:%Y-%m-%d %H:%M} UTC, the last "
        "that had ended at the end of the telemetry: "
        f"{whole}. Load goes along the arrows. The wider an arrow, the stronger the dependency; the larger a "
        "dot, the higher the entity’s mean over the last look-back of "
        f"{graph.metric} ({describe(graph.metric, graph.normalised)})."
    )


def strongest(graph: LastGraph) -> Table:
    """The edges of most weight."""
    rows = [
        (_short(source), _short(target), number(weight))
        for source, target, weight in graph.edges.head(LISTED).iter_rows()
    ]
    title = "The strongest dependencies; of each kind, the strongest of the slice is 1"
    return Table(("From", "To", "Weight"), rows, title, words=frozenset({"To"}))


def picture(graph: LastGraph, title: str = TITLE) -> Picture:
    """The strongest edges between the entities with the most flow."""
    edges, names = _drawn(graph), _nodes(graph)
    whole = nx.DiGraph()
    whole.add_nodes_from(names)
    whole.add_weighted_edges_from(edges.iter_rows())
    layers = _layers(whole)
    if layers is None:
        places, height = _close(whole), 6.0
    else:
        places, height = _columns(whole, layers), max(2.6, 0.21 * max(map(len, layers)))
    figure, (axes,) = plots.subplots("", width=9, height=height)
    load = np.nan_to_num([graph.load.get(name, np.nan) for name in names])
    size = 12 + 190 * load / max(float(load.max()), 1e-12)
    weight = edges["weight"].to_numpy()
    nx.draw_networkx_edges(
        whole,
        places,
        ax=axes,
        edgelist=list(edges.select("source", "target").iter_rows()),
        nodelist=names,
        node_size=size,
        width=0.3 + 2.2 * weight / weight.max(),
        edge_color=plots.QUIET,
        alpha=0.6,
        arrowsize=7,
        connectionstyle="arc3,rad=0.06",
    )
    nx.draw_networkx_nodes(
        whole, places, ax=axes, nodelist=names, node_size=size, node_color=plots.MODEL, linewidths=0
    )
    for name, extent in zip(names, size, strict=True):
        axes.annotate(
            _short(name),
            places[name],
            xytext=(np.sqrt(extent) / 2 + 2, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
            color=plots.OBSERVED,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )
    axes.set_axis_off()
    axes.margins(x=0.07, y=0.06)
    alt = f"{title}: {len(edges)} dependencies between {len(names)} entities as arrows"
    return Picture(title, plots.png(figure, dpi=140), alt, wide=True)


def _drawn(graph: LastGraph) -> pl.DataFrame:
    edges = graph.edges.filter(pl.col("source") != pl.col("target"))
    return edges.head(_EDGES_EACH * len({*edges["source"], *edges["target"]}))


def _nodes(graph: LastGraph) -> list[str]:
    """The entities that an edge is drawn of, by name."""
    drawn = _drawn(graph)
    return sorted({*drawn["source"], *drawn["target"]})


def _layers(whole: nx.DiGraph) -> list[list[str]] | None:
    """Each entity one layer right of the furthest that leads to it, a circle as one; None where that is no
    order: many are in circles."""
    circles = nx.condensation(whole)
    members = dict(circles.nodes(data="members"))
    if sum(len(circle) for circle in members.values() if len(circle) > 1) > _CIRCLING * len(whole):
        return None
    return [
        sorted(name for circle in layer for name in members[circle])
        for layer in nx.topological_generations(circles)
    ]


def _close(whole: nx.DiGraph) -> dict[str, Place]:
    """Entities as far from each other as there are edges between them, as far as that can be; the parts of
    the graph that have nothing to do with each other side by side."""
    places: dict[str, Place] = {}
    left = 0.0
    for part in sorted(nx.weakly_connected_components(whole), key=lambda part: (-len(part), min(part))):
        names = sorted(part)
        graph = nx.Graph()
        graph.add_nodes_from(names)
        graph.add_edges_from(sorted(whole.subgraph(part).edges))
        found = nx.kamada_kawai_layout(graph, scale=float(np.sqrt(len(names))), weight=None)
        edge = min(float(x) for x, _ in found.values())
        places |= {name: (left + float(x) - edge, float(y)) for name, (x, y) in found.items()}
        left = max(places[name][0] for name in names) + 2
    return places


def _columns(whole: nx.DiGraph, layers: list[list[str]]) -> dict[str, Place]:
    """A column for each layer, ordered so that neighbours stand side by side: each entity at the mean height
    of those that it has edges with, again and again, from left to right and back."""
    height = {name: i / max(len(layer) - 1, 1) for layer in layers for i, name in enumerate(layer)}
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 else reversed(layers):
            wanted = {
                name: float(np.mean([height[other] for other in nx.all_neighbors(whole, name)] or [0.5]))
                for name in layer
            }
            layer.sort(key=lambda name: (wanted[name], name))
            height |= {name: (i + 0.5) / len(layer) for i, name in enumerate(layer)}
    return {name: (float(x), height[name]) for x, layer in enumerate(layers) for name in layer}


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:10]}…"

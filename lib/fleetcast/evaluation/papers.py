"""The tables of the papers whose experiments are rerun, to print beside our own figures.

Their data and code are not to be had, so the figures are no goal: only the order of the methods compares.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperTable:
    """One table of a paper."""

    title: str
    source: str
    data: str
    """What the paper's figures were measured on."""
    figures: tuple[str, ...]
    """Its columns, by their names in `metrics.figures`."""
    rows: dict[str, tuple[float, ...]]
    """Method, as the paper calls it → its figures."""
    rungs: dict[str, str]
    """Method → our rung."""


FUSION = PaperTable(
    title="Temporal-structural fusion",
    source="Wang 2026, An AI-Based Temporal-Structural Fusion Framework for Robust Backend Load Prediction "
    "in Cloud-Native Environments, doi 10.20944/preprints202602.1772.v1, Table 1",
    data="Alibaba cluster trace, part and scaling not stated",
    figures=("mse", "mae", "mape", "rmse"),
    rows={
        "LSTM": (0.0048, 0.0482, 0.0637, 0.0693),
        "BiLSTM": (0.0042, 0.0456, 0.0601, 0.0648),
        "MLP": (0.0055, 0.0527, 0.0712, 0.0741),
        "Transformer": (0.0039, 0.0433, 0.0568, 0.0624),
        "BERT": (0.0036, 0.0418, 0.0544, 0.0600),
        "Informer": (0.0034, 0.0395, 0.0519, 0.0583),
        "Fusion": (0.0027, 0.0351, 0.0463, 0.0520),
    },
    rungs={
        "LSTM": "lstm",
        "BiLSTM": "bilstm",
        "MLP": "mlp",
        "Transformer": "transformer",
        "BERT": "bert",
        "Informer": "informer",
        "Fusion": "fusion",
    },
)

STGNN = PaperTable(
    title="Spatiotemporal graph network",
    source="Xue et al., Multi-Level Service Performance Forecasting via Spatiotemporal Graph Neural "
    "Networks, Table 1",
    data="Alibaba cluster trace 2018, part and scaling not stated",
    figures=("mae", "rmse", "r2"),
    rows={
        "ASTGCN": (0.165, 0.251, 0.879),
        "DGCRN": (0.157, 0.238, 0.892),
        "Graph WaveNet": (0.142, 0.221, 0.911),
        "STGNN": (0.123, 0.197, 0.941),
    },
    rungs={
        "ASTGCN": "astgcn",
        "DGCRN": "dgcrn",
        "Graph WaveNet": "graph_wavenet",
        "STGNN": "stgnn",
    },
)

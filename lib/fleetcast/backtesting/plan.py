"""Which trials a backtest is made of: rungs × seeds for each data set; and the papers' experiments."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fleetcast.backtesting.options import BacktestOptions
from fleetcast.config import Options
from fleetcast.evaluation.papers import FUSION, STGNN, PaperTable
from fleetcast.models import MODELS, configure
from fleetcast.models.fusion import PLAIN as PLAIN_FUSION
from fleetcast.models.stgnn import PLAIN as PLAIN_STGNN
from fleetcast.store import fingerprint
from fleetcast.training.options import FitOptions, TrainOptions

PAPERS: dict[str, PaperTable] = {"fusion": FUSION, "stgnn": STGNN}
#: Rungs beside those of the paper's own table: what a name in it may also mean, and what no result stands
#: without.
_BESIDE = {"fusion": ("ridge", "lightgbm"), "stgnn": ("ast_gcn", "ridge", "lightgbm")}
_PLAIN: dict[str, dict[str, Any]] = {"fusion": PLAIN_FUSION, "stgnn": PLAIN_STGNN}
#: What no published baseline has: the blend of naive forecasts, and values of seasons past the look-back.
_BEYOND = ("residual", "seasonal")

#: The trial of all naive rungs together: they have nothing to learn.
NAIVE = "naive"


class Rung(Options):
    """One line of the ladder: a model with its options."""

    name: str
    model: str
    """In the registry, or NAIVE."""
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def once(self) -> bool:
        """Whether seeds make no difference and there is nothing to search."""
        return self.model == NAIVE or MODELS[self.model].fitted

    @property
    def graph(self) -> str | None:
        """Of a variant of a model on another graph, which; None of the model itself."""
        return None if self.name == self.model else self.options["graph"]


class Trial(Options):
    """One rung, seed and data set: all that its figures depend on, with the data's fingerprint."""

    data: str
    data_fingerprint: str
    rung: Rung
    fit: FitOptions
    workers: int = 1
    """DDP workers; of one the trial is a single process."""

    @property
    def folder(self) -> str:
        """Where its results lie, within the backtests."""
        name = self.rung.name.replace(" ", "-").replace(",", "")
        digest = fingerprint(self.model_dump(mode="json"))
        return f"trials/{self.data}/{name}/seed-{self.fit.seed}-{digest}"

    def train_options(self, windows: str) -> TrainOptions:
        """What the training job would be told to fit the same on this windows dataset."""
        model = self.rung.model
        given = {model: self.rung.options, **self.fit.model_dump()}
        return TrainOptions(windows=windows, model=model, workers=self.workers, **given)

    @property
    def search(self) -> str:
        """Where its validation loss lies if it is a try of the search."""
        key = [self.data_fingerprint, self.rung.model_dump(mode="json"), self.fit.model_dump(mode="json")]
        return f"search/{self.data}/{self.rung.model}-{fingerprint(key)}.json"


def rungs(options: BacktestOptions) -> list[Rung]:
    """The ladder: the naive rungs, every model, and graph models on other graphs than the true one."""
    if options.paper is not None:
        table = PAPERS[options.paper]
        names = (*table.rungs.values(), *_BESIDE[options.paper])
        found = [_rung(name, options.options.get(name, {}) | plain(name)) for name in names]
    else:
        found = [_rung(name, options.options.get(name, {})) for name in options.models]
        found += [
            _rung(name, options.options.get(name, {}) | {"graph": graph}, f"{name}, {graph} graph")
            for name in options.lift
            for graph in ("identity", "shuffled", "learned")
        ]
    return [Rung(name="naive", model=NAIVE), *found]


def plain(name: str) -> dict[str, Any]:
    """The options that make a model the published one."""
    return _PLAIN.get(name, {option: False for option in _BEYOND if option in MODELS[name].model_fields})


def _rung(name: str, options: dict[str, Any], title: str | None = None) -> Rung:
    """With every option, so that a trial is another one when a default changes. Raises InputError."""
    return Rung(name=title or name, model=name, options=configure(name, options).model_dump(mode="json"))

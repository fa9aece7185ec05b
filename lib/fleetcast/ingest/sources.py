"""Any source → the telemetry of a store; and how that is cut into windows where nobody says it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError, model_serializer, model_validator

from fleetcast.errors import InputError
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.store import Store
from fleetcast.traces import TRACES, tabular
from fleetcast.traces.mapping import TabularOptions
from fleetcast.windows.manifest import ShardOptions

#: Steps of look-back and horizon where neither is given, and as which share of the table at most: the test
#: part of a fifth then holds two horizons.
_STEPS = 12
_SHARE = 10


class SourceShardOptions(ShardOptions):
    """As of the shard job, but what is not given may depend on the source (`windows_of`)."""

    @model_validator(mode="after")
    def _whole_steps(self) -> SourceShardOptions:
        return self  # of what is given alone it cannot be told

    @model_serializer(mode="plain")
    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}

    def resolve(self, derived: dict[str, Any]) -> ShardOptions:
        """What is given, else `derived`, else the shard job's defaults. Raises InputError if these clash."""
        try:
            return ShardOptions(**(derived | self.model_dump()))
        except ValidationError as error:
            wrong = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
            raise InputError(f"--shard: {wrong}") from error


def load(
    store: Store, raw: str | None, options: IngestOptions, table: TabularOptions | None
) -> dict[str, Any]:
    """Makes a table, or else raw files or a server, the telemetry of the store; returns its figures."""
    if table is not None:
        return tabular.load(store, table)
    assert raw is not None, "one source is given"
    return ingest(store, raw, options)


def windows_of(
    given: SourceShardOptions, table: TabularOptions | None, telemetry: dict[str, Any] | None
) -> ShardOptions:
    """How a source is cut into windows: as is given, else as suits its telemetry, of which this is the
    manifest; without one, the shard job says what is wrong.

    A trace may have metrics of its own for a level. What is not given of a table's is taken from the table:
    its level and metrics; the step of its telemetry; a horizon of 12 steps, or a tenth of a table of fewer
    than 120; and a look-back as long as that, or as the horizon that is given. Raises InputError if that
    clashes with what is given.
    """
    if table is None:
        trace = TRACES.get((telemetry or {}).get("settings", {}).get("trace", ""))
        metrics = None if trace is None else trace.default_metrics.get(given.level)
        return given.resolve({} if metrics is None else {"metrics": metrics})
    assert telemetry is not None, "a table is loaded first"
    said, span = given.model_dump(), telemetry["spans"][table.kind]
    step = said.get("step", telemetry["settings"]["step"])
    steps = (span["last"] - span["first"]) // step + 1
    width = step * max(1, min(_STEPS, steps // _SHARE))
    horizon = said.get("horizon", width)
    of_table = {"level": table.level, "metrics": table.names}
    return given.resolve({**of_table, "step": step, "horizon": horizon, "history": max(width, horizon)})

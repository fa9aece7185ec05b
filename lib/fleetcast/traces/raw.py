"""Raw tables: what a source's files hold, and how a block of their lines becomes a frame.

A source file declares its tables with `Table`; everything that reads text goes through `parse`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from fleetcast.errors import InputError


@dataclass(frozen=True)
class Binning:
    """How a source's clock maps to ours."""

    start: int
    """Unix seconds of the trace's second 0."""
    step: int
    """Width of a telemetry bin [s]."""
    slice: int
    """Width of a dependency slice [s]."""


@dataclass(frozen=True)
class Table:
    """One raw table of a CSV source."""

    name: str
    columns: Mapping[str, pl.DataType | type[pl.DataType]]
    """Columns with the type that their text must have; in file order, where no header says it."""
    rejects: Mapping[str, pl.Expr]
    """Reason → rows that cannot be used."""
    invalid: Mapping[str, pl.Expr]
    """Column → rows whose value there is present but impossible, and becomes null."""
    products: Callable[[pl.DataFrame, Binning], dict[str, pl.DataFrame]]
    """Usable rows → partial products by name, aggregated as far as one block allows."""
    header: bool = False
    """Whether the first line of a file names its columns."""

    def of_header(self, line: str, file: str) -> Table:
        """The table as a file has it: columns in the order of its header, and those that nobody asked for.

        Raises InputError if one that is needed is not there.
        """
        names = line.rstrip("\r\n").split(",")
        if missing := [name for name in self.columns if name not in names]:
            raise InputError(
                f"{file}: no column {' and no '.join(missing)} in its header, expected "
                f"{', '.join(self.columns)}; got {line.strip()[:200]!r}"
            )
        given = {name: self.columns.get(name, pl.String) for name in names}
        if len(given) < len(names):
            raise InputError(f"{file}: expected each column once in its header, got {line.strip()[:200]!r}")
        return replace(self, columns=given)


@dataclass
class Parsed:
    """One block of lines, taken apart."""

    frame: pl.DataFrame
    """The usable rows."""
    rows: int
    """All rows of the block."""
    rejected: pl.DataFrame
    """`offset` in the block, `reason`, `line`."""
    invalid: dict[str, int] = field(default_factory=dict)
    """Column → how many values were made null."""


def parse(block: bytes, table: Table) -> Parsed:
    """Whole lines of a table → usable rows, with impossible values made null, and the others with reasons.

    The strict parser is tried first; only a block that it refuses is taken apart line by line, or one whose
    comma count is off: it fills short rows with nulls, so that is only counted where a last column is null.
    """
    rejected, lines = _no_rejects(), None
    try:
        frame = pl.read_csv(block, has_header=False, schema=dict(table.columns), quote_char=None)
        if frame[:, -1].null_count() or block.endswith(b"\n\n"):
            rows = block.count(b"\n") + (not block.endswith(b"\n"))
            if block.count(b",") != rows * (len(table.columns) - 1):
                raise pl.exceptions.ComputeError("wrong number of columns")
    except pl.exceptions.PolarsError:
        frame, rejected, lines = _parse_line_by_line(block, table)
    rows = len(frame) + len(rejected)

    broken = pl.any_horizontal(pl.lit(False), *table.rejects.values())
    if frame.select(broken.any()).item():
        reason = pl.coalesce(pl.when(bad).then(pl.lit(why)) for why, bad in table.rejects.items())
        reasons = frame.select(reason.alias("reason"))["reason"]
        bad_rows = reasons.is_not_null()
        lines = _lines(block) if lines is None else lines
        more = lines.filter(bad_rows).with_columns(reasons.filter(bad_rows))
        rejected = pl.concat([rejected, more.select(rejected.columns)]).sort("offset")
        frame = frame.filter(~bad_rows)
    counts = frame.select(bad.sum().alias(column) for column, bad in table.invalid.items())
    invalid = {column: int(counts[column][0]) for column in counts.columns if counts[column][0]}
    frame = frame.with_columns(
        pl.when(table.invalid[column]).then(None).otherwise(pl.col(column)).alias(column)
        for column in invalid
    )
    return Parsed(frame, rows, rejected, invalid)


def _no_rejects() -> pl.DataFrame:
    return pl.DataFrame(schema={"offset": pl.Int64, "reason": pl.String, "line": pl.String})


def _lines(block: bytes) -> pl.DataFrame:
    """`offset`, `line`, and `broken` where it is not UTF-8, of every row of a block."""
    lines = block.removesuffix(b"\n").split(b"\n")
    lengths = np.fromiter((len(line) + 1 for line in lines), np.int64, len(lines))
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    texts = [line.decode("utf-8", errors="backslashreplace") for line in lines]
    return pl.DataFrame(
        {
            "offset": offsets,
            "line": [text.removesuffix("\r") for text in texts],
            "broken": [len(text.encode()) != len(line) for text, line in zip(texts, lines, strict=True)],
        },
        schema={"offset": pl.Int64, "line": pl.String, "broken": pl.Boolean},
    )


def _parse_line_by_line(block: bytes, table: Table) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """As `parse`, for text that is not clean: usable frame, rejected rows, and the usable rows' lines.

    A line that the strict parser takes means the same here: a row's fate does not depend on its neighbours.
    """
    lines = _lines(block).with_columns(fields=pl.col("line").str.split(","))
    width = len(table.columns)
    names = list(table.columns)
    texts = lines.select(
        "offset",
        "line",
        "broken",
        pl.col("fields").list.len().alias("width"),
        *(pl.col("fields").list.get(i, null_on_oob=True).alias(name) for i, name in enumerate(names)),
    )
    values = texts.with_columns(
        pl.when(pl.col(name).is_in(["", "\r"])).then(None).otherwise(pl.col(name)).alias(name)
        for name in names
    ).with_columns(
        pl.col(name).str.strip_chars_start(" \t")
        for name, dtype in table.columns.items()
        if dtype.is_numeric()
    )
    cast = values.select(pl.col(name).cast(dtype, strict=False) for name, dtype in table.columns.items())
    reason = pl.coalesce(
        pl.when(values["broken"]).then(pl.lit("not UTF-8")),
        pl.when(values["width"] != width).then(
            pl.format("{} columns, expected {}", values["width"], pl.lit(width))
        ),
        *(
            pl.when(values[name].is_not_null() & cast[name].is_null()).then(
                pl.lit(f"{name} is not a {'whole number' if dtype.is_integer() else 'number'}")
            )
            for name, dtype in table.columns.items()
        ),
    )
    marked = lines.select("offset", "line", reason.alias("reason"))
    usable = marked["reason"].is_null()
    rejected = marked.filter(~usable).select("offset", "reason", "line")
    return cast.filter(usable), rejected, marked.filter(usable).select("offset", "line")

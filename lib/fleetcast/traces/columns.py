"""Parquet and CSV files with named columns, read batch by batch in the order of their rows.

Fields of a CSV file come as text, so what one block holds never decides on the type of the next.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import IO, Any, cast

import fsspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from fleetcast.errors import InputError
from fleetcast.store import arrow, content_key

FORMATS = (".parquet", ".csv", ".csv.gz")

#: Values of one batch, and bytes of one block of CSV: megabytes, whatever the file's size.
BATCH_VALUES = 1 << 20
BLOCK_BYTES = 8 << 20
_REJECTED = {"offset": pl.Int64, "reason": pl.String, "line": pl.String}
#: Columns that an error lists.
_LISTED = 20
#: Rows by which a file's columns are judged; those of all files are held together.
_SAMPLE = 10_000
#: Files that are opened at once, each waiting for its store most of the time.
_READERS = 16


@dataclass(frozen=True)
class Batch:
    """Some rows that follow each other."""

    frame: pl.DataFrame
    """The columns that were asked for."""
    offset: pl.Series
    """Number of each row in the file; 0 is the first below the header."""
    broken: pl.DataFrame = field(default_factory=lambda: _broken([]))
    """Rows with too few or too many fields: `offset`, `reason`, `line`."""


@dataclass(frozen=True)
class ColumnFile:
    """A `.parquet`, `.csv` or `.csv.gz` file (commas, a header), local or on an object store."""

    option: str
    """The option that named it, for errors."""
    uri: str
    fs: Any
    path: str
    size: int
    key: str
    """Fingerprint of the content."""
    columns: tuple[str, ...]
    name: str
    """Its path below the folder that was named, or below the first part of a pattern that is one."""

    @classmethod
    def open_all(cls, option: str, uri: str) -> list[ColumnFile]:
        """The file, all files of a folder, or those that a pattern fits, in the order of their names.

        Raises InputError if there is none, one is empty, or its format is another.
        """
        try:
            fs, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"--{option} {uri}: expected a file or s3://… ({error})") from error
        fs.invalidate_cache()
        base = path = path.rstrip("/")
        if (wild := re.search(r"[*?\[]", path)) and not fs.exists(path):
            base = path[: wild.start()].rpartition("/")[0]
            paths = sorted(one for one in fs.glob(path) if one.endswith(FORMATS))
        elif fs.isdir(path):
            paths = sorted(one for one in fs.find(path) if one.endswith(FORMATS))
        else:
            paths, base = [path], path.rpartition("/")[0]
            if not path.endswith(FORMATS):
                raise InputError(f"--{option} {uri}: expected a file that ends in {', '.join(FORMATS)}")
            if not fs.isfile(path):
                raise InputError(f"--{option} {uri}: no such file")
        if not paths:
            raise InputError(f"--{option} {uri}: no file there that ends in {', '.join(FORMATS)}")

        def opened(path: str) -> ColumnFile:
            name = path.removeprefix(f"{base}/")
            return cls._open(option, uri if len(paths) == 1 else fs.unstrip_protocol(path), fs, path, name)

        with ThreadPoolExecutor(_READERS) as readers:
            return list(readers.map(opened, paths))

    @classmethod
    def _open(cls, option: str, uri: str, fs: Any, path: str, name: str) -> ColumnFile:
        size = int(fs.size(path))
        bare = cls(option, uri, fs, path, size, content_key(fs, path, size), (), name)
        with bare._reading():
            columns = tuple(bare._parquet().schema_arrow.names) if bare.is_parquet else bare._first_line()
        if not columns:
            raise InputError(f"--{option} {uri}: the file is empty, expected a header and rows")
        return replace(bare, columns=columns)

    @property
    def is_parquet(self) -> bool:
        """Whether columns have types of their own."""
        return self.path.endswith(".parquet")

    def column(self, option: str, name: str) -> str:
        """The name of a column that there is. Raises InputError naming the nearest otherwise."""
        if name in self.columns:
            if self.columns.count(name) > 1:
                raise InputError(f"--{option} {name}: {self.uri} has more than one column of that name")
            return name
        near = difflib.get_close_matches(name, self.columns, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"--{option} {name}: no such column in {self.uri}{hint}, expected one of {self.listed()}"
        )

    def listed(self) -> str:
        """The columns, as far as an error has room for."""
        more = len(self.columns) - _LISTED
        return ", ".join(self.columns[:_LISTED]) + (f" and {more} more" if more > 0 else "")

    def sample(self, option: str, names: Sequence[str]) -> pl.DataFrame:
        """Some of the first rows with a value in any of some columns. Raises InputError if there is none."""
        found = (batch.frame.filter(~pl.all_horizontal(pl.all().is_null())) for batch in self.batches(names))
        rows = next((rows.head(_SAMPLE) for rows in found if len(rows)), None)
        if rows is None:
            raise InputError(f"--{option} {', '.join(names)}: no row of {self.uri} has a value there")
        return rows

    def batches(self, columns: Sequence[str]) -> Iterator[Batch]:
        """All rows, in order. Raises InputError where the file cannot be read."""
        with self._reading():
            yield from self._parquet_batches(columns) if self.is_parquet else self._csv_batches(columns)

    def matrix(self) -> pl.DataFrame | None:
        """A CSV file without a header whose fields are numbers, as float64 columns; None if it has a header.

        Fields that are no numbers are null.
        """
        if self.is_parquet or not all(map(_is_number, self.columns)):
            return None
        with self._reading(), self._stream() as stream:
            text = pl.read_csv(stream.read(), has_header=False, infer_schema=False)
        return text.select(pl.all().str.strip_chars().cast(pl.Float64, strict=False))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (
            pa.ArrowInvalid,
            pl.exceptions.PolarsError,
            UnicodeDecodeError,
            EOFError,
            csv.Error,
            zlib.error,
            gzip.BadGzipFile,
        ) as error:
            why = " ".join(str(error).split())
            raise InputError(f"--{self.option} {self.uri}: cannot be read as a table: {why}") from error
        except FileNotFoundError as error:
            raise InputError(f"--{self.option} {self.uri}: the file vanished while it was read") from error

    @contextmanager
    def _stream(self) -> Iterator[IO[bytes]]:
        with self.fs.open(self.path, "rb") as raw:
            if self.path.endswith(".gz"):
                with gzip.open(raw) as stream:
                    yield cast(IO[bytes], stream)
            else:
                yield raw

    def _parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, filesystem=arrow(self.fs))

    def _first_line(self) -> tuple[str, ...]:
        with self._stream() as stream:
            return tuple(next(csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline="")), ()))

    def _parquet_batches(self, columns: Sequence[str]) -> Iterator[Batch]:
        with self._parquet() as file:
            rows = max(1, BATCH_VALUES // max(len(columns), 4))
            first = 0
            for batch in file.iter_batches(rows, columns=list(columns), use_threads=False):
                frame = cast(pl.DataFrame, pl.from_arrow(pa.Table.from_batches([batch]))).select(columns)
                offset = pl.int_range(first, first + len(frame), eager=True).alias("offset")
                yield Batch(frame, offset)
                first += len(frame)

    def _csv_batches(self, columns: Sequence[str]) -> Iterator[Batch]:
        broken: list[pacsv.InvalidRow] = []

        def skip(row: pacsv.InvalidRow) -> str:
            broken.append(row)
            return "skip"

        with self._stream() as stream:
            reader = pacsv.open_csv(
                stream,
                # One thread, or broken rows have no number.
                read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(invalid_row_handler=skip),
                convert_options=pacsv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=dict.fromkeys(columns, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
            whole = told = 0
            for batch in reader:
                frame = cast(pl.DataFrame, pl.from_arrow(pa.Table.from_batches([batch])))
                # The header is number 1; the k-th whole row comes after the broken ones that begin before it.
                before = np.array([row.number - 2 for row in broken], np.int64) - np.arange(len(broken))
                rows = np.arange(whole, whole + len(frame))
                offset = pl.Series("offset", rows + np.searchsorted(before, rows, side="right"))
                yield Batch(frame, offset, _broken(broken[told:]))
                whole, told = whole + len(frame), len(broken)
            if told < len(broken):
                nothing = pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
                yield Batch(nothing, pl.Series("offset", [], pl.Int64), _broken(broken[told:]))


def candidates(option: str, files: Sequence[ColumnFile], names: Sequence[str]) -> dict[str, list[str]]:
    """File → those of some columns that it has. Raises InputError for a column that no file has, or a file
    that has none."""
    for name in names:
        if not any(name in file.columns for file in files):
            files[0].column(option, name)
    found = {}
    for file in files:
        there = [name for name in names if name in file.columns]
        found[file.name] = [file.column(option, name) for name in there or names[:1]]
    return found


def texts(column: pl.Series) -> pl.Series:
    """Names; the empty one is null."""
    texts = column.cast(pl.String)
    return texts.set(texts == "", None)


def finite(column: pl.Series) -> pl.Series:
    """Numbers as float64; null what is none, and what float32 cannot hold."""
    if column.dtype == pl.String:
        column = column.str.strip_chars()
    elif not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        column = pl.Series(column.name, [None], pl.Float64).new_from_index(0, len(column))
    numbers = column.cast(pl.Float64, strict=False)
    return numbers.set(~numbers.cast(pl.Float32).is_finite(), None)


def reject(
    frame: pl.DataFrame, offset: pl.Series, checks: dict[str, pl.Series]
) -> tuple[pl.Series, pl.DataFrame]:
    """Which rows can be used; and the others: `offset`, the first `reason`, `line`."""
    reason = pl.select(pl.coalesce(pl.when(bad).then(pl.lit(why)) for why, bad in checks.items())).to_series()
    keep = reason.is_null()
    if keep.all():
        return keep, pl.DataFrame(schema=_REJECTED)
    line = pl.concat_str(pl.all().cast(pl.String).fill_null(""), separator=",")
    rows = frame.filter(~keep).select(line.alias("line"))
    return keep, rows.select(offset.filter(~keep), reason.filter(~keep).alias("reason"), "line")


def _broken(rows: list[pacsv.InvalidRow]) -> pl.DataFrame:
    reasons = [f"{row.actual_columns} columns, expected {row.expected_columns}" for row in rows]
    columns = ([row.number - 2 for row in rows], reasons, [row.text for row in rows])
    return pl.DataFrame(dict(zip(_REJECTED, columns, strict=True)), schema=_REJECTED)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""Raw files: finding them, telling them apart, reading them as blocks of whole lines in bounded memory."""

from __future__ import annotations

import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any, cast

import fsspec

from fleetcast.config import Options
from fleetcast.errors import InputError
from fleetcast.store import content_key

log = logging.getLogger("fleetcast")

#: Lines are parsed this many bytes at a time: small enough for the processor's cache, which is what makes
#: grouping a block fast.
BLOCK_BYTES = 8 << 20
#: A line longer than this is no line of a table.
LONGEST_LINE = 1 << 20
_FORMATS = (".csv", ".csv.gz", ".tar.gz", ".tgz")
#: Files whose heads and tails are read at once: object stores answer late, but many at a time.
_READERS = 16


class RawFile(Options):
    """One file of one table."""

    uri: str
    name: str
    """Path relative to the source."""
    table: str
    size: int
    key: str
    """Fingerprint of the content."""
    stamp: str | None = None
    """What a listing of its folder says that changes when the file is written anew; None if nothing does."""


class Csv(Options):
    """Where the csv lies in the decompressed bytes of an archive that has an index."""

    begin: int
    size: int


class Chunk(Options):
    """What one task reads: a range of a plain file or of an indexed archive's csv, or all of a small archive.

    Offsets are those of the csv; of an archive that is read whole, the task has all of its compressed bytes.
    """

    file: RawFile
    start: int
    stop: int
    width: int
    """The size of chunk that was asked for."""
    csv: Csv | None = None
    """Of an indexed archive; None for other files."""

    @property
    def reading(self) -> str:
        """What all chunks of a file have in common that was cut in one way; a content may be cut in another
        way by another run, and what came of it must not count twice."""
        return f"{self.file.key}-{self.width}"

    @property
    def id(self) -> str:
        """Unique over all readings and ranges; the prefix of everything that the chunk's task writes."""
        return f"{self.reading}-{self.start}+{self.stop - self.start}"


def discover(source: str, tables: Iterable[str], known: Iterable[RawFile] = ()) -> list[RawFile]:
    """The files of a source (a folder, a file or `s3://…`) that belong to a table, in order of their names.

    A file belongs to the table whose name its own begins with, or that its folder is called. A `known` one is
    not opened again if the listing says that it is still the same. Raises InputError if there is no such
    file, or one is empty.
    """
    tables = sorted(tables, key=len, reverse=True)
    try:
        fs, root = fsspec.core.url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise InputError(f"--source {source}: expected a folder, a file or s3://… ({error})") from error
    root = root.rstrip("/")
    fs.invalidate_cache()
    if not fs.exists(root):
        raise InputError(f"--source {source}: no such file or folder")
    listed = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
    before = {file.uri: file for file in known}
    found: list[tuple[str, str, dict[str, Any]]] = []
    for path, entry in sorted(listed.items()):
        table = _table_of(path, tables)
        if table is None or not path.endswith(_FORMATS):
            log.warning("%s: not a file of a known table, left out", path)
        elif not entry["size"]:
            raise InputError(f"{path}: the file is empty, expected rows of {table}")
        else:
            found.append((path, table, entry))
    if not found:
        raise InputError(
            f"--source {source}: no file of a known table; expected names that begin with "
            f"{', '.join(sorted(tables))} and end in {', '.join(_FORMATS)}"
        )

    def describe(file: tuple[str, str, dict[str, Any]]) -> RawFile:
        path, table, entry = file
        uri, size, stamp = fs.unstrip_protocol(path), int(entry["size"]), _stamp(entry)
        same = before.get(uri)
        unchanged = same is not None and stamp is not None and (same.size, same.stamp) == (size, stamp)
        key = same.key if same is not None and unchanged else content_key(fs, path, size)
        name = path[len(root) + 1 :] or path.rsplit("/", 1)[-1]
        return RawFile(uri=uri, name=name, table=table, size=size, key=key, stamp=stamp)

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(describe, found))


def _stamp(info: dict[str, Any]) -> str | None:
    """S3 lists an ETag; on a local disk the times of the last write and of the last change of any kind, which
    nobody can set, tell."""
    if "ETag" in info:
        return str(info["ETag"])
    return f"{info['mtime']} {info['created']}" if {"mtime", "created"} <= info.keys() else None


def _table_of(path: str, tables: list[str]) -> str | None:
    for part in reversed(path.split("/")[-2:]):
        for table in tables:
            if re.match(rf"{table}([^a-z]|$)", part):
                return table
    return None


def chunks(files: list[RawFile], chunk_bytes: int, indexed: Mapping[str, Csv]) -> list[Chunk]:
    """Files → the tasks' inputs. Only plain files and archives of `indexed`, by their keys, can be entered in
    the middle."""
    parts = []
    for file in files:
        csv = indexed.get(file.key)
        size = csv.size if csv else file.size
        width = chunk_bytes if csv or file.name.endswith(".csv") else size
        parts += [
            Chunk(file=file, start=start, stop=min(start + width, size), width=chunk_bytes, csv=csv)
            for start in range(0, size, width)
        ]
    return parts


def blocks(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines of a chunk of a plain file, or of a whole archive, each with its offset in the
    csv.

    A chunk owns the lines that begin in its range. Raises InputError naming the file if it cannot be read.
    """
    name = chunk.file.uri
    with readable(name), fsspec.open(name, "rb") as raw:
        if name.endswith(".csv"):
            # Object stores' files know no limit of a line.
            whole = io.BufferedReader(cast(io.RawIOBase, raw), BLOCK_BYTES)
            yield from range_of_lines(whole, chunk.start, chunk.stop, name)
            return
        with gzip.open(raw) as stream:
            if name.endswith(".csv.gz"):
                yield from _lines(cast(IO[bytes], stream), 0, name)
            else:
                with single_member(cast(IO[bytes], stream), name) as (_, csv):
                    yield from _lines(csv, 0, name)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """What is wrong with a raw file becomes an InputError naming it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.ReadError) as error:
        raise InputError(f"{name}: expected a complete compressed file, but: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: the file vanished while it was read") from error


@contextmanager
def single_member(
    stream: IO[bytes], name: str, bufsize: int = tarfile.RECORDSIZE
) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The one csv of a tar, whose bytes are read in order and to their end.

    The stream is decompressed outside: tarfile takes a truncated one for its end, gzip does not.
    """
    with tarfile.open(fileobj=stream, mode="r|", bufsize=bufsize) as archive:
        members = (member for member in archive if member.isfile())
        if (only := next(members, None)) is None:
            raise InputError(f"{name}: the archive holds no file, expected one csv")
        yield only, cast(IO[bytes], archive.extractfile(only))
        if next(members, None) is not None:
            raise InputError(f"{name}: the archive holds more than one file, expected one csv")
        while stream.read(bufsize):  # padding, after which gzip checks the whole
            pass


def _lines(stream: IO[bytes], offset: int, name: str) -> Iterator[tuple[int, bytes]]:
    while block := stream.read(BLOCK_BYTES):
        _check_line(block, name, offset)
        if not block.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE + 1)
            _check_line(rest, name, offset + len(block))
            block += rest
        yield offset, block
        offset += len(block)


def _check_line(text: bytes, name: str, offset: int) -> None:
    """Refuses a text whose first line does not end in time."""
    if len(text) > LONGEST_LINE and text.find(b"\n", 0, LONGEST_LINE + 1) < 0:
        raise InputError(
            f"{name}: no line ends within {LONGEST_LINE:,} bytes of offset {offset:,}; not a table"
        )


def range_of_lines(raw: IO[bytes], start: int, stop: int, name: str) -> Iterator[tuple[int, bytes]]:
    """Blocks of the lines that begin in [start, stop) of a file, each with its offset."""
    offset = start
    if start:
        raw.seek(start - 1)
        line = raw.readline(LONGEST_LINE + 1)
        _check_line(line, name, start - 1)
        offset = start - 1 + len(line)
    if offset >= stop:
        return
    raw.seek(offset)
    for at, block in _lines(raw, offset, name):
        if at + len(block) >= stop:
            # The line that holds byte stop - 1 is the last of ours: it begins before `stop`.
            end = block.find(b"\n", stop - 1 - at) + 1
            yield at, block[:end] if end else block
            return
        yield at, block

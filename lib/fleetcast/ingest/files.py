"""Raw files: finding them, telling them apart, reading them as blocks of whole lines in bounded memory."""

from __future__ import annotations

import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
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
_LONGEST_LINE = 1 << 20
_FORMATS = (".csv", ".csv.gz", ".tar.gz", ".tgz")


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


class Chunk(Options):
    """What one task reads: all of a compressed file, or a range of a plain one."""

    file: RawFile
    start: int
    stop: int
    width: int
    """The size of chunk that was asked for."""

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
    paths = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
    before = {file.uri: file for file in known}
    files = []
    for path, info in sorted(paths.items()):
        name = path[len(root) + 1 :] or path.rsplit("/", 1)[-1]
        table = _table_of(path, tables)
        if table is None or not path.endswith(_FORMATS):
            log.warning("%s: not a file of a known table, left out", path)
            continue
        uri, size, stamp = fs.unstrip_protocol(path), int(info["size"]), _stamp(info)
        if size == 0:
            raise InputError(f"{path}: the file is empty, expected rows of {table}")
        same = before.get(uri)
        if same is not None and stamp is not None and (same.size, same.stamp) == (size, stamp):
            key = same.key
        else:
            key = content_key(fs, path, size)
        files.append(RawFile(uri=uri, name=name, table=table, size=size, key=key, stamp=stamp))
    if not files:
        raise InputError(
            f"--source {source}: no file of a known table; expected names that begin with "
            f"{', '.join(sorted(tables))} and end in {', '.join(_FORMATS)}"
        )
    return files


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


def chunks(files: list[RawFile], chunk_bytes: int) -> list[Chunk]:
    """Files → the tasks' inputs. Only plain files can be entered in the middle."""
    parts = []
    for file in files:
        width = chunk_bytes if file.name.endswith(".csv") else file.size
        parts += [
            Chunk(file=file, start=start, stop=min(start + width, file.size), width=chunk_bytes)
            for start in range(0, file.size, width)
        ]
    return parts


def blocks(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines of a chunk, each with its offset in the (decompressed) file.

    A chunk owns the lines that begin in its range. Raises InputError naming the file if it cannot be read.
    """
    name = chunk.file.uri
    try:
        with fsspec.open(name, "rb") as raw:
            if name.endswith(".csv"):
                # Object stores' files know no limit of a line.
                whole = io.BufferedReader(cast(io.RawIOBase, raw), BLOCK_BYTES)
                yield from _range_of_lines(whole, chunk.start, chunk.stop, name)
            elif name.endswith(".csv.gz"):
                with gzip.open(raw) as stream:
                    yield from _lines(cast(IO[bytes], stream), 0, name)
            else:
                with _single_member(raw, name) as stream:
                    yield from _lines(stream, 0, name)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.ReadError) as error:
        raise InputError(f"{name}: expected a complete compressed file, but: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: the file vanished while it was read") from error


@contextmanager
def _single_member(raw: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """The one csv of a .tar.gz, as a stream.

    gzip is opened on its own: tarfile takes a truncated stream for its end, gzip does not.
    """
    with gzip.open(raw) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        members = (member for member in archive if member.isfile())
        if (only := next(members, None)) is None:
            raise InputError(f"{name}: the archive holds no file, expected one csv")
        yield cast(IO[bytes], archive.extractfile(only))
        if next(members, None) is not None:
            raise InputError(f"{name}: the archive holds more than one file, expected one csv")
        while stream.read(BLOCK_BYTES):  # padding, after which gzip checks the whole
            pass


def _lines(stream: IO[bytes], offset: int, name: str) -> Iterator[tuple[int, bytes]]:
    while block := stream.read(BLOCK_BYTES):
        _check_line(block, name, offset)
        if not block.endswith(b"\n"):
            rest = stream.readline(_LONGEST_LINE + 1)
            _check_line(rest, name, offset + len(block))
            block += rest
        yield offset, block
        offset += len(block)


def _check_line(text: bytes, name: str, offset: int) -> None:
    """Refuses a text whose first line does not end in time."""
    if len(text) > _LONGEST_LINE and text.find(b"\n", 0, _LONGEST_LINE + 1) < 0:
        raise InputError(
            f"{name}: no line ends within {_LONGEST_LINE:,} bytes of offset {offset:,}; not a table"
        )


def _range_of_lines(raw: IO[bytes], start: int, stop: int, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in [start, stop) of a plain file."""
    offset = start
    if start:
        raw.seek(start - 1)
        line = raw.readline(_LONGEST_LINE + 1)
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

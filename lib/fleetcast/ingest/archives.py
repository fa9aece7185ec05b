"""Archives that are too long for one task: an index, built once, lets every task enter them in the middle.

Who wants to decompress gzip from some place must know the 32 KiB of text before it, as later text may repeat
them, but nothing else. The index holds such seek points, one every 4 MB or so of the decompressed bytes:

    ingested/indexes/<content key>.parquet   a row for each: decompressed, compressed, bits, window
    ingested/indexes/<content key>.json      where the csv lies in the decompressed bytes; written last

`compressed` and `bits` say where the point is in the archive, `window` is what comes before it, by zlib.
Building the index decompresses the archive once, and checks it as a whole.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
import struct
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import rapidgzip

from fleetcast.errors import InputError
from fleetcast.ingest import files
from fleetcast.ingest.files import Chunk, Csv, RawFile
from fleetcast.runtime import log_to, scratch, spread, worker_logs
from fleetcast.store import Store, content_key

log = logging.getLogger("fleetcast")

INDEXES = "ingested/indexes"
_POINT = pa.schema(
    {"decompressed": pa.int64(), "compressed": pa.int64(), "bits": pa.int8(), "window": pa.binary()}
)
#: Seek points that are read at once; a chunk needs two or three groups of them.
_GROUP = 32
#: Ends every archive while its index is built: rapidgzip takes every other truncated one for complete, but
#: then what follows is not read as a gzip member any more.
_MARK = b"fleetcast: the archive is complete"
_MEMBER = gzip.compress(_MARK, mtime=0)
#: Several threads decompress without knowing what comes before, at three times the cost of one that does, so
#: fewer than these are slower; more are faster than a store can be read, and hold 40 MB × compression each.
_LEAST_THREADS, _MOST_THREADS = 4, 16
#: What is fetched from an object store at once, and kept.
_FETCH = {"cache_type": "background", "block_size": 8 << 20, "cache_options": {"maxblocks": 8}}
#: What is decompressed and passed over at once: little enough to stay in the processor's cache.
_STRIDE = 256 << 10
#: Seconds between two lines of progress.
_PATIENCE = 10


class Point(NamedTuple):
    """A seek point, as it is in the index."""

    decompressed: int
    compressed: int
    bits: int
    window: bytes


def index_archives(store: Store, found: list[RawFile], chunk_bytes: int) -> dict[str, Csv]:
    """Indexes the archives among the files that are larger than a chunk, unless they have been before.

    Returns where their csv lies, by their keys. Raises InputError naming what is no complete archive of one
    csv.
    """
    large = [file for file in found if file.size > chunk_bytes and not file.name.endswith(".csv")]
    new = [file for file in large if not store.exists(_contents_file(file))]
    if new:
        log.info("ingest: %d archives to index, %.1f GB", len(new), sum(file.size for file in new) / 1e9)
        threads = _threads(len(new))
        with worker_logs() as queue:

            def work(item: dict[str, Any]) -> dict[str, Any]:
                file = RawFile(**item)
                sender = log_to(queue, file.name)
                try:
                    return build_index(store, file, threads)
                finally:
                    sender.stop()

            spread([file.model_dump() for file in new], work, "ingest: archives", measure="bytes")
    return {file.key: contents(store, file) for file in large}


def contents(store: Store, file: RawFile) -> Csv:
    """Where the csv lies in an archive that has an index."""
    return Csv(**store.read_json(_contents_file(file)))


def drop_other_indexes(store: Store, found: Iterable[RawFile]) -> None:
    """Deletes the indexes of files that have been replaced."""
    keys = {file.key for file in found}
    for path in store.list(INDEXES):
        if path.rsplit("/", 1)[-1].split(".")[0] not in keys:
            store.remove(path)


def _contents_file(file: RawFile) -> str:
    return f"{INDEXES}/{file.key}.json"


def _points_file(file: RawFile) -> str:
    return f"{INDEXES}/{file.key}.parquet"


def _threads(archives: int) -> int:
    """Those of a task, if the CPUs of a node are shared by so many."""
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)) // archives)
    return threads if threads >= _LEAST_THREADS else 1


# -- building ---------------------------------------------------------------------------------------------


def build_index(store: Store, file: RawFile, threads: int) -> dict[str, Any]:
    """Reads an archive from end to end and writes its index; returns how many bytes it has.

    Raises InputError naming what is no complete archive of one csv.
    """
    with _open(file) as raw:
        marked = _Marked(raw, file)
        with _decompressing(file, marked, threads) as stream:
            text = _Tail(stream)
            csv = _find_csv(text, file)
            stream.join_threads()  # and with them goes what they hold
            with scratch() as folder:
                exported = Path(folder) / "index"
                with exported.open("wb") as target:
                    stream.export_index(target, rapidgzip.IndexFormat.GZTOOL)
                with exported.open("rb") as source, store.write(_points_file(file)) as target:
                    _write_points(source, target, Point(text.position - len(_MARK), file.size, 0, b""))
    store.write_json(_contents_file(file), csv.model_dump())
    return {"bytes": file.size}


def _find_csv(stream: _Tail, file: RawFile) -> Csv:
    """Reads all that is decompressed, in order: only then does rapidgzip check it."""
    begin, size = 0, None
    if file.name.endswith(".csv.gz"):
        while stream.read(_STRIDE):
            pass
    else:
        with files.single_member(cast(IO[bytes], stream), file.uri, _STRIDE) as (member, _):
            if member.issparse():
                raise InputError(f"{file.uri}: the archive holds a sparse file, expected one csv")
            begin, size = member.offset_data, member.size
    end = stream.position - len(_MARK)
    if stream.tail != _MARK or (size is not None and begin + size > end):
        raise InputError(f"{file.uri}: expected a complete compressed file, but: it ends too early")
    csv = Csv(begin=begin, size=end if size is None else size)
    if not csv.size:
        raise InputError(f"{file.uri}: the file is empty, expected rows of {file.table}")
    return csv


def _write_points(exported: IO[bytes], target: IO[bytes], end: Point) -> None:
    """An index in the format of gztool → Parquet, a few points at a time; the last is the archive's end."""
    before = (point for point in _read_points(exported) if point.decompressed < end.decompressed)
    with pq.ParquetWriter(target, _POINT, compression="none") as writer:
        points = chain(before, [end])
        while group := list(islice(points, _GROUP)):
            writer.write_table(pa.Table.from_pylist([point._asdict() for point in group], _POINT))


class _Marked(io.RawIOBase):
    """An archive with one more member, which holds the mark. Logs how much has been read."""

    def __init__(self, raw: IO[bytes], file: RawFile) -> None:
        self.raw, self.size = raw, file.size
        self.position = 0
        self.error: Exception | None = None
        self.furthest, self.logged = 0, time.monotonic()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size + len(_MEMBER)}
        self.position = base[whence] + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._at(self.position, len(buffer))
        except Exception as error:
            self.error = error  # rapidgzip loses it
            raise
        buffer[: len(data)] = data
        self.position += len(data)
        self._progress()
        return len(data)

    def _at(self, position: int, size: int) -> bytes:
        if position >= self.size:
            return _MEMBER[position - self.size :][:size]
        self.raw.seek(position)
        return self.raw.read(min(size, self.size - position))

    def _progress(self) -> None:
        self.furthest = max(self.furthest, self.position)
        if (now := time.monotonic()) - self.logged > _PATIENCE:
            self.logged = now
            log.info("%.1f of %.1f GB indexed", self.furthest / 1e9, self.size / 1e9)


class _Tail:
    """A stream that can only be read on, and how it ended."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.position = 0
        self.tail = b""

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.position += len(data)
        self.tail = (self.tail + data[-len(_MARK) :])[-len(_MARK) :]
        return data


# -- reading ----------------------------------------------------------------------------------------------


def blocks(store: Store, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """As `files.blocks`, of a chunk of an indexed archive: decompresses little more than its range."""
    assert chunk.csv is not None, "only indexed archives have chunks of their csv"
    begin, end = chunk.csv.begin, chunk.csv.begin + chunk.csv.size
    # From the byte before the range to the end of the last line that begins in it.
    last = min(end, begin + chunk.stop + files.LONGEST_LINE + 1)
    points = _points(store, chunk.file, begin + max(0, chunk.start - 1), last)
    with _open(chunk.file) as raw, _decompressing(chunk.file, raw, 1) as stream:
        stream.import_index(io.BytesIO(_slice(points)))
        with io.BufferedReader(_Part(stream, begin, end)) as csv:
            yield from files.range_of_lines(csv, chunk.start, chunk.stop, chunk.file.uri)


def _points(store: Store, file: RawFile, start: int, stop: int) -> list[Point]:
    """The seek points from the last before `start` to the first after `stop` of the decompressed bytes."""
    with store.fs.open(store.path(_points_file(file)), "rb") as source:
        index = pq.ParquetFile(source)
        groups = [index.metadata.row_group(i).column(0).statistics for i in range(index.num_row_groups)]
        first = bisect_right([group.min for group in groups], start) - 1
        last = bisect_left([group.max for group in groups], stop)
        points = [Point(**row) for row in index.read_row_groups(range(first, last + 1)).to_pylist()]
    offsets = [point.decompressed for point in points]
    return points[bisect_right(offsets, start) - 1 : bisect_left(offsets, stop) + 1]


class _Part(io.RawIOBase):
    """The bytes [begin, end) of a stream as a file."""

    def __init__(self, stream: Any, begin: int, end: int) -> None:
        self.stream, self.begin, self.end = stream, begin, end
        stream.seek(begin)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self.begin, io.SEEK_CUR: self.stream.tell(), io.SEEK_END: self.end}
        return int(self.stream.seek(base[whence] + offset)) - self.begin

    def readinto(self, buffer: Any) -> int:
        left = self.end - self.stream.tell()
        return int(self.stream.readinto(memoryview(buffer)[: max(0, left)]))


# -- the archive and its index as rapidgzip takes them ----------------------------------------------------


@contextmanager
def _open(file: RawFile) -> Iterator[IO[bytes]]:
    """The archive, if it is still the one that was found."""
    with files.readable(file.uri):
        fs, path = fsspec.core.url_to_fs(file.uri)
        fs.invalidate_cache()
        size = int(fs.size(path))
        if size != file.size or content_key(fs, path, size) != file.key:
            raise InputError(f"{file.uri}: the file was replaced while it was read; run the job again")
        with fs.open(path, "rb", **_FETCH) as raw:
            yield raw


@contextmanager
def _decompressing(file: RawFile, raw: IO[bytes] | _Marked, threads: int) -> Iterator[Any]:
    try:
        with rapidgzip.open(raw, parallelization=threads) as stream:
            yield stream
    except (RuntimeError, ValueError) as error:
        if isinstance(raw, _Marked) and raw.error:
            raise raw.error from error
        reason, *_ = str(error).splitlines() or [""]
        raise InputError(f"{file.uri}: expected a complete compressed file, but: {reason}") from error


_HEADER = struct.Struct(">8x8sQQ")
_HEAD = struct.Struct(">QQII")
_SIZE = struct.Struct(">Q")


def _read_points(exported: IO[bytes]) -> Iterator[Point]:
    _, count, _ = _HEADER.unpack(exported.read(_HEADER.size))
    for _ in range(count):
        decompressed, compressed, bits, width = _HEAD.unpack(exported.read(_HEAD.size))
        yield Point(decompressed, compressed, bits, exported.read(width))


def _slice(points: list[Point]) -> bytes:
    """An index that knows these points alone, for which the last one is the end of all."""
    packed = [_HEAD.pack(p.decompressed, p.compressed, p.bits, len(p.window)) + p.window for p in points]
    return b"".join(
        [_HEADER.pack(b"gzipindx", len(packed), len(packed)), *packed, _SIZE.pack(points[-1].decompressed)]
    )

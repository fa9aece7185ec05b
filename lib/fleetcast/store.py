"""The store: the one place that knows folders and file systems (a local path or `s3://`).

    telemetry/  entities/  dependencies/  rejected/  windows/  models/  forecasts/  reports/

Each noun is a folder of Parquet and JSON files, readable by anything. `ingested/` holds each raw file's share
of the telemetry, which is what lets a later file be added without reading the earlier ones again. `_work/`
holds what jobs keep for their own resumption and may be deleted when none runs. `levels/<level>` is a store
of its own for one level of the hierarchy, with the telemetry of the store that it lies in.

Every file is written whole or not at all: locally through a temporary name and a rename, on object stores by
their own put. A folder that readers take as one thing (`publish`) appears at once locally; on object stores
its `manifest.json` is written last, and readers ask for that.
"""

from __future__ import annotations

import errno
import hashlib
import json
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from fleetcast import __version__
from fleetcast.config import S3Options
from fleetcast.errors import InputError, in_one_line

#: Version of the folders and schemas below the store's root.
FORMAT = 1
MANIFEST = "manifest.json"
#: Which raw files, in which settings, the telemetry is made of.
ACCEPTED = "ingested/manifest.json"
#: A level's store lies in its store's folder of this name.
_LEVELS = "levels"
#: What a level's store has in common with the one it lies in.
_SHARED = frozenset({"telemetry", "entities", "dependencies", "rejected", "ingested", "raw"})
#: A raw file is told from others by its size and these many bytes of its head and of its tail.
_KEY_BYTES = 1 << 20
#: A table that is smaller is read from an object store by one request [bytes].
_AT_ONCE = 2 << 20
#: Files of an object store that are read at once: it answers late, but many at a time.
_CONNECTIONS = 16
#: A disk on which less is free is full [bytes].
_NO_ROOM = 1 << 16


#: Named, not imported: who works on a folder does not wait for it.
for _protocol in ("s3", "s3a"):
    fsspec.register_implementation(_protocol, "fleetcast.s3.S3FileSystem", clobber=True)


def use_s3(options: S3Options | dict[str, Any]) -> None:
    """Sets how this process reaches `s3://` from now on: by options, or as another process's `s3_settings`.

    A `Store` keeps the settings with which it was made, and takes them along to other processes.
    """
    if isinstance(options, S3Options):
        o = options
        found: dict[str, Any] = {
            "endpoint_url": o.endpoint_url,
            "profile": o.profile,
            "client_kwargs": {"region_name": o.region} if o.region else None,
            "config_kwargs": {
                "connect_timeout": o.connect_timeout,
                "read_timeout": o.read_timeout,
                "retries": {"mode": "standard", "total_max_attempts": o.attempts},
                "max_pool_connections": o.max_connections,
            },
        }
        options = s3_settings() | {name: value for name, value in found.items() if value is not None}
    fsspec.config.conf["s3"] = options


def s3_settings() -> dict[str, Any]:
    """How this process reaches `s3://`, as fsspec has it."""
    return dict(fsspec.config.conf.get("s3", {}))


def fingerprint(value: Any) -> str:
    """A short digest of a JSON-like value: equal values, equal digests, on every machine."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def content_key(fs: Any, path: str, size: int) -> str:
    """A short digest of a file's content, from its size, head and tail."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    head = fs.cat_file(path, end=_KEY_BYTES)  # a range: an opened file would read far ahead
    digest.update(head)
    digest.update(head if size <= _KEY_BYTES else fs.cat_file(path, start=size - _KEY_BYTES, end=size))
    return digest.hexdigest()


def _names(folder: str) -> list[str]:
    return [entry.name for entry in Path(folder).iterdir()] if Path(folder).is_dir() else []


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a file could not be written for want of room, whatever the library that wrote it says."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None
    return shutil.disk_usage(folder).free < _NO_ROOM


class _Ranges(pafs.FSSpecHandler):
    """Arrow asks for the ranges of a Parquet file that it needs; what lies between them is not read."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def arrow(fs: Any) -> pafs.FileSystem:
    """The same file system for Arrow and Ray."""
    return pafs.LocalFileSystem() if isinstance(fs, LocalFileSystem) else pafs.PyFileSystem(_Ranges(fs))


class Store:
    """A root folder on a file system. Picklable; cheap to make; safe to use from many processes."""

    def __init__(self, uri: str) -> None:
        """Raises InputError if the URI's file system is unknown."""
        self.uri = uri.rstrip("/") or "/"
        try:
            self.fs, root = fsspec.core.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"--store {uri}: expected a folder or s3://bucket/prefix ({error})") from error
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        above, _, name = self.root.rpartition(f"/{_LEVELS}/")
        self._above = above if above and "/" not in name else self.root

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    # -- the store itself ----------------------------------------------------------------------------------

    def open_or_create(self) -> Store:
        """Marks an empty folder as a store; refuses one of another format, or a place that cannot be used."""
        try:
            return self._open_or_create()
        except OSError as error:
            raise InputError(f"--store {self.uri}: cannot be used ({in_one_line(error)})") from error

    def _open_or_create(self) -> Store:
        if self.local and Path(self.root).is_file():
            raise InputError(f"--store {self.uri}: is a file, expected a folder")
        mark = self.read_json("store.json")
        if mark is None:
            if self.local and any(not name.startswith(".tmp-") for name in _names(self.root)):
                raise InputError(f"--store {self.uri}: the folder holds other files and no store.json")
            self.write_json("store.json", {"format": FORMAT, "created_by": f"fleetcast {__version__}"})
        elif mark.get("format") != FORMAT:
            raise InputError(
                f"--store {self.uri}: written in format {mark.get('format')!r} by "
                f"{mark.get('created_by')!r}, fleetcast {__version__} expects format {FORMAT}"
            )
        return self

    def open_existing(self) -> Store:
        """Refuses a URI that is not a store yet, then as `open_or_create`."""
        try:
            found = self.exists("store.json")
        except OSError as error:
            raise InputError(f"--store {self.uri}: cannot be used ({in_one_line(error)})") from error
        if not found:
            raise InputError(f"--store {self.uri}: no store there (store.json is missing); run ingest first")
        return self.open_or_create()

    def level(self, name: str) -> Store:
        """The store of one level: its own windows, models and forecasts, with the telemetry of this one."""
        return Store(f"{self.uri}/{_LEVELS}/{name}")

    # -- paths ---------------------------------------------------------------------------------------------

    def path(self, *parts: str) -> str:
        """The file system's own path of a place in the store."""
        return "/".join([self._root(parts[0] if parts else ""), *parts])

    def _root(self, relative: str) -> str:
        """Of what lies at a place in the store."""
        return self._above if relative.split("/", 1)[0] in _SHARED else self.root

    def exists(self, relative: str) -> bool:
        """Whether there is a file or folder."""
        return bool(self.fs.exists(self.path(relative)))

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Files below a folder, however deep, relative to the store, in order; [] if there is none."""
        start = len(self._root(folder)) + 1
        # Some object stores find a folder in which nothing is left as if it were a file.
        names = (n[start:] for n in self.fs.find(self.path(folder)) if n != self.path(folder).rstrip("/"))
        return sorted(n for n in names if n.endswith(suffix) and not Path(n).name.startswith(".tmp-"))

    def has(self, files: Iterable[str]) -> bool:
        """Whether all of these files are there. What they have in common of their folders is listed, one
        listing for each noun; the files are not asked for."""
        folders: dict[str, list[str]] = {}
        for name in files:
            folders.setdefault(name.split("/", 1)[0], []).append(name)
        return all(
            set(names).issubset(self.list(posixpath.commonpath([posixpath.dirname(n) for n in names])))
            for names in folders.values()
        )

    def remove(self, relative: str) -> None:
        """Deletes a file or a whole folder; nothing if there is none."""
        if self.exists(relative):
            self.fs.rm(self.path(relative), recursive=True)

    # -- files ---------------------------------------------------------------------------------------------

    @contextmanager
    def write(self, relative: str) -> Iterator[IO[bytes]]:
        """A binary file that appears under its name only when the block ends without an error."""
        final = self.path(relative)
        # A stream to an object store would be put even where the block fails, so it is written here first.
        folder = Path(final).parent if self.local else Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{uuid.uuid4().hex}-{Path(final).name}"
        try:
            with temporary.open("wb") as file:
                yield file
            if self.local:
                temporary.replace(final)
            else:
                self.fs.put_file(str(temporary), final)
        except Exception as error:
            if not _is_full(error, folder):
                raise
            expected = "more room there" if self.local else "more room there, or TMPDIR on another disk"
            why = f"no room for {self.uri}/{relative}, expected {expected}"
            raise OSError(errno.ENOSPC, why, str(folder)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def read_bytes(self, relative: str) -> bytes:
        """A whole file."""
        return bytes(self.fs.cat_file(self.path(relative)))

    def read_json(self, relative: str) -> Any:
        """A JSON file, or None if there is none."""
        try:
            return json.loads(self.read_bytes(relative))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{self.uri}/{relative}: not valid JSON: {error}") from error

    def write_json(self, relative: str, value: Any) -> None:
        """A JSON file, whole or not at all."""
        with self.write(relative) as file:
            file.write(json.dumps(value, indent=1, allow_nan=False).encode())

    def read_table(self, relative: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One Parquet file."""
        path = self.path(relative)
        if not self.local:
            # An object store takes longer for one more request than for a few columns that are not wanted.
            start = self.fs.cat_file(path, start=0, end=_AT_ONCE)
            if len(start) < _AT_ONCE:
                return pq.read_table(pa.BufferReader(start), columns=columns)
        return pq.read_table(path, columns=columns, filesystem=self.arrow_fs, partitioning=None)

    def write_table(self, relative: str, table: pa.Table) -> None:
        """One Parquet file, whole or not at all."""
        with self.write(relative) as file:
            pq.write_table(table, file, compression="zstd", row_group_size=1 << 18)

    def write_row_groups(self, relative: str, table: pa.Table, starts: Sequence[int]) -> None:
        """One file with the rows of a table in groups, each from its start to the next one's, of which
        `read_row_groups` finds each by its number; whole or not at all.

        It is Arrow's file format: to find one group of thousands costs next to nothing, where Parquet would
        have each reader parse the figures of all of them.
        """
        whole = table.combine_chunks()  # a group is one record batch
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with self.write(relative) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
            for low, high in pairwise([*starts, len(table)]):
                writer.write_table(whole.slice(low, high - low))

    def read_row_groups(self, groups: Sequence[tuple[str, int]]) -> pa.Table:
        """The rows of groups, each named by its file and number there, in their order; of one or more. A
        column that a file does not have is null."""

        def read(group: tuple[str, int]) -> pa.Table:
            with self.arrow_fs.open_input_file(self.path(group[0])) as file:
                return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(group[1])])

        if self.local:
            found = list(map(read, groups))
        else:
            with ThreadPoolExecutor(_CONNECTIONS) as threads:
                found = list(threads.map(read, groups))
        return pa.concat_tables(found, promote_options="default")

    # -- folders -------------------------------------------------------------------------------------------

    def publish(self, staging: str, folder: str) -> None:
        """Moves a finished folder, whose manifest.json is complete, to the name its readers use.

        Locally a rename, before which what had the name is moved away: readers may find nothing for a moment,
        but never a mixture. Object stores have none, so the files are copied and the manifest last.
        """
        if self.local:
            target = Path(self.path(folder))
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                old = self.path("_work", f"replaced-{uuid.uuid4().hex}")
                Path(old).parent.mkdir(parents=True, exist_ok=True)
                target.rename(old)
                Path(self.path(staging)).rename(target)
                self.fs.rm(old, recursive=True)
            else:
                Path(self.path(staging)).rename(target)
            return
        files = self.list(staging)
        self.remove(f"{folder}/{MANIFEST}")
        self.remove(folder)
        for last in (False, True):
            part = [name for name in files if (name == f"{staging}/{MANIFEST}") == last]
            to = [self.path(folder + name[len(staging) :]) for name in part]
            self.fs.copy([self.path(name) for name in part], to)
        self.remove(staging)

    # -- other libraries -----------------------------------------------------------------------------------

    @property
    def arrow_fs(self) -> pafs.FileSystem:
        """The same file system for Arrow and Ray."""
        return arrow(self.fs)

"""An archive longer than a chunk is split by an index: the same rows as of a plain csv, each exactly once."""

import gzip
import io
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fleetcast.errors import InputError
from fleetcast.ingest import archives, files
from fleetcast.ingest.files import Chunk, chunks, discover
from fleetcast.ingest.options import IngestOptions
from fleetcast.ingest.run import ingest
from fleetcast.store import Store

TABLES = ("machine_usage",)
MB = 1 << 20


def csv(rows: int, seed: int = 0) -> bytes:
    """Rows of machine_usage over two days, each thousandth of them broken."""
    rng = np.random.default_rng(seed)
    machines, stamps = rng.integers(20, size=rows), rng.integers(2 * 86_400, size=rows)
    values = rng.integers(10_000, size=(rows, 7)) / 100
    return b"".join(
        b"broken %d\n" % i
        if i % 1000 == 7
        else b"m_%d,%d,%s\n" % (machines[i], stamps[i], ",".join(map(str, values[i])).encode())
        for i in range(rows)
    )


ROWS = csv(170_000)  # 9 MB, of which gzip leaves more than 3: seek points are 4 MB apart
FILE = b"".join(ROWS.splitlines(keepends=True)[:1000])


def gz(text: bytes, level: int = 1) -> bytes:
    return gzip.compress(text, level, mtime=0)


def members(width: int) -> Callable[[bytes], bytes]:
    """As pigz, bgzip or `cat a.gz b.gz` write it: one gzip member after another."""
    return lambda text: b"".join(gz(text[at : at + width]) for at in range(0, len(text), width))


def tar(*texts: bytes, format: int = tarfile.GNU_FORMAT) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=format) as target:
        folder = tarfile.TarInfo("a/folder")
        folder.type = tarfile.DIRTYPE
        target.addfile(folder)
        for number, text in enumerate(texts):
            member = tarfile.TarInfo(f"{number}{'-long' * 40}.csv")
            member.size = len(text)
            target.addfile(member, io.BytesIO(text))
    return archive.getvalue()


PACKED = {
    "one member": (".csv.gz", gz(ROWS)),
    "several members": (".csv.gz", members(2_000_003)(ROWS)),
    "many members": (".csv.gz", members(65_280)(ROWS)),
    "not compressed": (".csv.gz", gz(ROWS, 0)),
    "GNU tar": (".tar.gz", gz(tar(ROWS))),
    "pax tar": (".tgz", gz(tar(ROWS, format=tarfile.PAX_FORMAT))),
    "tar in several members": (".tar.gz", members(2_000_003)(tar(ROWS))),
}


@pytest.fixture
def split(tmp_path, tasks) -> Callable[..., list[Chunk]]:
    """`split(name, content, chunk_bytes)` → the chunks of a file, indexed in `store`."""

    def work(name: str, content: bytes, chunk_bytes: int = MB) -> list[Chunk]:
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"machine_usage{name}").write_bytes(content)
        found = discover(str(tmp_path / "raw"), TABLES)
        return chunks(found, chunk_bytes, archives.index_archives(store(tmp_path), found, chunk_bytes))

    return work


def store(folder: Path) -> Store:
    return Store(str(folder / "store"))


def ingested_apart(folder: Path, name: str, content: bytes, **options) -> tuple[Store, dict]:
    """The store and the figures of a file in a folder of its own."""
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / f"machine_usage{name}").write_bytes(content)
    made = store(folder)
    return made, ingest(made, str(folder / "raw"), IngestOptions(**options))


def counts(figures: dict) -> dict:
    return {k: v for k, v in figures.items() if k not in ("peak_bytes", "stage_seconds", "stage_peak_bytes")}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("chunk_bytes", [300_001, MB, 3 * MB])
def test_every_chunk_is_that_of_the_plain_csv(tmp_path, split, monkeypatch, packed, chunk_bytes):
    monkeypatch.setattr(files, "BLOCK_BYTES", 100_000)
    name, content = PACKED[packed]
    found = split(name, content, chunk_bytes)
    (tmp_path / "machine_usage.csv").write_bytes(ROWS)
    plain = chunks(discover(str(tmp_path / "machine_usage.csv"), TABLES), chunk_bytes, {})
    assert [(chunk.start, chunk.stop) for chunk in found] == [(chunk.start, chunk.stop) for chunk in plain]
    assert len({chunk.id for chunk in found}) == len(found)
    for one, other in zip(found, plain, strict=True):
        assert list(archives.blocks(store(tmp_path), one)) == list(files.blocks(other))


@pytest.mark.parametrize("packed", PACKED)
def test_an_index_that_several_threads_have_built_is_as_good(tmp_path, packed):
    name, content = PACKED[packed]
    (tmp_path / f"machine_usage{name}").write_bytes(content)
    (file,) = discover(str(tmp_path / f"machine_usage{name}"), TABLES)
    archives.build_index(store(tmp_path), file, threads=4)
    found = chunks([file], 3 * MB, {file.key: archives.contents(store(tmp_path), file)})
    read = [block for chunk in found for _, block in archives.blocks(store(tmp_path), chunk)]
    assert b"".join(read) == ROWS


def chunks_of(made: Store) -> int:
    """How many chunks the parts of a store came of; a chunk numbers its parts of a place."""
    return len({path.rsplit("/", 1)[-1].rsplit("-", 1)[0] for path in made.list("ingested/parts/machine")})


@pytest.mark.parametrize("form", [".csv.gz", ".tar.gz"])
def test_an_archive_gives_what_its_csv_gives_and_what_it_gives_read_whole(tmp_path, tasks, table, form):
    content = gz(ROWS) if form == ".csv.gz" else gz(tar(ROWS))
    plain, expected = ingested_apart(tmp_path / "plain", ".csv", ROWS, chunk_mb=1)
    parts, figures = ingested_apart(tmp_path / "split", form, content, chunk_mb=1)
    whole, at_once = ingested_apart(tmp_path / "whole", form, content)
    assert chunks_of(parts) == len(ROWS) // MB + 1
    assert chunks_of(whole) == 1
    assert not whole.list(archives.INDEXES)
    assert counts(figures) == counts(expected) == counts(at_once)
    assert figures["raw_bytes"] == len(ROWS)
    for folder in ("telemetry", "rejected", "entities", "dependencies"):
        rows = [table(each, folder) for each in (plain, parts, whole)]
        named = [frame.drop("file", strict=False) for frame in rows]
        assert named[0].equals(named[1])
        assert named[0].select(pl.exclude(pl.Float32)).equals(named[2].select(pl.exclude(pl.Float32)))
        for column in named[0].select(pl.col(pl.Float32)).columns:  # sums of floats in another order
            np.testing.assert_allclose(named[0][column], named[2][column], rtol=1e-6)
    for offset, line in table(parts, "rejected").select("offset", "line").iter_rows():
        assert ROWS[offset:].startswith(line.encode() + b"\n")


def test_an_index_is_built_once_for_every_chunk_size_and_goes_with_its_file(tmp_path, tasks, table):
    raw = tmp_path / "a" / "raw" / "machine_usage.csv.gz"
    made, _ = ingested_apart(tmp_path / "a", ".csv.gz", gz(ROWS), chunk_mb=1)
    index = made.list(archives.INDEXES)
    stamps = [made.fs.modified(made.path(path)) for path in index]
    (raw.parent / "machine_usage-2.csv").write_bytes(csv(1000, seed=1))
    ingest(made, str(raw.parent), IngestOptions(chunk_mb=2))
    assert made.list(archives.INDEXES) == index
    assert [made.fs.modified(made.path(path)) for path in index] == stamps

    raw.write_bytes(gz(csv(130_000, seed=2)))
    ingest(made, str(raw.parent), IngestOptions(chunk_mb=1))
    replaced = made.list(archives.INDEXES)
    assert len(replaced) == len(index) == 2
    assert not set(replaced) & set(index)
    raw.write_bytes(gz(csv(1000, seed=3)))
    ingest(made, str(raw.parent), IngestOptions(chunk_mb=1))
    assert not made.list(archives.INDEXES)


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_job_that_died_goes_on_from_what_is_complete(tmp_path, tasks, table, after):
    whole, expected = ingested_apart(tmp_path / "whole", ".csv.gz", gz(ROWS), chunk_mb=2)
    all_tasks = tasks.done
    tasks.done, tasks.dies_after = 0, after
    with pytest.raises(KeyboardInterrupt):
        ingested_apart(tmp_path / "died", ".csv.gz", gz(ROWS), chunk_mb=2)
    tasks.dies_after = None
    made = store(tmp_path / "died")
    figures = ingest(made, str(tmp_path / "died" / "raw"), IngestOptions(chunk_mb=2))
    assert tasks.done == all_tasks
    assert counts(figures) == counts(expected)
    assert table(made, "telemetry").equals(table(whole, "telemetry"))


CUTS = (1, 4, 8, 9, 100, 1000, 5000, 155_001, 605_004, 1_205_008, 2_255_015)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "content",
    [
        *[gz(ROWS)[:-missing] for missing in CUTS],
        members(2_000_003)(ROWS)[:-MB],
        gz(ROWS) + gz(FILE)[:-8],
        flipped(gz(ROWS), -6),
        flipped(gz(ROWS), -2),
        flipped(gz(ROWS), 2 * MB),
        flipped(gz(ROWS, 0), 5 * MB),
        flipped(members(2_000_003)(ROWS), len(gz(ROWS[:2_000_003])) - 6),
        gz(ROWS) + b"x",
        gz(ROWS) + b"no gzip member at all" * 10,
        np.random.default_rng(0).bytes(2 * MB),
    ],
    ids=[
        *[f"{missing} bytes missing" for missing in CUTS],
        "later members cut",
        "last footer missing",
        "checksum",
        "length",
        "text",
        "text that is not compressed",
        "checksum of the first member",
        "one byte more",
        "more bytes",
        "no gzip",
    ],
)
def test_a_damaged_archive_is_named_before_any_row_counts(tmp_path, tasks, content):
    with pytest.raises(InputError, match=r"machine_usage\.csv\.gz: expected a complete compressed file"):
        ingested_apart(tmp_path, ".csv.gz", content, chunk_mb=1)
    assert not store(tmp_path).list("ingested/parts")
    assert not store(tmp_path).list(archives.INDEXES)
    (file,) = discover(str(tmp_path / "raw"), TABLES)
    with pytest.raises(InputError, match=r"machine_usage\.csv\.gz: expected a complete compressed file"):
        archives.build_index(store(tmp_path), file, threads=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gz(tar(ROWS))[:-MB], "expected a complete compressed file"),
        (gz(tar(ROWS)[: 8 * MB]), "expected a complete compressed file, but: unexpected end of data"),
        (gz(tar(ROWS + FILE)[: 512 * 7 + len(ROWS)]), "expected a complete compressed file"),
        (gz(ROWS), "expected a complete compressed file"),
        (gz(tar(FILE, ROWS)), "the archive holds more than one file, expected one csv"),
        (gz(tar(ROWS, b"")), "the archive holds more than one file, expected one csv"),
        (np.random.default_rng(0).bytes(2 * MB), "expected a complete compressed file"),
        (gz(tar()) + gz(b"") * 100_000, "the archive holds no file, expected one csv"),
        (gz(tar(b"")) + gz(b"") * 100_000, "the file is empty, expected rows of machine_usage"),
    ],
    ids=["gzip", "tar", "tar after its file", "no tar", "two", "an empty one", "noise", "none", "empty"],
)
def test_what_is_no_tar_of_one_csv_is_named(tmp_path, tasks, content, message):
    with pytest.raises(InputError, match=rf"machine_usage\.tar\.gz: {message}"):
        ingested_apart(tmp_path, ".tar.gz", content, chunk_mb=1)


def test_a_file_that_is_replaced_or_vanishes_between_index_and_reading_is_named(tmp_path, split):
    _, second, *_ = split(".csv.gz", gz(ROWS))
    path = tmp_path / "raw" / "machine_usage.csv.gz"
    for other in (gz(ROWS[:-100]), flipped(path.read_bytes(), -1)):
        path.write_bytes(other)
        with pytest.raises(InputError, match=r"usage.csv.gz: the file was replaced while it was read"):
            list(archives.blocks(store(tmp_path), second))
    path.unlink()
    with pytest.raises(InputError, match=r"machine_usage.csv.gz: the file vanished while it was read"):
        list(archives.blocks(store(tmp_path), second))


@pytest.mark.parametrize("group", [1, 2, 3, 32])
def test_a_chunk_reads_little_more_of_the_archive_than_its_range(tmp_path, split, monkeypatch, group):
    """Else many tasks would be no faster than one."""
    monkeypatch.setattr(archives, "_GROUP", group)
    found = split(".csv.gz", gz(ROWS), MB)
    points = archives._points(store(tmp_path), found[0].file, 0, len(ROWS))
    apart = max(b.decompressed - a.decompressed for a, b in pairwise(points))
    for chunk in found:
        near = archives._points(store(tmp_path), chunk.file, chunk.start, chunk.stop)
        assert near[0].decompressed <= chunk.start
        assert near[-1].decompressed >= chunk.stop
        assert near[-1].decompressed - near[0].decompressed < MB + 2 * apart
    assert apart < 6 * MB


def test_archives_on_an_object_store(tmp_path, tasks, table, object_store, monkeypatch):
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    fs = object_store.fs()
    fs.pipe("fleet/archives/raw/machine_usage.tar.gz", gz(tar(ROWS)))
    made = Store("s3://fleet/archives/store")
    figures = ingest(made, "s3://fleet/archives/raw", IngestOptions(chunk_mb=1))
    plain, expected = ingested_apart(tmp_path, ".csv", ROWS, chunk_mb=1)
    assert counts(figures) == counts(expected)
    assert table(made, "telemetry").equals(table(plain, "telemetry"))
    (chunk, *_) = _chunks(made, "s3://fleet/archives/raw")
    fs.pipe("fleet/archives/raw/machine_usage.tar.gz", gz(tar(ROWS[:-1000])))
    with pytest.raises(InputError, match=r"machine_usage.tar.gz: the file was replaced while it was read"):
        list(archives.blocks(made, chunk))


def _chunks(made: Store, source: str) -> list[Chunk]:
    found = discover(source, TABLES)
    return chunks(found, MB, archives.index_archives(made, found, MB))


def test_under_ray_an_archive_is_split_and_a_damaged_one_named(tmp_path, ray_cluster):
    _, expected = ingested_apart(tmp_path / "plain", ".csv", ROWS, chunk_mb=1)
    made, figures = ingested_apart(tmp_path / "split", ".csv.gz", gz(ROWS), chunk_mb=1)
    assert counts(figures) == counts(expected)
    (tmp_path / "split" / "raw" / "machine_usage-2.csv.gz").write_bytes(gz(csv(170_000, seed=4))[:-9])
    with pytest.raises(InputError, match=r"machine_usage-2.csv.gz: expected a complete compressed file"):
        ingest(made, str(tmp_path / "split" / "raw"), IngestOptions(chunk_mb=1))

"""Raw files are found, told apart, and read as blocks of whole lines; what cannot be read is named."""

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fleetcast.errors import InputError
from fleetcast.ingest import files
from fleetcast.ingest.files import Chunk, blocks, chunks, discover

TABLES = ("machine_usage", "machine_meta", "batch_task")
ROWS = b"".join(b"m_%d,%s\n" % (i, b"x" * (i % 37)) for i in range(400))


def tar_gz(*contents: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for number, content in enumerate(contents):
            member = tarfile.TarInfo(f"{number}.csv")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def noise(size: int) -> bytes:
    """Bytes that neither compress nor end a line."""
    return np.random.default_rng(0).bytes(size).replace(b"\n", b" ")


def read(path: Path, chunk_bytes: int = 1 << 30) -> list[list[tuple[int, bytes]]]:
    """The blocks of each chunk of a file."""
    return [list(blocks(chunk)) for chunk in chunks(discover(str(path), TABLES), chunk_bytes, {})]


@pytest.fixture
def put(tmp_path) -> Callable[[str, bytes], Path]:
    def write(name: str, content: bytes = b"m_1,1\n") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def test_a_file_belongs_to_the_table_that_its_name_begins_with_or_its_folder_is_called(put, tmp_path):
    put("b/machine_usage-00007.csv.gz")
    put("machine_meta.csv")
    put("machine_usage/part-3.tgz")
    put("batch_task_2018.tar.gz")
    for other in ("README.md", "machine_usage.parquet", "machine_usages.csv", "server_usage.csv"):
        put(other)
    found = {file.name: file.table for file in discover(str(tmp_path), TABLES)}
    assert found == {
        "b/machine_usage-00007.csv.gz": "machine_usage",
        "batch_task_2018.tar.gz": "batch_task",
        "machine_meta.csv": "machine_meta",
        "machine_usage/part-3.tgz": "machine_usage",
    }


def test_a_source_may_be_one_file(put):
    file = put("machine_usage.csv", b"m_1,1\nm_2,2\n")
    (found,) = discover(str(file), TABLES)
    assert (found.name, found.table, found.size) == ("machine_usage.csv", "machine_usage", 12)
    assert found.uri == f"file://{file}"


def test_a_file_is_told_by_its_size_head_and_tail_not_by_its_name(put):
    keys = [
        discover(str(put(f"{number}/machine_usage.csv", content)), TABLES)[0].key
        for number, content in enumerate([ROWS, ROWS, ROWS[:-1] + b"!", b"!" + ROWS[1:], ROWS[1:]])
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("machine_usage.csv", b"", r"machine_usage.csv: the file is empty, expected rows of machine_usage"),
        (
            "notes.txt",
            b"x",
            r"no file of a known table; expected names that begin with batch_task, machine_meta",
        ),
        ("machine_usage.zip", b"x", r"no file of a known table; .* end in .csv, .csv.gz, .tar.gz, .tgz"),
    ],
)
def test_a_source_without_usable_files_is_refused(put, name, content, message):
    with pytest.raises(InputError, match=message):
        discover(str(put(name, content)), TABLES)


def test_a_missing_source_and_an_unknown_file_system_are_named(tmp_path):
    with pytest.raises(InputError, match=r"--source .*/nowhere: no such file or folder"):
        discover(str(tmp_path / "nowhere"), TABLES)
    with pytest.raises(InputError, match=r"--source gopher://x: expected a folder, a file or s3://"):
        discover("gopher://x", TABLES)


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    ("name", "pack"),
    [("machine_usage.csv", bytes), ("machine_usage.csv.gz", gzip.compress), ("machine_usage.tar.gz", tar_gz)],
)
@pytest.mark.parametrize("content", [ROWS, ROWS[:-1], b"\n\n" + ROWS + b"\n"], ids=["whole", "cut", "blank"])
def test_blocks_are_whole_lines_at_their_offsets_whatever_their_size(
    put, monkeypatch, block_bytes, name, pack, content
):
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    (found,) = read(put(name, pack(content)))
    assert b"".join(block for _, block in found) == content
    assert [offset for offset, _ in found] == list(np.cumsum([0] + [len(b) for _, b in found])[:-1])
    assert all(block.endswith(b"\n") for _, block in found[:-1])


@pytest.mark.parametrize("chunk_bytes", [1, 10, 100, 1000, len(ROWS) - 1, len(ROWS)])
@pytest.mark.parametrize("block_bytes", [16, 1 << 20])
def test_every_line_of_a_plain_file_is_in_exactly_one_chunk(put, monkeypatch, chunk_bytes, block_bytes):
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    found = [block for chunk in read(put("machine_usage.csv", ROWS), chunk_bytes) for block in chunk]
    assert b"".join(block for _, block in found) == ROWS
    assert all(ROWS[offset:].startswith(block) for offset, block in found)


def test_compressed_files_are_one_chunk(put):
    found = discover(str(put("machine_usage.csv.gz", gzip.compress(ROWS))), TABLES)
    assert len(chunks(found, 10, {})) == 1


def test_a_chunk_is_known_by_content_and_range(put):
    """Another chunk size must not be taken for work that is done."""
    found = discover(str(put("machine_usage.csv", ROWS)), TABLES)
    small, large = chunks(found, 100, {}), chunks(found, 200, {})
    assert len({chunk.id for chunk in [*small, *large]}) == len(small) + len(large)
    assert all(chunk.id.startswith(found[0].key) for chunk in small)


@pytest.mark.parametrize("missing", [1, 8, 9, 100, 1000])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("machine_usage.csv.gz", gzip.compress(noise(5000) + b"\n")),
        ("machine_usage.tar.gz", tar_gz(noise(5000) + b"\n")),
    ],
)
def test_a_truncated_archive_is_named_not_taken_for_its_beginning(put, name, content, missing):
    path = put(name, content[:-missing])
    with pytest.raises(InputError, match=rf"{re.escape(name)}: expected a complete compressed file, but: "):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("machine_usage.csv.gz", noise(5000), "expected a complete compressed file"),
        ("machine_usage.tar.gz", noise(5000), "expected a complete compressed file"),
        ("machine_usage.tar.gz", gzip.compress(noise(5000)), "expected a complete compressed file"),
        ("machine_usage.tar.gz", tar_gz(), "the archive holds no file, expected one csv"),
        (
            "machine_usage.tar.gz",
            tar_gz(ROWS, ROWS),
            "the archive holds more than one file, expected one csv",
        ),
        ("machine_usage.csv", noise(3 << 20), "no line ends within 1,048,576 bytes of offset 0; not a table"),
    ],
    ids=["gzip", "tar", "tar in gzip", "empty tar", "two files", "no lines"],
)
def test_what_is_no_table_is_named(put, name, content, message):
    with pytest.raises(InputError, match=rf"{re.escape(name)}: {message}"):
        read(put(name, content))


def test_a_chunk_in_the_middle_of_an_endless_line_is_refused_too(put):
    found = chunks(discover(str(put("machine_usage.csv", noise(3 << 20))), TABLES), 1 << 20, {})
    with pytest.raises(InputError, match=r"no line ends within 1,048,576 bytes of offset 1,048,575"):
        list(blocks(found[1]))


def test_a_file_that_vanished_is_named(put):
    path = put("machine_usage.csv")
    (file,) = discover(str(path), TABLES)
    path.unlink()
    with pytest.raises(InputError, match=r"machine_usage.csv: the file vanished while it was read"):
        list(blocks(Chunk(file=file, start=0, stop=file.size, width=file.size)))

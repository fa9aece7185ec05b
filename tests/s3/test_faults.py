"""A server that is slow, overloaded, broken, full or not there; keys that are wrong; objects that vanish."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pytest
from fleetcast.errors import InputError, in_one_line
from fleetcast.store import MANIFEST, Store, content_key
from proxy import Fault

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def put(store: Store, name: str, content: bytes = CONTENT) -> None:
    with store.write(name) as file:
        file.write(content)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("error", 2, status=503, code="SlowDown"),
        Fault("error", 2, status=500, code="InternalError"),
        Fault("reset", 2),
        Fault("cut", 2, "GET"),
        Fault("stall", 1),
        Fault("stall inside", 1, "GET"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status}",
)
def test_what_passes_is_tried_again_and_the_result_is_the_same(faulty, bucket, fault):
    store = Store(bucket)
    store.write_json("ready.json", 1)
    faulty.add(fault)
    put(store, "a.bin")
    assert store.read_bytes("a.bin") == CONTENT
    with store.fs.open(store.path("a.bin"), "rb") as file:
        assert file.read() == CONTENT
    assert fault.met == fault.times, "it has happened"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("error", 99, status=503, code="SlowDown"), r"in 3 attempts"),
        (Fault("error", 99, status=500, code="InternalError"), r"in 3 attempts"),
        (Fault("reset", 99), r"the connection broke off, in 3 attempts"),
        (Fault("cut", 99, "GET"), r"the connection broke off, in 3 attempts"),
        (Fault("stall", 99), r"the server stopped answering, in 3 attempts"),
        (Fault("stall inside", 99, "GET"), r"the server stopped answering, in 3 attempts"),
    ],
    ids=lambda value: f"{value.kind} {value.status}" if isinstance(value, Fault) else "",
)
def test_what_does_not_pass_names_the_object_after_all_attempts(faulty, bucket, fault, message):
    store = Store(bucket)
    put(store, "a.bin")
    faulty.add(fault)
    with pytest.raises(OSError, match=message) as failure:
        store.read_bytes("a.bin")
    assert failure.value.filename == f"{bucket}/a.bin"
    # aiohttp asks once more by itself where a connection that was kept is closed.
    assert 3 <= fault.met <= 6, "attempts of s3fs do not multiply with those of botocore"
    told = in_one_line(failure.value)
    assert told is not None
    assert told.startswith(f"{bucket}/a.bin: ")


@pytest.mark.parametrize("profile", ["forger", "stranger"])
def test_wrong_keys_are_told_without_the_keys(use_s3, bucket, object_store, profile):
    use_s3(profile=profile)
    for opened in (Store(bucket).open_or_create, Store(bucket).open_existing):
        with pytest.raises(InputError) as failure:
            opened()
        told = str(failure.value)
        assert told.startswith(f"--store {bucket}: cannot be used ({bucket}/store.json: Forbidden (403); ")
        assert "expected keys that may do this" in told
        assert "\n" not in told
        for secret in (object_store.access_key + " ", object_store.secret_key, "not-the-key", "stranger"):
            assert secret not in told


def test_keys_that_may_only_read_are_refused_where_something_is_written(use_s3, bucket):
    store = Store(bucket).open_or_create()
    put(store, "a.bin")
    use_s3(profile="reader")
    reader = Store(bucket).open_existing()
    assert reader.read_bytes("a.bin") == CONTENT
    with pytest.raises(PermissionError, match="AccessDenied") as failure:
        put(reader, "b.bin")
    assert failure.value.filename == f"{bucket}/b.bin"
    with pytest.raises(PermissionError, match="AccessDenied"):
        reader.remove("a.bin")
    assert store.list("") == ["a.bin", "store.json"]


def test_a_full_disk_of_a_node_is_told_with_where_to_find_room(tmp_path):
    """On a small file system that the test mounts in a name space of its own."""
    small = tmp_path / "small"
    small.mkdir()
    write = """
import polars, pyarrow, sys
from fleetcast.errors import in_one_line
from fleetcast.store import Store
rows = polars.DataFrame({"x": range(1_000_000)})
for uri in ("memory://bucket/store", sys.argv[1]):
    store = Store(uri)
    for save in (lambda f: f.write(bytes(8 << 20)), rows.write_parquet):
        try:
            with store.write("a.bin") as file:
                save(file)
        except Exception as error:
            print(in_one_line(error))
        assert store.list("") == []
"""
    mounted = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, str(small)]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        [*command, sys.executable, "-c", write, f"{small}/store"],
        env={**os.environ, "TMPDIR": str(small)},
        capture_output=True,
        text=True,
        check=True,
    )
    there = (
        f"{small}: no room for memory://bucket/store/a.bin, expected more room there, or TMPDIR on another"
    )
    here = f"{small}/store: no room for {small}/store/a.bin, expected more room there"
    assert done.stdout.splitlines() == [f"{there} disk"] * 2 + [here] * 2


def test_no_keys_at_all_and_an_unknown_profile_are_told(use_s3, bucket, monkeypatch):
    use_s3(profile="nobody")
    with pytest.raises(InputError, match=r"config profile \(nobody\) could not be found; expected keys"):
        Store(bucket).open_or_create()
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    use_s3(profile=None)
    with pytest.raises(InputError, match=r"Unable to locate credentials; expected keys"):
        Store(bucket).open_or_create()


def test_a_bucket_that_is_not_there_is_named_and_not_taken_for_an_empty_store(use_s3):
    use_s3()
    for opened in (Store("s3://nowhere/x").open_or_create, Store("s3://nowhere/x").open_existing):
        with pytest.raises(InputError, match=r"s3://nowhere.*\(NoSuchBucket\); expected a bucket that is"):
            opened()


def test_a_name_that_no_bucket_has_is_refused(use_s3):
    use_s3()
    with pytest.raises(InputError, match=r'Invalid bucket name "x y"'):
        Store("s3://x y/z").open_or_create()


def test_a_server_that_is_not_there_is_named(use_s3, bucket):
    use_s3(endpoint_url="http://127.0.0.1:9", attempts=2)
    message = r"Could not connect .*http://127.0.0.1:9/.*, in 2 attempts; expected an S3 server there"
    with pytest.raises(InputError, match=message):
        Store(bucket).open_or_create()


def test_an_object_that_vanishes_is_named_by_whatever_reads_it(bucket):
    store = Store(bucket)
    store.write_table("t.parquet", pa.table({"x": [1]}))
    with store.fs.open(store.path("t.parquet"), "rb", cache_type="none") as file:
        store.remove("t.parquet")
        with pytest.raises(FileNotFoundError) as failure:
            file.read()
    assert failure.value.filename == f"{bucket}/t.parquet"
    for read in (store.read_bytes, store.read_table):
        with pytest.raises(FileNotFoundError, match=r"t.parquet") as failure:
            read("t.parquet")
        assert f"{bucket.removeprefix('s3://')}/t.parquet: no such" in str(in_one_line(failure.value))


def test_an_object_that_is_replaced_while_it_is_read_is_never_half_of_each(bucket):
    store = Store(bucket)
    put(store, "a.bin")
    with store.fs.open(store.path("a.bin"), "rb", cache_type="none") as file:
        file.read(100)
        put(store, "a.bin", CONTENT[::-1])
        with pytest.raises(OSError, match="was replaced while it was read") as failure:
            file.read(100)
    assert failure.value.filename == f"{bucket}/a.bin"


def test_publishing_that_dies_in_the_middle_is_not_published_and_can_be_repeated(faulty, bucket):
    store = Store(bucket)
    for value in ("old", "new"):
        for name in ("a", "b", MANIFEST.removesuffix(".json")):
            store.write_json(f"draft/{name}.json", value)
        if value == "old":
            store.publish("draft", "w")
    fault = faulty.add(Fault("error", 99, "PUT", "/w/b.json"))
    with pytest.raises(OSError, match="SlowDown"):
        store.publish("draft", "w")
    assert store.read_json(f"w/{MANIFEST}") is None, "no reader takes it for a whole one"
    fault.times = 0
    store.publish("draft", "w")
    assert {store.read_json(name) for name in store.list("w")} == {"new"}
    assert store.list("draft") == []


def test_a_raw_file_is_told_by_two_megabytes_of_it(faulty, bucket):
    store = Store(bucket)
    put(store, "raw.csv", CONTENT * 24)
    before = faulty.read()
    content_key(store.fs, store.path("raw.csv"), len(CONTENT) * 24)
    assert faulty.read() - before == 2 << 20


def test_of_a_parquet_file_only_the_wanted_columns_are_read(faulty, bucket):
    store = Store(bucket)
    noise = [os.urandom(250) for _ in range(30_000)]
    store.write_table("t.parquet", pa.table({"x": range(30_000), "a": noise, "b": noise[::-1]}))
    size = store.fs.size(store.path("t.parquet"))
    before = faulty.read()
    assert store.read_table("t.parquet", ["x"])["x"].to_pylist() == list(range(30_000))
    assert faulty.read() - before < size / 5


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(faulty, bucket):
    store = Store(bucket)
    put(store, "large.bin", CONTENT * 40)
    parts = [one for one in faulty.requests if one.method == "PUT" and "partNumber" in one.query]
    assert len(parts) == 3
    assert store.read_bytes("large.bin") == CONTENT * 40


def test_an_upload_that_fails_leaves_what_was_there(faulty, bucket):
    store = Store(bucket)
    put(store, "large.bin", b"old")
    fault = faulty.add(Fault("error", 99, "PUT", "/large.bin"))
    with pytest.raises(OSError, match="SlowDown"):
        put(store, "large.bin", CONTENT * 40)
    assert store.read_bytes("large.bin") == b"old"
    fault.times = 0
    put(store, "large.bin")
    assert store.read_bytes("large.bin") == CONTENT

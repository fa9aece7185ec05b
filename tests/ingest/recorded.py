"""A file system in memory, as `recorded://…`, that writes down what it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

#: What is asked of an object store: each call is a request, those that it makes itself are not.
_READ = ("open", "cat_file")
_WRITE = ("put_file", "cp_file", "rm")
_ASK = ("find", "exists", "info", "isfile", "isdir", "size")

#: (what was asked, path) in order.
requests: list[tuple[str, str]] = []
_depth = 0


def _recorded(name: str) -> Callable[..., Any]:
    method = getattr(Recorded, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        global _depth
        if _depth == 0:
            requests.append((name, str(args[1 if name == "put_file" else 0])))
        _depth += 1
        try:
            return method(self, *args, **options)
        finally:
            _depth -= 1

    return call


class Recorded(MemoryFileSystem):
    """Files have an ETag in listings, as on S3."""

    protocol = "recorded"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs: list[str] = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("recorded://", "memory://"))

    def find(self, *args: Any, detail: bool = False, **options: Any) -> Any:
        """With the ETag of files."""
        found = super().find(*args, detail=True, **options)
        every = {path: {**info, "ETag": str(info.get("created"))} for path, info in found.items()}
        return every if detail else sorted(every)


for _name in (*_READ, *_WRITE, *_ASK):
    setattr(Recorded, _name, _recorded(_name))

fsspec.register_implementation("recorded", Recorded, clobber=True)


def read() -> set[str]:
    """The files that were opened or fetched since `requests` was last cleared."""
    return {path for name, path in requests if name in _READ}

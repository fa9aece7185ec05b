"""Where a result comes from: command, commit and versions, for its manifest."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fleetcast import __version__

_PACKAGES = ("torch", "torch-geometric", "ray", "polars", "numpy")


def provenance() -> dict[str, Any]:
    """`command`, `commit` (None outside a checkout; `…-dirty` of changed files) and `versions`."""
    return {
        "command": sys.argv,
        "commit": _commit(),
        "versions": {
            "fleetcast": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def _commit() -> str | None:
    """The commit of the code that runs, if it runs from a checkout; with `-dirty` if it was changed since."""
    if _git("ls-files", "--error-unmatch", __file__) is None:  # installed into what may be another's checkout
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What git says, or None if it refuses or is not there."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

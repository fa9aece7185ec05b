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
    """`command`, `commit` (None outside a checkout) and `versions`."""
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
    """The commit of the code that runs, if it runs from a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None

"""Configurations measured by ``crossvit_kernels.tune``: a JSON file that overrides the tables.

Keys name a device, a kernel, a width and an element size. The file is the one named by the
environment variable, else the one in the user's cache.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, TypeVar

ENVIRONMENT_VARIABLE = "CROSSVIT_KERNELS_TUNED"

Config = TypeVar("Config")


def file() -> Path:
    """Return the path that measurements are read from and written to."""
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(os.environ[ENVIRONMENT_VARIABLE])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "crossvit_kernels" / "tuned.json"


def key(kernel: str, device: str, width: int, element_size: int) -> str:
    return f"{device} | {kernel} | C {width} | {element_size} bytes"


def configuration(kind: type[Config], key: str) -> Config | None:
    """Return the fastest measured configuration, or None.

    Raises:
        ValueError: The file is unreadable or invalid.
    """
    fields = _entries().get(key)
    if fields is None:
        return None
    try:
        return kind(**fields)
    except TypeError as error:
        raise _unexpected(error) from error


def forget() -> None:
    """Drop the cached file; it is read again on next use."""
    _entries.cache_clear()


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    path = file()
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {key: dict(fields) for key, fields in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unexpected(error) from error


def _unexpected(error: Exception) -> ValueError:
    return ValueError(
        f"{file()}: expected what `python -m crossvit_kernels.tune` writes ({error}); delete it, "
        f"or name another file in {ENVIRONMENT_VARIABLE}"
    )

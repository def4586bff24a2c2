"""The versions of torch and Triton that the kernels are tested with."""

from __future__ import annotations

import functools
import importlib.metadata
import re

#: (oldest, newest) tested. Others may work, with a warning.
TORCH = ((2, 10), (2, 15))
TRITON = ((3, 6), (3, 9))

_RANGES = {"torch": TORCH, "triton": TRITON}


def is_tested(package: str, version: str) -> bool:
    """Whether a version of "torch" or "triton" is in the tested range, whatever its patch level."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest, newest = _RANGES[package]
    return numbers is not None and oldest <= (int(numbers[1]), int(numbers[2])) <= newest


def tested_range(package: str) -> str:
    """Return the range for messages, such as "3.6 to 3.9"."""
    oldest, newest = ((".".join(map(str, numbers))) for numbers in _RANGES[package])
    return f"{oldest} to {newest}"


@functools.cache
def triton_is_tested() -> bool:
    """Whether the installed Triton is tested; only then are compiled kernels launched directly."""
    version = installed_version("triton")
    return version is not None and is_tested("triton", version)


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def warnings() -> list[str]:
    """Return a sentence for each installed package outside its tested range."""
    sentences = []
    for package in _RANGES:
        version = installed_version(package)
        if version is not None and not is_tested(package, version):
            sentences.append(
                f"{package} {version} is untested: these kernels were tested with "
                f"{package} {tested_range(package)}"
            )
    return sentences

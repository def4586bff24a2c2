"""What a measurement or a verification on this machine is true of: device, driver, software."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from pathlib import Path

import torch

from crossvit_kernels import extension, supported

_PACKAGE = Path(__file__).resolve().parent
#: What computes; the rest of the package may change without changing results.
_FOLDERS = ("ops", "gpu")


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"{cpu_model()}, {os.cpu_count()} cores"


@functools.cache
def cpu_model() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def driver() -> str:
    """Return the version of NVIDIA's driver, or "none"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else "unknown"


@functools.cache
def source() -> str:
    """Return a hash of the code that computes: Python and Triton sources, compiled extension."""
    total = hashlib.blake2b(digest_size=8)
    files = [path for name in _FOLDERS for path in sorted((_PACKAGE / name).rglob("*.py"))]
    files += [_PACKAGE / "extension.py", _PACKAGE / "autograd.py"]
    if not extension.missing:
        files.append(Path(extension.location()))
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def software() -> str:
    """Return versions of torch, Triton and Python."""
    triton = supported.installed_version("triton") or "none"
    return f"torch {torch.__version__}, triton {triton}, python {platform.python_version()}"


def key(device: torch.device) -> str:
    """Return the device and software pair of a measurement, as a key of a JSON file."""
    driver_version = driver() if device.type == "cuda" else "none"
    triton = supported.installed_version("triton") or "none"
    return (
        f"{device_name(device)} | driver {driver_version} | torch {torch.__version__} | "
        f"triton {triton} | source {source()}"
    )

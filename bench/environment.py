"""The origin of a number: machine, software, and the commit of this repository."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device, dtype: str | None = None) -> dict[str, Any]:
    """The facts of a run, as recorded in result files."""
    import crossvit_kernels as ck  # the suite imports this before it builds it

    facts: dict[str, Any] = {
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "dtype": dtype,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "crossvit-kernels": ck.__version__,
        "timm": _version("timm"),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cpu":
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        facts["load_average"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    else:
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver_version()
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = l2_bytes(device)
    return facts


def commit(root: Path = ROOT) -> dict[str, str | bool | None]:
    """``commit`` and whether a tracked file is ``dirty``; both None outside a checkout.

    Saved results do not make it dirty.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    head = _git(root, "rev-parse", "HEAD")
    # A copy of the sources inside another repository is not a checkout of this one.
    if not top or not head or Path(top).resolve() != root.resolve():
        return {"commit": None, "dirty": None}
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    changes = _git(root, *status)
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    """Git's output; None if it fails or is missing."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, env=variables
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def device_slug(device: torch.device) -> str:
    """Device as a folder name: ``nvidia-h200``, ``cpu-amd-epyc-9r14``."""
    name = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", device_name(device))
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug if device.type == "cuda" else f"cpu-{slug}"


def _driver_version() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return output.stdout.split("\n")[0].strip() or None

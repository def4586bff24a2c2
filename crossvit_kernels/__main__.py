"""``python -m crossvit_kernels``: the information about this machine for a bug report."""

from __future__ import annotations

import os
import platform

import torch

import crossvit_kernels as ck
from crossvit_kernels import extension, identity, supported
from crossvit_kernels.backends import ENVIRONMENT_VARIABLE
from crossvit_kernels.calibration import store
from crossvit_kernels.verify import state

_CPU = torch.device("cpu")


def _version(package: str) -> str:
    return supported.installed_version(package) or "not installed"


def _tested(package: str) -> str:
    return f"(tested: {supported.tested_range(package)})"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB)"
        )
    return ", ".join(names)


def _extension() -> str:
    if extension.missing:
        return extension.missing
    architectures = " ".join(f"sm_{a}" for a in extension.cuda_architectures())
    return (
        f"{extension.location()}; CPU code {extension.cpu_instruction_set()}; "
        f"CUDA code {architectures or 'left out'}"
    )


def _calibrated() -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = store.entries(device)
    lines = [f"calibrated    {len(rows)} calls on this {device.type} ({store.file()})"]
    for row in rows:
        way = "train" if row["training"] else "forward"
        sizes = f"N {row['num_tokens']}, sizes {row['sizes']}, class {row['batch_class']}"
        lines.append(f"              {row['operation']} {way}, {sizes}: {row['choice']}")
    for name, values in store.all_settings(device).items():
        found = ", ".join(f"{value} for {images} images" for images, value in values.items())
        lines.append(f"              {name}: {found}")
    return lines


def report() -> str:
    """Return versions, devices, and each backend with the reason if it is not usable."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("CROSSVIT_") or name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    rows = {
        "crossvit_kernels": ck.__version__,
        "extension": _extension(),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'} {_tested('torch')}",
        "triton": f"{_version('triton')} {_tested('triton')}",
        "numpy": _version("numpy"),
        "cpu": f"{identity.device_name(_CPU)}, {torch.get_num_threads()} torch threads",
        "gpu": _gpus(),
        "environment": " ".join(f"{k}={v}" for k, v in environment.items()) or "nothing set",
    }
    width = max(map(len, rows)) + 2
    lines = [f"{name:{width}}{value}" for name, value in rows.items()]
    lines += [f"warning: {sentence}" for sentence in supported.warnings()]
    requested = f" ({ENVIRONMENT_VARIABLE} chooses one)"
    backends = f"backends{requested}", str(ck.backends())
    return "\n".join([*lines, "", *backends, "", *state.report(), *_calibrated()])


if __name__ == "__main__":
    print(report())

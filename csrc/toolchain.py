"""What the build has to work with, and what the environment asks of it: for setup.py."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_CUDA = (12, 4)
OLDEST_ARCHITECTURE = 80  # bfloat16 on tensor cores, asynchronous copies
DEFAULT_ARCHITECTURES = "80;90"  # Ampere, Hopper; PTX of the latter serves what comes after


def variable(name: str, pattern: str, expected: str, default: str) -> str:
    """The value of an environment variable; ends the build where it is none of the expected."""
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        sys.exit(f"{name} is {value!r}, expected {expected}")
    return value


def switch(name: str) -> str:
    return variable(name, "auto|0|1", "auto, 0 or 1", "auto")


def jobs() -> int:
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return int(variable("MAX_JOBS", "[1-9][0-9]*", "a number of parallel jobs", str(cores)))


def cxx() -> str:
    return os.environ.get("CXX") or "c++"


def ccache() -> str:
    """The compiler cache, or "" where there is none or it is not wanted."""
    wanted, found = switch("CROSSVIT_BUILD_CCACHE"), shutil.which("ccache")
    if wanted == "1" and not found:
        sys.exit("CROSSVIT_BUILD_CCACHE=1, but there is no ccache on the PATH")
    return found if found and wanted != "0" else ""


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("ninja is missing: pip install ninja")


def find_cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit's root, or why there is none. A bare nvcc may be a script elsewhere."""
    wanted = switch("CROSSVIT_BUILD_CUDA")
    if wanted == "0":
        return None, "CROSSVIT_BUILD_CUDA=0 was set"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    why_not = "no CUDA toolkit was found: set CUDA_HOME"
    for home in map(Path, filter(None, [*homes, "/usr/local/cuda"])):
        if not (home / "bin/nvcc").is_file() or not (home / "include/cuda_runtime.h").is_file():
            continue
        version = cuda_version(home)
        if version >= OLDEST_CUDA:
            return home.resolve(), ""
        why_not = "the CUDA toolkit in {} is {}.{}, older than {}.{}".format(
            home, *version, *OLDEST_CUDA
        )
        break
    if wanted == "1":
        sys.exit(f"CROSSVIT_BUILD_CUDA=1, but {why_not}")
    return None, why_not


def cuda_version(cuda: Path) -> tuple[int, int]:
    said = subprocess.check_output([cuda / "bin/nvcc", "--version"], text=True)
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cuda_architectures(cuda: Path) -> list[str]:
    """Those asked for, or those of the GPUs here, or the default ones; the newest last."""
    said = subprocess.check_output([cuda / "bin/nvcc", "--list-gpu-arch"], text=True)
    known = [int(arch) for arch in re.findall(r"compute_(\d+)", said)]
    known = sorted(arch for arch in known if arch >= OLDEST_ARCHITECTURE)
    here = architectures_of_gpus()
    default = ";".join(map(str, here)) if here and here <= {*known} else DEFAULT_ARCHITECTURES
    wanted = os.environ.get("CROSSVIT_CUDA_ARCH_LIST") or default
    archs = re.split("[;, ]+", wanted.strip("; ,"))
    for arch in archs:
        found = re.fullmatch(r"(\d+)[af]?", arch)
        if not found or int(found[1]) not in known:
            sys.exit(
                f"CROSSVIT_CUDA_ARCH_LIST has {arch!r}, expected compute capabilities as in "
                f"80;90, of those that {cuda} and the kernels know: {', '.join(map(str, known))}"
            )
    return sorted({*archs}, key=lambda arch: (int(arch.rstrip("af")), arch))


def architectures_of_gpus() -> set[int]:
    """Of the GPUs that a driver reports, as torch need not be here."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {10 * int(a) + int(b) for a, b in re.findall(r"^(\d+)\.(\d)\s*$", said, re.MULTILINE)}


def gencode_flags(archs: list[str]) -> str:
    """Machine code for each architecture, and PTX of the last."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")
    return " ".join([*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


def summary(levels: list[str], archs: list[str], why_not_cuda: str) -> str:
    """What was built, and how to have it otherwise."""
    cpu = f"CPU ({', '.join(levels).replace('_', '-')})"
    if not archs:
        return f"crossvit_kernels: built {cpu} kernels; CUDA is left out: {why_not_cuda}"
    cuda = f"CUDA ({', '.join(f'sm_{arch}' for arch in archs)} + PTX)"
    return (
        f"crossvit_kernels: built {cpu} and {cuda} kernels; CROSSVIT_CUDA_ARCH_LIST="
        f'"{";".join(archs)}" chooses others, CROSSVIT_BUILD_CUDA=0 leaves CUDA out'
    )

"""The toolchain of setup.py: compilers, CUDA, jobs, and the environment variables for them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_CUDA = (12, 4)
OLDEST_SM = 80  # bfloat16 on tensor cores, asynchronous copies
DEFAULT_ARCHITECTURES = "80;90"  # Ampere, Hopper; PTX of the latter for later GPUs


def variable(name: str, pattern: str, expected: str, default: str) -> str:
    """Return the value of an environment variable; end the build if it is invalid."""
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
    """The path of ccache, or "" if it is missing or switched off."""
    setting, path = switch("CROSSVIT_BUILD_CCACHE"), shutil.which("ccache")
    if setting == "1" and not path:
        sys.exit("CROSSVIT_BUILD_CCACHE=1, but there is no ccache on the PATH")
    return path if path and setting != "0" else ""


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("ninja is missing: pip install ninja")


def find_cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit's root, or why it is not used. The nvcc on PATH may be a wrapper script.

    CUDA's sources take minutes, so without a GPU to run them they are compiled only if asked for.
    """
    setting = switch("CROSSVIT_BUILD_CUDA")
    if setting == "0":
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
            asked = setting == "1" or os.environ.get("CROSSVIT_CUDA_ARCH_LIST")
            if asked or max(architectures_of_gpus(), default=0) >= OLDEST_SM:
                return home.resolve(), ""
            return None, f"no GPU from sm_{OLDEST_SM} on is here: CROSSVIT_BUILD_CUDA=1 builds it"
        here, oldest = (".".join(map(str, v)) for v in (version, OLDEST_CUDA))
        why_not = f"the CUDA toolkit in {home} is {here}, older than {oldest}"
        break
    if setting == "1":
        sys.exit(f"CROSSVIT_BUILD_CUDA=1, but {why_not}")
    return None, why_not


def cuda_version(cuda: Path) -> tuple[int, int]:
    output = subprocess.check_output([cuda / "bin/nvcc", "--version"], text=True)
    release = re.search(r"release (\d+)\.(\d+)", output)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def cuda_architectures(cuda: Path) -> list[str]:
    """The requested architectures, else the visible GPUs', else the default; newest last."""
    output = subprocess.check_output([cuda / "bin/nvcc", "--list-gpu-arch"], text=True)
    known = sorted(a for a in map(int, re.findall(r"compute_(\d+)", output)) if a >= OLDEST_SM)
    visible = architectures_of_gpus()
    default = DEFAULT_ARCHITECTURES
    if visible and visible <= {*known}:
        default = ";".join(map(str, visible))
    requested = os.environ.get("CROSSVIT_CUDA_ARCH_LIST") or default
    archs = re.split("[;, ]+", requested.strip("; ,"))
    for arch in archs:
        number = re.fullmatch(r"(\d+)[af]?", arch)
        if not number or int(number[1]) not in known:
            sys.exit(
                f"CROSSVIT_CUDA_ARCH_LIST has {arch!r}, expected compute capabilities as in "
                f"80;90, of those that {cuda} and the kernels know: {', '.join(map(str, known))}"
            )
    return sorted({*archs}, key=lambda arch: (int(arch.rstrip("af")), arch))


def architectures_of_gpus() -> set[int]:
    """Architectures of the GPUs that the driver reports; torch may not be installed."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    pairs = re.findall(r"^(\d+)\.(\d)\s*$", output, re.MULTILINE)
    return {10 * int(major) + int(minor) for major, minor in pairs}


def gencode_flags(archs: list[str]) -> str:
    """Flags for machine code of each architecture, and PTX of the last."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")
    return " ".join([*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


def summary(levels: list[str], archs: list[str], why_not_cuda: str) -> str:
    """What was built, and how to change it."""
    cpu = f"CPU ({', '.join(levels).replace('_', '-')})"
    if not archs:
        return f"crossvit_kernels: built {cpu} kernels; CUDA is left out: {why_not_cuda}"
    cuda = f"CUDA ({', '.join(f'sm_{arch}' for arch in archs)} + PTX)"
    return (
        f"crossvit_kernels: built {cpu} and {cuda} kernels; CROSSVIT_CUDA_ARCH_LIST="
        f'"{";".join(archs)}" chooses others, CROSSVIT_BUILD_CUDA=0 leaves CUDA out'
    )

"""Builds crossvit_kernels._C from csrc/ through one generated build.ninja.

The extension holds no torch headers: torch is not needed to build it, and any torch can run it.
CROSSVIT_BUILD_CUDA = auto (default) | 1 | 0, CROSSVIT_CUDA_ARCH_LIST, CROSSVIT_BUILD_VERBOSE = 0
(default) | 1 (a line for each CUDA kernel and architecture: registers, spills, static shared
memory), CUDA_HOME, CXX and MAX_JOBS are read from the environment; README.md explains them.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Sources compiled once per instruction-set level, chosen among at run time (csrc/common/isa.h).
PER_ISA_SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/cpu/*.cpp")}
ISA_LEVELS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_LEVELS.update(
        x86_64_v3="-march=x86-64-v3", x86_64_v4="-march=x86-64-v4 -mprefer-vector-width=512"
    )


def find_cuda() -> Path | None:
    """The CUDA toolkit's root. A bare nvcc may be a script that lives elsewhere."""
    wanted = os.environ.get("CROSSVIT_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"CROSSVIT_BUILD_CUDA is {wanted!r}, expected auto, 0 or 1")
    if wanted == "0":
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in map(Path, filter(None, [*candidates, "/usr/local/cuda"])):
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home.resolve()
    if wanted == "1":
        sys.exit("CROSSVIT_BUILD_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME")
    return None


def ninja_program() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("ninja is missing: pip install ninja")


def default_cuda_arch_list(cuda: Path) -> str:
    """Ampere, Hopper and, where the toolkit knows it (from 12.8 on), Blackwell."""
    version = subprocess.check_output([str(cuda / "bin/nvcc"), "--version"], text=True)
    found = re.search(r"release (\d+)\.(\d+)", version)
    knows_blackwell = found is not None and tuple(map(int, found.groups())) >= (12, 8)
    return "80;90a;100" if knows_blackwell else "80;90a"


def gencode_flags(arch_list: str) -> str:
    """Machine code for each architecture, and PTX of the last."""
    archs = arch_list.split(";")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("a")
    return " ".join([*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


def readable(lines: Iterable[str]) -> Iterator[str]:
    """A compilation's output with one line for each kernel in place of what ptxas -v says of it."""
    kernel = spilled = ""
    for line in lines:
        if found := re.search(r"Compiling entry function '(.*)' for '(\w+)'", line):
            name, arch = found.groups()
            name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", name).split("(")[0]
            kernel = f"{arch:8} {name}"
        elif found := re.search(r"(\d+) bytes spill stores", line):
            spilled = found[1]
        elif found := re.search(r"Used (\d+) registers", line):
            static = re.search(r"(\d+) bytes smem", line)
            shared = static[1] if static else 0
            yield f"{kernel}: {found[1]} registers, {spilled} bytes spilled, {shared} shared\n"
        elif not line.startswith("ptxas info"):
            yield line


def run_ninja(command: list[str], verbose: bool) -> None:
    if not verbose:
        subprocess.check_call(command)
        return
    names = shutil.which("c++filt") or "cat"
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as ninja,
        subprocess.Popen([names], stdin=ninja.stdout, stdout=subprocess.PIPE, text=True) as output,
    ):
        assert output.stdout
        for line in readable(output.stdout):
            print(line, end="", flush=True)
    if ninja.returncode:
        raise subprocess.CalledProcessError(ninja.returncode, command)


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: a touched file is the only one compiled again."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda = find_cuda()
        arch_list = os.environ.get("CROSSVIT_CUDA_ARCH_LIST", "")
        if cuda and not arch_list:
            arch_list = default_cuda_arch_list(cuda)
        arch_list = arch_list.replace(",", ";").replace(" ", ";")
        if not cuda:
            self.warn("CUDA kernels are left out: no CUDA toolkit, or CROSSVIT_BUILD_CUDA=0")

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not setuptools' build_temp: an editable install throws that away.
        work = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        cxx = os.environ.get("CXX", "c++")
        flags = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
        flags += " -ffp-contract=fast -fno-math-errno"
        # Only the bindings see pybind11, whose path is new in every isolated build.
        binding_flags = (
            f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        )
        libs = "-ldl -lpthread" if sys.platform != "darwin" else "-undefined dynamic_lookup"
        lines = [
            f"cxx = {cxx}",
            f"flags = {flags} -I{ROOT / 'csrc'}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++ $out",
            "rule link",
            "  command = $cxx -shared $in -o $out $libs",
        ]
        jobs = os.environ.get("MAX_JOBS", "")
        verbose = os.environ.get("CROSSVIT_BUILD_VERBOSE", "0") == "1"
        if cuda:
            threads = min(int(jobs or os.cpu_count() or 1), len(arch_list.split(";")))
            binding_flags += f" -DCROSSVIT_WITH_CUDA -DCROSSVIT_CUDA_ARCH_LIST='\"{arch_list}\"'"
            libs += f" -L{cuda / 'lib64'} -lcudart_static -lrt"
            lines += [
                "rule nvcc",
                f"  command = {cuda / 'bin/nvcc'} -ccbin $cxx -MD -MF $out.d -O3 -std=c++17 "
                "-lineinfo -Xcompiler -fPIC,-fvisibility=hidden,-Wall "
                f"-Xptxas -warn-spills,-warn-lmem-usage{',-v' if verbose else ''} "
                f"-Xfatbin -compress-all --threads {threads} "
                f"{gencode_flags(arch_list)} -I{ROOT / 'csrc'} -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = CUDA $out",
            ]

        objects = []

        def compile_rule(source: str, rule: str, stem: str, extra: str = "") -> None:
            objects.append(f"{stem}.o")
            lines.extend([f"build {stem}.o: {rule} {ROOT / source}", f"  extra = {extra}"])

        for source in sorted(ext.sources):
            stem = str(Path(source).relative_to("csrc").with_suffix("")).replace("/", "_")
            if source.endswith(".cu"):
                if cuda:
                    compile_rule(source, "nvcc", f"{stem}_cuda")
            elif source in PER_ISA_SOURCES:
                for level, march in ISA_LEVELS.items():
                    extra = f"{march} -DCROSSVIT_ISA={level}"
                    compile_rule(source, "cxx", f"{stem}_{level}", extra)
            else:
                extra = binding_flags if source.startswith("csrc/bindings/") else ""
                if cuda or source != "csrc/bindings/cuda.cpp":
                    compile_rule(source, "cxx", stem, extra)
        lines += [f"build {target}: link {' '.join(objects)}", f"  libs = {libs}"]
        (work / "build.ninja").write_text("\n".join(lines) + "\n")

        command = [ninja_program(), "-C", str(work), *([f"-j{jobs}"] if jobs else [])]
        run_ninja(command, verbose)


def sources() -> list[str]:
    """All of csrc/ but what runs CUDA sources on a CPU, which is for the tests."""
    found = [p for pattern in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(pattern)]
    relative = [path.relative_to(ROOT) for path in found]
    return sorted(str(path) for path in relative if path.parts[1] != "testing")


setup(
    ext_modules=[Extension("crossvit_kernels._C", sources())],
    cmdclass={"build_ext": NinjaBuild},
)

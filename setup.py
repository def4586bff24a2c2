"""Builds crossvit_kernels._C from csrc/ through one generated build.ninja.

The extension includes no torch headers: it builds without torch and runs with any torch.
csrc/toolchain.py reads the environment; docs/reference.md explains the variables.
"""

import atexit
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC))
import toolchain  # noqa: E402

# The CPU kernels are compiled once per instruction-set level; dispatch.cpp chooses at run time
# (csrc/common/cpu/isa.h).
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["x86_64_v3"] = "-march=x86-64-v3"
    ISA_FLAGS["x86_64_v4"] = "-march=x86-64-v4 -mprefer-vector-width=512"

CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=fast -fno-math-errno"
)
NVCC_FLAGS = (
    "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall "
    "-Xptxas -warn-spills,-warn-lmem-usage -Xfatbin -compress-all"
)
RULES = f"""
rule cxx
  command = $launcher $cxx -MMD -MF $out.d {CXX_FLAGS} -I{CSRC} $extra -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = C++ $out
rule nvcc
  command = $launcher $nvcc -MD -MF $out.d {NVCC_FLAGS} $gencode -I{CSRC} -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CUDA $out
rule link
  command = $cxx -shared $in -o $out $libs
  description = LINK $out
"""


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it, which recompiles only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cuda, why_not_cuda = toolchain.find_cuda()
        archs = toolchain.cuda_architectures(cuda) if cuda else []
        jobs, cxx = toolchain.jobs(), toolchain.cxx()
        # pybind11's path changes with every isolated build; -O3 gains nothing in its code.
        bindings = f"-O1 -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        libs = "-ldl -lpthread" if sys.platform != "darwin" else "-undefined dynamic_lookup"
        lines = [f"cxx = {cxx}", f"launcher = {toolchain.ccache()}", RULES]
        if cuda:
            bindings += f" -DCROSSVIT_WITH_CUDA -DCROSSVIT_CUDA_ARCH_LIST='\"{';'.join(archs)}\"'"
            libs += f" -L{cuda / 'lib64'} -lcudart_static -lrt"
            libs += " -Wl,--wrap=__cudaRegisterFunction"  # csrc/common/cuda/device.cu
            threads = max(1, min(len(archs), jobs // 4))  # there are four large sources
            lines.insert(0, f"nvcc = {cuda / 'bin/nvcc'} -ccbin {cxx} --threads {threads}")
            lines.insert(0, f"gencode = {toolchain.gencode_flags(archs)}")

        objects = []
        for source in ext.sources:
            stem = str(Path(source).relative_to("csrc").with_suffix("")).replace("/", "_")
            rule, variants = "cxx", {stem: ""}
            if source.endswith(".cu"):
                rule, variants = "nvcc", {stem: ""} if cuda else {}
            elif has_levels(Path(source)):
                variants = {
                    f"{stem}_{level}": f"{flags} -DCROSSVIT_ISA={level}"
                    for level, flags in ISA_FLAGS.items()
                }
            elif source.startswith("csrc/bindings/"):
                needs_cuda = source.startswith("csrc/bindings/cuda")
                variants = {stem: bindings} if cuda or not needs_cuda else {}
            for name, extra in variants.items():
                objects.append(f"{name}.o")
                lines += [f"build {name}.o: {rule} {ROOT / source}", f"  extra = {extra}"]

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines += [f"build {target}: link {' '.join(objects)}", f"  libs = {libs}"]
        # Not setuptools' build_temp, which an editable install deletes.
        work = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.check_call([toolchain.ninja(), "-C", str(work), f"-j{jobs}"])
        # After all of setuptools' output.
        atexit.register(print, toolchain.summary([*ISA_FLAGS], archs, why_not_cuda), flush=True)


def has_levels(source: Path) -> bool:
    is_kernel = source.name != "dispatch.cpp" and source.parts[1] != "common"
    return is_kernel and source.match("csrc/*/cpu/*.cpp")


def sources() -> list[str]:
    """All sources, the slowest to compile first: CUDA, then C++, each by file size."""
    paths = [p for pattern in ("*.cu", "*.cpp") for p in CSRC.rglob(pattern)]
    paths.sort(key=lambda path: (path.suffix != ".cu", -path.stat().st_size, path))
    return [str(path.relative_to(ROOT)) for path in paths]


setup(
    ext_modules=[Extension("crossvit_kernels._C", sources())],
    cmdclass={"build_ext": NinjaBuild},
)

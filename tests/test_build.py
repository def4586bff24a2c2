"""The extension as built, and the build itself: torch-free, incremental, switchable."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crossvit_kernels import extension

ROOT = Path(__file__).resolve().parents[1]

needs_build_tools = pytest.mark.skipif(
    shutil.which("c++") is None or not (ROOT / "csrc").is_dir(),
    reason="needs a C++ compiler and the source tree",
)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_extension_needs_no_torch_and_no_openmp() -> None:
    dynamic = subprocess.run(
        ["readelf", "-d", extension.location()], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed and not [lib for lib in needed if re.search("torch|c10|gomp|cuda", lib)]


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_wide_code_is_not_shared_by_the_linker() -> None:
    """An object for AVX-512 must define no weak symbol: the linker keeps one copy for all."""
    objects = list((ROOT / "build").glob("*/*_x86_64_v4.o"))
    if not objects:
        pytest.skip("no object files of an x86-64 build in build/")
    for path in objects:
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WwVu] ", line)]
        assert not [line for line in weak if "DW.ref.__gxx_personality" not in line], weak


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**os.environ, "CROSSVIT_BUILD_CUDA": "0", "MAX_JOBS": "2", **environment},
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, built once without CUDA."""
    tree = tmp_path_factory.mktemp("build") / "crossvit"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "crossvit_kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("__init__.py",):
        shutil.copy(ROOT / "crossvit_kernels" / name, tree / "crossvit_kernels")
    result = build(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    return tree


def compiled_files(output: str) -> list[str]:
    return re.findall(r"\] (?:C\+\+|CUDA) (\S+)\.o", output)


@needs_build_tools
def test_a_touched_file_is_the_only_one_compiled_again(tree: Path) -> None:
    assert compiled_files(build(tree).stdout) == []
    source = tree / "csrc/common/isa.cpp"
    source.write_text(source.read_text() + "\n// touched\n")
    assert compiled_files(build(tree).stdout) == ["common_isa"]
    header = tree / "csrc/common/isa.h"
    header.write_text(header.read_text() + "\n// touched\n")
    operations = ("attention_core", "cross_attention", "layernorm_ffn", "layernorm_msa")
    including = {"common_isa", "bindings_module", *(f"{operation}_cpu" for operation in operations)}
    assert set(compiled_files(build(tree).stdout)) == including


@needs_build_tools
def test_what_is_left_out_is_said(tree: Path) -> None:
    result = build(tree)
    assert "CUDA kernels are left out" in result.stdout + result.stderr


@needs_build_tools
def test_cuda_that_was_asked_for_must_be_there(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "*.so"))
    empty = str(tmp_path / "nowhere")
    setup = tmp_path / "tree/setup.py"
    setup.write_text(setup.read_text().replace("/usr/local/cuda", empty))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("c++", "ninja"):
        if program := shutil.which(name):
            (programs / name).symlink_to(program)
    result = build(
        tmp_path / "tree",
        CROSSVIT_BUILD_CUDA="1",
        CUDA_HOME=empty,
        CUDA_PATH=empty,
        PATH=str(programs),
    )
    assert result.returncode != 0 and "no CUDA toolkit was found" in result.stderr


@needs_build_tools
def test_a_misspelt_switch_is_refused(tree: Path) -> None:
    result = build(tree, CROSSVIT_BUILD_CUDA="yes")
    assert result.returncode != 0 and "CROSSVIT_BUILD_CUDA is 'yes'" in result.stderr


NVCC = """#!/bin/sh
case "$1" in --version) echo "Cuda compilation tools, release VERSION, V0"; exit;; esac
while [ $# -gt 1 ]; do case "$1" in -o) out=$2;; -MF) rule=$2;; esac; shift; done
echo "$out:" > "$rule"
echo "int nothing;" | c++ -x c++ -fPIC -c - -o "$out"
cat >&2 <<'END'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8crossvit12_GLOBAL__N_17forwardINS_4PlanIfLi12EEEEEvPf' for 'sm_90a'
ptxas info    : Function properties for _ZN8crossvit12_GLOBAL__N_17forwardINS_4PlanIfLi12EEEEEvPf
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 174 registers, used 1 barriers, 1024 bytes smem
ptxas warning : Registers are spilled
END
"""  # noqa: E501


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """Stands for a CUDA toolkit: it compiles nothing, and says of it what ptxas would."""
    home = tmp_path / "cuda"
    for folder in ("bin", "include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "lib64/libcudart_static.a").write_bytes(b"!<arch>\n")
    (home / "bin/nvcc").write_text(NVCC.replace("VERSION", "13.0"))
    (home / "bin/nvcc").chmod(0o755)
    return home


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """One C++ and one CUDA source."""
    tree = tmp_path / "tree"
    (tree / "csrc/common").mkdir(parents=True)
    for name in ("isa.cpp", "isa.h", "device.cu"):
        shutil.copy(ROOT / "csrc/common" / name, tree / "csrc/common")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "crossvit_kernels").mkdir()
    return tree


@needs_build_tools
def test_a_verbose_build_has_a_line_for_each_kernel(small_tree: Path, toolkit: Path) -> None:
    cuda = {"CROSSVIT_BUILD_CUDA": "1", "CUDA_HOME": str(toolkit)}
    result = build(small_tree, **cuda, CROSSVIT_BUILD_VERBOSE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ptxas info" not in result.stdout and "Registers are spilled" in result.stdout
    if shutil.which("c++filt"):
        line = "sm_90a   forward<Plan<float, 12> >: 174 registers, 4 bytes spilled, 1024 shared"
        assert line in result.stdout.splitlines()
    assert compiled_files(build(small_tree, **cuda, CROSSVIT_BUILD_VERBOSE="1").stdout) == []
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\nexit 1\n")
    (small_tree / "csrc/common/device.cu").touch()
    failed = build(small_tree, **cuda, CROSSVIT_BUILD_VERBOSE="1", CROSSVIT_CUDA_ARCH_LIST="80")
    assert failed.returncode != 0


@needs_build_tools
@pytest.mark.parametrize(
    ("version", "wanted", "built"),
    [
        ("13.0", "", ["80", "90a", "100"]),
        ("12.4", "", ["80", "90a"]),
        ("12.4", "75,86", ["75", "86"]),
    ],
)
def test_architectures(
    version: str, wanted: str, built: list[str], small_tree: Path, toolkit: Path
) -> None:
    (toolkit / "bin/nvcc").write_text(NVCC.replace("VERSION", version))
    result = build(
        small_tree,
        CROSSVIT_BUILD_CUDA="1",
        CUDA_HOME=str(toolkit),
        CROSSVIT_CUDA_ARCH_LIST=wanted,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (rules,) = small_tree.glob("build/*/build.ninja")
    code = re.findall(r",code=(\w+)", rules.read_text())
    newest = built[-1].rstrip("a")
    assert code == [*(f"sm_{arch}" for arch in built), f"compute_{newest}"]
    assert "-warn-spills" in rules.read_text() and "-lineinfo" in rules.read_text()


@pytest.mark.usefixtures("cpu_backend")
def test_cuda_code_imports_without_a_driver_and_says_so() -> None:
    """With CUDA built in, a machine without a driver gets a reason, not a crash."""
    if not extension.cuda_architectures():
        pytest.skip("the extension was built without CUDA")
    failure = extension.cuda_self_check(1000)  # no machine has that device
    assert failure.startswith("cuda"), failure

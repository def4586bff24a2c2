"""The built extension, and the build: without torch, incremental, configurable."""

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
    """AVX-512 objects must define no weak symbols: the linker keeps one copy for all levels."""
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
        env={
            **os.environ,
            "CROSSVIT_BUILD_CUDA": "0",
            "CROSSVIT_BUILD_CCACHE": "0",
            "MAX_JOBS": "2",
            **environment,
        },
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, built once without CUDA."""
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
    return re.findall(r"^\[\d+/\d+\] (?:C\+\+|CUDA) (\S+)\.o", output, re.MULTILINE)


@pytest.mark.slow
@needs_build_tools
def test_a_touched_file_is_the_only_one_compiled_again(tree: Path) -> None:
    """And the last line says what is left out: one test, as each worker would build the tree."""
    unchanged = build(tree).stdout
    assert compiled_files(unchanged) == []
    last = unchanged.splitlines()[-1]
    assert last.startswith("crossvit_kernels: built CPU (baseline")
    assert last.endswith("kernels; CUDA is left out: CROSSVIT_BUILD_CUDA=0 was set")
    source = tree / "csrc/common/cpu/isa.cpp"
    source.write_text(source.read_text() + "\n// touched\n")
    assert compiled_files(build(tree).stdout) == ["common_cpu_isa"]
    header = tree / "csrc/common/cpu/isa.h"
    header.write_text(header.read_text() + "\n// touched\n")
    operations = ("attention_core", "cross_attention", "layernorm_ffn", "layernorm_msa")
    including = {
        "common_cpu_isa",
        "bindings_module",
        *(f"{operation}_cpu_dispatch" for operation in operations),
    }
    assert set(compiled_files(build(tree).stdout)) == including


NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release VERSION, V0"; exit;;
  --list-gpu-arch) echo "compute_75 compute_80 compute_86 compute_90 compute_100"; exit;;
esac
while [ $# -gt 1 ]; do case "$1" in -o) out=$2;; -MF) rule=$2;; esac; shift; done
echo "$out:" > "$rule"
echo "static int nothing;" | c++ -x c++ -fPIC -c - -o "$out"
echo "ptxas warning : Registers are spilled" >&2
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cuda(tmp_path: Path) -> dict[str, str]:
    """Environment of a build with a fake CUDA toolkit and without a GPU."""
    home, programs = tmp_path / "cuda", tmp_path / "programs"
    for folder in ("include", "lib64"):
        (home / folder).mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "lib64/libcudart_static.a").write_bytes(b"!<arch>\n")
    write_program(home / "bin/nvcc", NVCC.replace("VERSION", "13.0"))
    write_program(programs / "nvidia-smi", "#!/bin/sh\necho 'No devices were found'; exit 9\n")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {"CROSSVIT_BUILD_CUDA": "1", "CUDA_HOME": str(home), "PATH": path}


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """One C++ and two CUDA sources, of which the shorter comes first by name."""
    tree = tmp_path / "tree"
    for folder in ("cpu", "cuda"):
        (tree / "csrc/common" / folder).mkdir(parents=True)
    for name in ("toolchain.py", "common/cpu/isa.cpp", "common/cpu/isa.h", "common/cuda/device.cu"):
        shutil.copy(ROOT / "csrc" / name, tree / "csrc" / name)
    (tree / "csrc/common/cuda/another.cu").write_text("// shorter\n")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "crossvit_kernels").mkdir()
    return tree


@needs_build_tools
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CROSSVIT_BUILD_CUDA", "yes", "is 'yes', expected auto, 0 or 1"),
        ("CROSSVIT_BUILD_CCACHE", "on", "is 'on', expected auto, 0 or 1"),
        ("MAX_JOBS", "many", "is 'many', expected a number of parallel jobs"),
        ("MAX_JOBS", "0", "is '0', expected a number of parallel jobs"),
        ("CROSSVIT_CUDA_ARCH_LIST", "8.0", "has '8.0', expected compute capabilities as in 80;90"),
        ("CROSSVIT_CUDA_ARCH_LIST", "80;sm_90", "has 'sm_90', expected"),
        ("CROSSVIT_CUDA_ARCH_LIST", "75", "has '75', expected"),  # older than the kernels take
        ("CROSSVIT_CUDA_ARCH_LIST", "80;95", "has '95', expected"),  # unknown to the toolkit
    ],
)
def test_bad_values_are_refused(
    name: str, value: str, message: str, small_tree: Path, cuda: dict[str, str]
) -> None:
    result = build(small_tree, **{**cuda, name: value})
    assert result.returncode != 0 and f"{name} {message}" in result.stderr, result.stderr


@pytest.mark.slow
@needs_build_tools
def test_progress_and_the_last_line(small_tree: Path, cuda: dict[str, str]) -> None:
    result = build(small_tree, **cuda, MAX_JOBS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    # The slowest to compile come first.
    assert compiled_files(result.stdout)[0] == "common_cuda_device"
    assert len(compiled_files(result.stdout)) == 3
    assert "Registers are spilled" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(
        ') and CUDA (sm_80, sm_90 + PTX) kernels; CROSSVIT_CUDA_ARCH_LIST="80;90" chooses others, '
        "CROSSVIT_BUILD_CUDA=0 leaves CUDA out"
    )
    assert compiled_files(build(small_tree, **cuda).stdout) == []
    write_program(Path(cuda["CUDA_HOME"]) / "bin/nvcc", NVCC.replace("echo", "exit 1 #", 1))
    (small_tree / "csrc/common/cuda/device.cu").touch()
    failed = build(small_tree, **cuda)
    assert failed.returncode != 0 and "crossvit_kernels: built" not in failed.stdout


@pytest.mark.slow
@needs_build_tools
@pytest.mark.parametrize(
    ("gpus", "wanted", "built"),
    [
        ("", "", ["80", "90"]),
        ("8.6\n", "", ["86"]),
        ("9.0\n8.6\n9.0\n", "", ["86", "90"]),
        ("12.0\n", "", ["80", "90"]),  # newer than the toolkit: runs the PTX
        ("7.5\n", "", ["80", "90"]),  # older than the kernels take
        ("[N/A]\n", "", ["80", "90"]),
        ("8.6\n", "90a, 80;100", ["80", "90a", "100"]),
        ("8.6\n", "90a", ["90a"]),
    ],
)
def test_architectures(
    gpus: str, wanted: str, built: list[str], small_tree: Path, cuda: dict[str, str]
) -> None:
    if gpus:
        smi = Path(cuda["PATH"].split(os.pathsep)[0]) / "nvidia-smi"
        write_program(smi, f"#!/bin/sh\nprintf '{gpus}'\n")
    result = build(small_tree, **cuda, CROSSVIT_CUDA_ARCH_LIST=wanted)
    assert result.returncode == 0, result.stdout + result.stderr
    (rules,) = small_tree.glob("build/*/build.ninja")
    code = re.findall(r",code=(\w+)", rules.read_text())
    newest = built[-1].rstrip("a")
    assert code == [*(f"sm_{arch}" for arch in built), f"compute_{newest}"]
    assert "-warn-spills" in rules.read_text()
    assert all(extension.architecture_for(built, int(a.rstrip("a"))) for a in built)


@pytest.mark.slow
@needs_build_tools
@pytest.mark.parametrize(
    ("gpus", "wanted", "has_cuda"),
    [("", "", False), ("7.5\n", "", False), ("7.5\n8.6\n", "", True), ("", "90", True)],
)
def test_cuda_is_built_where_a_gpu_is_or_if_asked_for(
    gpus: str, wanted: str, has_cuda: bool, small_tree: Path, cuda: dict[str, str]
) -> None:
    if gpus:
        smi = Path(cuda["PATH"].split(os.pathsep)[0]) / "nvidia-smi"
        write_program(smi, f"#!/bin/sh\nprintf '{gpus}'\n")
    settings = {**cuda, "CROSSVIT_BUILD_CUDA": "auto", "CROSSVIT_CUDA_ARCH_LIST": wanted}
    result = build(small_tree, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert ("and CUDA (sm_" in last) == has_cuda
    without = "CUDA is left out: no GPU from sm_80 on is here: CROSSVIT_BUILD_CUDA=1 builds it"
    assert last.endswith(without) == (not has_cuda)


@pytest.mark.slow
@needs_build_tools
def test_cuda_that_was_asked_for_must_be_there(small_tree: Path, tmp_path: Path) -> None:
    empty = str(tmp_path / "nowhere")
    toolchain = small_tree / "csrc/toolchain.py"
    toolchain.write_text(toolchain.read_text().replace("/usr/local/cuda", empty))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("c++", "as", "ld", "ninja", "sh"):
        if program := shutil.which(name):
            (programs / name).symlink_to(program)
    nowhere = {"CUDA_HOME": empty, "CUDA_PATH": empty, "PATH": str(programs)}
    result = build(small_tree, CROSSVIT_BUILD_CUDA="1", **nowhere)
    assert result.returncode != 0 and "no CUDA toolkit was found" in result.stderr
    result = build(small_tree, CROSSVIT_BUILD_CUDA="auto", **nowhere)
    assert result.returncode == 0, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.endswith("CUDA is left out: no CUDA toolkit was found: set CUDA_HOME")


@pytest.mark.slow
@needs_build_tools
def test_an_old_toolkit_is_not_taken(small_tree: Path, cuda: dict[str, str]) -> None:
    write_program(Path(cuda["CUDA_HOME"]) / "bin/nvcc", NVCC.replace("VERSION", "12.3"))
    result = build(small_tree, **cuda)
    assert result.returncode != 0 and "is 12.3, older than 12.4" in result.stderr
    result = build(small_tree, **{**cuda, "CROSSVIT_BUILD_CUDA": "auto"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is 12.3, older than 12.4" in result.stdout.splitlines()[-1]


@pytest.mark.slow
@needs_build_tools
def test_a_compiler_cache_is_used_where_it_is(small_tree: Path, cuda: dict[str, str]) -> None:
    log = small_tree / "log"
    ccache = Path(cuda["PATH"].split(os.pathsep)[0]) / "ccache"
    write_program(ccache, f'#!/bin/sh\necho "$1" >> {log}\nexec "$@"\n')
    result = build(small_tree, **cuda, CROSSVIT_BUILD_CCACHE="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    used = log.read_text().split()
    assert [Path(program).name for program in used].count("nvcc") == 2 and "c++" in used
    log.unlink()
    assert len(compiled_files(build(small_tree, **cuda, CROSSVIT_BUILD_CCACHE="0").stdout)) == 3
    assert not log.exists()
    ccache.unlink()
    if not shutil.which("ccache"):
        refused = build(small_tree, **cuda, CROSSVIT_BUILD_CCACHE="1")
        assert refused.returncode != 0 and "no ccache on the PATH" in refused.stderr


@pytest.mark.usefixtures("cpu_backend")
def test_cuda_code_imports_without_a_driver_and_says_so() -> None:
    """A CUDA build on a machine without a driver reports a reason and does not crash."""
    if not extension.cuda_architectures():
        pytest.skip("the extension was built without CUDA")
    failure = extension.cuda_self_check(1000)  # no machine has that device
    assert failure.startswith("cuda"), failure

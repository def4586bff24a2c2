"""The CPU kernels' tests on an extension built with AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_layouts.py",
    "ops/test_attention_core.py",
    "ops/test_cross_attention.py",
    "ops/test_layernorm_blocks.py",
)
# A compiler for CXX. The last -O counts: -O1 compiles in half the time of the build's -O3.
SANITIZING_COMPILER = """#!/bin/sh
exec c++ "$@" -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \\
    -fno-omit-frame-pointer
"""


def runtime(name: str) -> str:
    """The path of one of the compiler's libraries; its bare name if it is missing."""
    command = ["c++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a sanitized extension."""
    if platform.system() != "Linux" or shutil.which("c++") is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs Linux, a C++ compiler and the source tree")
    if "/" not in runtime("libasan.so"):
        pytest.skip("the compiler has no AddressSanitizer")
    pytest.importorskip("pybind11")
    tree = tmp_path_factory.mktemp("sanitized") / "crossvit"
    ignored = shutil.ignore_patterns("build", ".git", "*.so", "__pycache__", "results", ".venv")
    shutil.copytree(ROOT, tree, ignore=ignored)
    compiler = tree.parent / "c++"
    compiler.write_text(SANITIZING_COMPILER)
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "CROSSVIT_BUILD_CUDA": "0"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return tree


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": str(tree),
        # Without libstdc++ the first C++ exception aborts.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        env=inherited | environment,
    )


READS_TOO_FAR = """
import torch
from crossvit_kernels import extension
from crossvit_kernels.ops.attention_core import cpu

extension.core_problem = lambda x, *_: (2, x.shape[1] + 3, 4, x.shape[2], True, 1e-6)
cpu.forward_pass(torch.randn(2, 4, 16), torch.randn(2, 5, 16), None, None, 1e-6)
"""


@pytest.mark.slow
def test_cpu_kernels(tree: Path) -> None:
    # Both in one test, because workers of pytest-xdist would each build the extension.
    result = python(tree, "-c", READS_TOO_FAR)
    assert result.returncode and "heap-buffer-overflow" in result.stderr, result.stderr

    tests = [f"tests/{name}" for name in TESTS]
    result = python(tree, "-m", "pytest", "-q", "-n", "0", "-x", *tests)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]

"""common/cuda/launch.h as nvcc sees it, compiled with g++ on a runtime without a device."""

from __future__ import annotations

import subprocess
from pathlib import Path

import host_compiler
import pytest

RUNTIME = Path(__file__).parent / "fake_runtime"
CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.skipif(not host_compiler.compiler(), reason="needs g++")
def test_limits_and_clusters(tmp_path: Path) -> None:
    program = tmp_path / "launches"
    command = [host_compiler.compiler_path(), "-std=c++17", "-O1", "-pthread", "-D__CUDACC__"]
    sources = [f"-I{RUNTIME}", f"-I{CSRC}", str(RUNTIME / "launches.cpp"), "-o", str(program)]
    subprocess.run([*command, *sources], check=True, capture_output=True, text=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout

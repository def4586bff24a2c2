"""The host shim: kernels give correct results, and broken copies of them are caught.

The broken copies of a kernel are one program, whose FAULT variable selects the fault.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import host_compiler
import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_compiler.why_not() is not None, reason=str(host_compiler.why_not())),
]

FIXED, RANDOM = (None,), (1, 2, 3)
SANITIZERS = (None, "thread", "address")


def left_out(text: str) -> tuple[str, str]:
    return text, f"if (!FAULT) {text}"


# Kernel -> name -> texts and replacements. FAULT is true if that name is selected.
FAULTS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "gemm": {
        "no barrier before reading": [left_out("__syncthreads();  // the stage is there")],
        "no barrier before refilling": [left_out("__syncthreads();  // the stage may be refilled")],
        "barrier in a branch": [
            ("__syncthreads();  // the stage is there", "if (!FAULT || warp < 3) __syncthreads();")
        ],
        "no wait": [left_out("copy_async_wait<1>();")],
        "wait after use": [
            left_out("copy_async_wait<1>();"),
            (
                "const int row = row0 + warp",
                "if (FAULT) copy_async_wait<0>();\n      const int row = row0 + warp",
            ),
        ],
        "misaligned copy": [("copy_async_16(a + row", "copy_async_16(a + 4 * FAULT + row")],
        "misaligned ldmatrix": [("load_matrix_x4(rows, a +", "load_matrix_x4(rows, a + FAULT +")],
        "misaligned vector access": [("* n + column) =", "* n + column + FAULT) =")],
        "global row too far": [("inside = row0 + row < m", "inside = row0 + row < m + FAULT")],
        "shared copy too far": [
            ("b + row * kStride + column, w", "b + (row + FAULT) * kStride + column, w")
        ],
        "two blocks, one tile": [("int>(blockIdx.y)", "int>(FAULT ? 0 : blockIdx.y)")],
    },
    "ring": {
        "no wait for the copy": [left_out("barrier_wait(full + stage, round % 2);")],
        "no wait for the readers": [left_out("barrier_wait(empty + stage, round % 2 ^ 1);")],
        "too few bytes": [("(full + stage, kTileBytes", "(full + stage, kTileBytes / (1 + FAULT)")],
        "too many bytes": [("(full + stage, kTileBytes", "(full + stage, 16 * FAULT + kTileBytes")],
        "misaligned bulk copy": [("copy_bulk(stages +", "copy_bulk(stages + FAULT +")],
        "odd bulk size": [("+ first, kTileBytes / 2,", "+ first, kTileBytes / 2 - 4 * FAULT,")],
        "no barrier after initialisation": [left_out("__syncthreads();")],
        "readers do not arrive": [left_out("barrier_arrive(empty + stage);")],
        "nobody waits": [
            (
                "if (thread != kConsumers) return;",
                "if (thread != kConsumers) return;\n    if (FAULT) tiles = 1;",
            ),
            ("float sums[", "if (FAULT) return;\n  float sums["),
        ],
    },
    "cluster": {
        "no cluster barrier": [left_out("cluster_sync();  // the partial sums are there")],
        "a block's barrier": [
            (
                "cluster_sync();  // the partial sums are there",
                "if (FAULT) __syncthreads(); else cluster_sync();",
            )
        ],
        "exit before others read": [left_out("cluster_arrive();"), left_out("cluster_wait();")],
        "old address of an exited block": [
            left_out("cluster_arrive();"),
            left_out("cluster_wait();"),
            ("  float sum = 0;", "  float* first = in_rank(partial, 0);\n  float sum = 0;"),
            (
                "*in_rank(partial + total_column, other)",
                "(FAULT ? first[total_column] : *in_rank(partial + total_column, other))",
            ),
        ],
        "wait without arrival": [left_out("cluster_arrive();")],
        "rank too far": [
            (
                "in_rank(partial + total_column, other)",
                "in_rank(partial + total_column, other + FAULT)",
            )
        ],
    },
    "last_block": {
        "no fence after writing": [left_out("__threadfence();  // the partial sums")],
        "no fence before reading": [left_out("__threadfence();  // the count")],
    },
    "layernorm": {
        "no barrier before reading": [left_out("__syncthreads();  // all rows are there")],
        "shared index too far": [("row_values = values +", "row_values = values + FAULT +")],
        "global row too far": [("if (row < rows) {", "if (row < rows + FAULT) {")],
        "lanes exit before a shuffle": [
            ("if (row < rows", "if (FAULT && lane > 20) return;\n  if (row < rows")
        ],
        "shuffle in a branch": [("if (row < rows", "if ((!FAULT || lane < 20) && row < rows")],
    },
}

RACE = "ThreadSanitizer: data race"
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"

# Kernel, fault, sanitizer, seeds, and the program's message with each seed.
CATCHES = [
    ("gemm", "no barrier before reading", None, FIXED, "error nan"),
    ("gemm", "no barrier before reading", "thread", FIXED, RACE),
    ("gemm", "no barrier before refilling", None, RANDOM, "wrong result"),
    ("gemm", "no barrier before refilling", "thread", FIXED, RACE),
    ("gemm", "barrier in a branch", None, FIXED, "divergent __syncthreads: threads of one block"),
    ("gemm", "no wait", None, FIXED, "exits with cp.async copies it has not waited for"),
    ("gemm", "wait after use", None, FIXED, "error nan"),
    ("gemm", "misaligned copy", None, FIXED, "misaligned cp.async: its shared address"),
    ("gemm", "misaligned ldmatrix", None, FIXED, "misaligned ldmatrix"),
    ("gemm", "misaligned vector access", "address", FIXED, "store to misaligned address"),
    ("gemm", "global row too far", "address", FIXED, OVERFLOW),
    ("gemm", "shared copy too far", None, FIXED, "cp.async to outside the block's shared memory"),
    ("gemm", "two blocks, one tile", "thread", FIXED, RACE),
    ("ring", "no wait for the copy", None, FIXED, "deadlock|more arrivals"),
    ("ring", "no wait for the copy", "thread", FIXED, RACE),
    ("ring", "no wait for the readers", None, FIXED, "more arrivals than"),
    ("ring", "too few bytes", None, FIXED, "more bytes than were expected"),
    ("ring", "too many bytes", None, FIXED, "misses 0 arrivals and 16 bytes"),
    ("ring", "misaligned bulk copy", None, FIXED, "misaligned bulk copy: its shared address"),
    ("ring", "odd bulk size", None, FIXED, "bulk copy of 508 bytes"),
    ("ring", "no barrier after initialisation", None, RANDOM, "not initialised"),
    ("ring", "no barrier after initialisation", "thread", FIXED, RACE),
    ("ring", "readers do not arrive", None, FIXED, "deadlock: 1 threads wait at an mbarrier"),
    ("ring", "nobody waits", None, FIXED, "exits with a bulk copy in flight"),
    ("cluster", "no cluster barrier", None, FIXED, "error nan"),
    ("cluster", "no cluster barrier", "thread", FIXED, RACE),
    ("cluster", "a block's barrier", "thread", FIXED, RACE),
    ("cluster", "exit before others read", None, FIXED, "which has exited"),
    ("cluster", "exit before others read", "thread", FIXED, RACE),
    ("cluster", "old address of an exited block", None, FIXED, "error nan"),
    ("cluster", "old address of an exited block", "address", FIXED, "use-after-poison"),
    ("cluster", "wait without arrival", None, FIXED, "waits at the cluster's barrier without"),
    ("cluster", "rank too far", None, FIXED, "rank 4 of a cluster of 4"),
    ("last_block", "no fence after writing", "thread", FIXED, RACE),
    ("last_block", "no fence before reading", "thread", FIXED, RACE),
    ("layernorm", "no barrier before reading", None, FIXED, "error nan"),
    ("layernorm", "no barrier before reading", "thread", FIXED, RACE),
    ("layernorm", "shared index too far", "address", FIXED, OVERFLOW),
    ("layernorm", "global row too far", "address", FIXED, OVERFLOW),
    ("layernorm", "lanes exit before a shuffle", None, FIXED, "takes no part"),
    ("layernorm", "shuffle in a branch", None, FIXED, "deadlock: .* threads wait at __syncthreads"),
]

CHOICE = """
#include <cstdlib>
#include <cstring>
static const char* const chosen = std::getenv("FAULT");
static bool fault(const char* name) { return chosen && !std::strcmp(chosen, name); }
"""


def breakable(kernel: str) -> Path:
    """A kernel's source with all of its faults, selectable at run time."""
    include = '#include "kernels/check.h"\n'
    replacements = [(include, include + CHOICE)]
    for name, texts in FAULTS[kernel].items():
        replacements += [(old, new.replace("FAULT", f'fault("{name}")')) for old, new in texts]
    return host_compiler.changed(host_compiler.KERNELS / f"{kernel}.cu", replacements)


Programs = Callable[[str, str | None], Path]


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    """Compiles all programs, two at a time; a call waits for the requested one."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        pending = {
            (kernel, sanitizer): pool.submit(
                host_compiler.program, [breakable(kernel)], sanitizer=sanitizer
            )
            for sanitizer in SANITIZERS
            if host_compiler.why_not(sanitizer) is None
            for kernel in FAULTS
        }

        def program(kernel: str, sanitizer: str | None) -> Path:
            if (kernel, sanitizer) not in pending:
                pytest.skip(str(host_compiler.why_not(sanitizer)))
            return pending[kernel, sanitizer].result()

        yield program
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("kernel", FAULTS)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_are_right_in_any_order(
    programs: Programs, kernel: str, sanitizer: str | None
) -> None:
    for seed in (*FIXED, *RANDOM[: 2 if sanitizer else None]):
        done = host_compiler.run(programs(kernel, sanitizer), seed)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("kernel", "fault", "sanitizer", "seeds", "says"), CATCHES)
def test_a_fault_is_caught(
    programs: Programs,
    kernel: str,
    fault: str,
    sanitizer: str | None,
    seeds: tuple[int | None, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAULT", fault)
    for seed in seeds:
        done = host_compiler.run(programs(kernel, sanitizer), seed)
        output = done.stdout + done.stderr
        assert done.returncode != 0 and re.search(says, output), output
        if sanitizer:
            assert re.search(rf"{kernel}\.cu:\d+", output), output


def test_every_fault_has_a_catch() -> None:
    assert {(k, f) for k, faults in FAULTS.items() for f in faults} == {c[:2] for c in CATCHES}


def test_a_fault_names_block_and_thread(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "misaligned copy")
    output = host_compiler.run(programs("gemm", None)).stdout
    assert re.search(r"fault: block \(0, 0, 0\), thread \(\d+, 0, 0\): misaligned", output), output


def test_workers_compile_a_source_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CROSSVIT_SHIM_CACHE", str(tmp_path / "cache"))
    source, run, commands = tmp_path / "one.cpp", host_compiler._run, []
    source.write_text("int one() { return 1; }\n")

    def slowly(command: list[str]) -> None:
        commands.append(command)
        time.sleep(0.1)
        run(command)

    monkeypatch.setattr(host_compiler, "_run", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as workers:
        made = set(workers.map(host_compiler.library, 3 * [[source]]))
    assert len(made) == 1 and sum("-c" in command for command in commands) == 1


def test_the_portable_stack_switch() -> None:
    program = host_compiler.program(
        [host_compiler.KERNELS / "ring.cu"], defines=["CROSSVIT_SHIM_UCONTEXT"]
    )
    for seed in (None, 1):
        done = host_compiler.run(program, seed)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def formats() -> ctypes.CDLL:
    return ctypes.CDLL(str(host_compiler.library([host_compiler.KERNELS / "formats.cu"])))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def as_bits(values: np.ndarray, half: bool) -> np.ndarray:
    dtype = torch.float16 if half else torch.bfloat16
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def as_float(bits: np.ndarray, half: bool) -> np.ndarray:
    dtype = torch.float16 if half else torch.bfloat16
    return torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()


@pytest.mark.parametrize("half", (False, True))
@pytest.mark.parametrize("transposed", (False, True))
def test_fragments_of_16_bits(formats: ctypes.CDLL, half: bool, transposed: bool) -> None:
    generator = np.random.default_rng(0)
    a = as_bits(generator.standard_normal((16, 16), np.float32), half)
    b = as_bits(generator.standard_normal((16, 8), np.float32), half)
    given = [np.ascontiguousarray(x.T if transposed else x) for x in (a, b)]
    c = np.empty((16, 8), np.float32)
    assert formats.multiply(half, transposed, *map(pointer, given), pointer(c)) == 0
    expected = as_float(a, half).astype(np.float64) @ as_float(b, half)
    np.testing.assert_allclose(c, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("half", (False, True))
def test_fragments_of_half_the_depth(formats: ctypes.CDLL, half: bool) -> None:
    generator = np.random.default_rng(0)
    a = as_bits(generator.standard_normal((16, 8), np.float32), half)
    b = as_bits(generator.standard_normal((8, 8), np.float32), half)
    c = np.empty((16, 8), np.float32)
    assert formats.multiply_half_depth(half, pointer(a), pointer(b), pointer(c)) == 0
    expected = as_float(a, half).astype(np.float64) @ as_float(b, half)
    np.testing.assert_allclose(c, expected, rtol=0, atol=1e-5)


def test_tf32_reads_19_bits(formats: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((16, 8), np.float32)
    b = generator.standard_normal((8, 8), np.float32)
    c = np.empty((16, 8), np.float32)
    assert formats.multiply_tf32(pointer(a), pointer(b), pointer(c)) == 0
    read_a, read_b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
    np.testing.assert_allclose(c, read_a.astype(np.float64) @ read_b, rtol=0, atol=2e-6)
    assert np.abs(c - a @ b).max() > 1e-4


@pytest.mark.parametrize("half", (False, True))
def test_conversions(formats: ctypes.CDLL, half: bool) -> None:
    """Every 16-bit pattern to float and back; floats around every rounding boundary."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = np.empty(bits.size, np.float32)
    formats.to_float(half, pointer(bits), pointer(values), bits.size)
    np.testing.assert_array_equal(values, as_float(bits, half))

    patterns = values.view(np.uint32)
    offsets = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], np.uint32)
    floats = (patterns[:, None] + offsets).view(np.float32).ravel()
    rounded = np.empty(floats.size, np.uint16)
    formats.from_float(half, pointer(floats), pointer(rounded), floats.size)
    nan = np.isnan(floats)
    np.testing.assert_array_equal(rounded[~nan], as_bits(floats[~nan], half))
    assert (rounded[nan] == 0x7FFF).all()


def test_division_by_a_reciprocal(formats: ctypes.CDLL) -> None:
    """Around multiples, where a reciprocal that is off by one unit shows."""
    most = 2**31 - 1
    divisors = [*range(1, 300), *(2**k + i for k in range(9, 31) for i in (-1, 0, 1)), most]
    for divisor in divisors:
        multiples = np.linspace(0, most // divisor, 200).astype(np.int64) * divisor
        numerators = np.stack([multiples - 1, multiples, multiples + 1]).clip(0, most).ravel()
        given, found = numerators.astype(np.int32), np.empty(numerators.size, np.int32)
        formats.quotients(divisor, pointer(given), pointer(found), found.size)
        np.testing.assert_array_equal(found, numerators // divisor)


def test_votes_shuffles_and_atomics(formats: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in ("", "1"):
        monkeypatch.setenv("CROSSVIT_SHIM_SEED", seed)
        results = np.zeros(3, np.int32)
        addresses = [ctypes.c_void_p(results.ctypes.data + 4 * i) for i in range(3)]
        assert formats.count_blocks(7, *addresses) == 0
        assert results.tolist() == [7 * 111, 7, 7]


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((4, 32, 232448, 4), 0),
        ((4, 2048, 0, 1), 9),
        ((0, 32, 0, 1), 9),
        ((6, 32, 0, 4), 9),
        ((4, 32, 232449, 1), 1),
        ((32, 32, 0, 16), 1),
    ],
)
def test_launch_errors(formats: ctypes.CDLL, shape: tuple[int, int, int, int], error: int) -> None:
    """Invalid numbers of blocks, threads, bytes of shared memory, blocks per cluster."""
    assert formats.launch_error(*shape) == error


def test_python_under_the_address_sanitizer() -> None:
    if reason := host_compiler.why_not("address"):
        pytest.skip(reason)
    library = host_compiler.library([host_compiler.KERNELS / "formats.cu"], sanitizer="address")
    code = f"""if True:
        import ctypes, numpy as np
        library = ctypes.CDLL({str(library)!r})
        a, b = np.zeros((16, 16), np.uint16), np.zeros((16, 8), np.uint16)
        for rows in (16, 15):
            c = np.zeros((rows, 8), np.float32)
            arrays = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, c)]
            print(rows, library.multiply(0, 0, *arrays), flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=host_compiler.environment(sanitizer="address", preload=True),
    )
    assert done.returncode != 0 and done.stdout == "16 0\n", done.stdout + done.stderr
    assert re.search(OVERFLOW + r"[\s\S]*formats\.cu:\d+", done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("kernel", (*FAULTS, "formats"))
def test_the_same_sources_compile_with_nvcc(kernel: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", *host_compiler.INCLUDES, "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    command += ["-c", str(host_compiler.KERNELS / f"{kernel}.cu"), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Hold the cycle model against kernels whose speed on GPUs is published.

    python bench/model_validation.py [--json FILE]

Compiles a copy, a matrix product and the forward pass of attention over a long sequence, models
them, and prints what was measured elsewhere beside that. Nothing here is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crossvit_kernels import supported
from crossvit_kernels.gpu.launcher import Usage
from crossvit_kernels.inspect import machine_code
from crossvit_kernels.inspect.model.estimate import estimate
from crossvit_kernels.inspect.model.gpus import A100, H100, H200, Gpu
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.triton_launch import launch_of


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = a b, [M, K] times [K, N], row by row, as in Triton's tutorial."""
    program = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    group = program // (GROUP * columns)
    row = group * GROUP + program % GROUP
    column = (program % (GROUP * columns)) // GROUP
    rows, cols, ks = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_at = a_ptr + rows[:, None] * K + ks[None, :]
    b_at = b_ptr + ks[:, None] * N + cols[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(a_at), tl.load(b_at), acc)
        a_at += BK
        b_at += BK * N
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], acc.to(tl.bfloat16))


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, N, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):
    """Attention without a mask, [batch * heads, N, D]."""
    base = tl.program_id(1).to(tl.int64) * N * D
    rows, cols, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(q_ptr + base + rows[:, None] * D + d[None, :])
    k_at = k_ptr + base + cols[None, :] * D + d[:, None]
    v_at = v_ptr + base + cols[:, None] * D + d[None, :]
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for _ in range(0, N, BN):
        scores = tl.dot(q, tl.load(k_at))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(tl.bfloat16), tl.load(v_at), acc)
        peak = new_peak
        k_at += BN * D
        v_at += BN * D
    acc = acc / total[:, None]
    tl.store(o_ptr + base + rows[:, None] * D + d[None, :], acc.to(tl.bfloat16))


class Case(NamedTuple):
    """A kernel with what is published of it, or of one as fast.

    Attributes:
        name: What it does, and how.
        gpu: Where.
        launch: The launch.
        work: Operations, or bytes.
        unit: Of the work in 1e12 a second.
        published: From, to.
        source: Where.
    """

    name: str
    gpu: Gpu
    launch: Launch
    work: float
    unit: str
    published: tuple[float, float]
    source: str


_FA2 = "Dao 2023 (FlashAttention-2), CUDA: 50 to 73 % of the A100's peak"
_FA3 = (
    "Triton's, 16k tokens, no mask: Shah et al. 2024 (FlashAttention-3), figure 5; D = 128 also in "
    "pytorch/benchmark pull request 2391"
)
_CUBLAS = "what is commonly reported of cuBLAS and Triton's tutorial; no one source"


def copy(gpu: Gpu) -> Case:
    """256 Mi elements of 2 bytes."""
    size, block = 1 << 28, 4096
    launch = compiled(
        gpu, copy_kernel, [_empty(size), _empty(size), size], [block], (size // block,), 8, 2
    )
    published = {"A100": (1.74, 1.83), "H100": (2.95, 3.05), "H200": (4.1, 4.4)}[gpu.name]
    source = "commonly reported of copies: 86 to 91 % of the data sheet's bandwidth"
    return Case("copy", gpu, launch, 4 * size, "TB/s", published, source)


def matmul(gpu: Gpu, size: int = 8192) -> Case:
    """In tiles of 128 x 256 x 64, 8 warps, 3 stages."""
    tensors = [_empty(size, size) for _ in range(3)]
    launch = compiled(
        gpu,
        matmul_kernel,
        [*tensors, size, size, size],
        [128, 256, 64, 8],
        (size // 128 * (size // 256),),
        8,
        3,
    )
    published = (240.0, 270.0) if gpu is A100 else (600.0, 750.0)
    name = f"matrix product of {size}"
    return Case(name, gpu, launch, 2 * size**3, "TFLOP/s", published, _CUBLAS)


def attention(gpu: Gpu, head_dim: int, tokens: int = 16384) -> Case:
    """Of 2048 channels in all, as FlashAttention's benchmarks have it."""
    heads = 2048 // head_dim
    if gpu is A100:
        rows, columns, num_warps, stages = 128, 64, 4 if head_dim == 64 else 8, 3
    else:
        rows, columns, num_warps, stages = 128, 128, 8, 3 if head_dim == 64 else 2
    tensors = [_empty(heads, tokens, head_dim) for _ in range(4)]
    launch = compiled(
        gpu,
        attention_kernel,
        [*tensors, tokens, 0.125],
        [rows, columns, head_dim],
        (tokens // rows, heads),
        num_warps,
        stages,
    )
    work = 4 * heads * tokens**2 * head_dim
    if gpu is A100:
        published, source = (156.0, 228.0), _FA2
    else:
        published, source = (403.0, 403.0) if head_dim == 64 else (395.0, 477.0), _FA3
    return Case(f"attention, D = {head_dim}", gpu, launch, work, "TFLOP/s", published, source)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def compiled(
    gpu: Gpu,
    kernel: Any,
    parameters: list[Any],
    constants: list[int],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
) -> Launch:
    """A launch of a kernel whose constants follow its other parameters."""
    types = {p.name: "constexpr" for p in kernel.params}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (parameter, value) in enumerate(zip(kernel.params, parameters, strict=False)):
        kind = {torch.Tensor: "*bf16", float: "fp32", int: "i32"}[type(value)]
        types[parameter.name] = kind
        if kind == "*bf16" or (kind == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    at = range(len(parameters), len(kernel.params))
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(i,): value for i, value in zip(at, constants, strict=True)},
        attrs=attributes,
    )
    found = triton.compile(
        source,
        target=GPUTarget("cuda", gpu.compute_capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(found.asm["cubin"])
        ((registers, stack_bytes),) = machine_code.usage(cubin).values()
    usage = Usage(registers, stack_bytes // 4, int(found.metadata.shared), fits=True)
    return launch_of(found, usage, grid, num_warps, parameters)


def deviation(modelled: float, published: tuple[float, float]) -> float:
    """From the nearer end of the range; 0 within it."""
    low, high = published
    return min(modelled / low - 1, 0) if modelled < low else max(modelled / high - 1, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    print(f"{'kernel':26} {'GPU':5} {'modelled':>9} {'published':>13} {'deviation':>9}  bound by")
    rows = []
    for gpu in (A100, H100, H200):
        cases = [copy(gpu), matmul(gpu)]
        if gpu is not H200:  # not published
            cases += [attention(gpu, head_dim) for head_dim in (64, 128)]
        for case in cases:
            found = estimate(case.launch, gpu)
            rate = case.work / found.microseconds / 1e6
            off = deviation(rate, case.published)
            low, high = case.published
            span = f"{low:g}-{high:g}" if low != high else f"{low:g}"
            print(
                f"{case.name:26} {gpu.name:5} {rate:9.4g} {span:>13} {off:+9.1%}  "
                f"{found.bound_by} ({case.unit}; {case.source})",
                flush=True,
            )
            rows.append(
                {
                    "kernel": case.name,
                    "gpu": gpu.name,
                    "modelled": float(f"{rate:.4g}"),
                    "unit": case.unit,
                    "published": case.published,
                    "deviation": round(off, 4),
                    "source": case.source,
                    "bound_by": found.bound_by,
                }
            )
    if options.json:
        result = {
            "what": "a model of machine code beside published measurements",
            "date": datetime.date.today().isoformat(),
            "versions": {name: supported.installed_version(name) for name in ("torch", "triton")},
            "gpus": [dataclasses.asdict(gpu) for gpu in (A100, H100, H200)],
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

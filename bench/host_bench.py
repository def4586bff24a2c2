"""Host time of a fusion's launches, without a GPU: ``python bench/host_bench.py``.

A driver that does nothing stands in for CUDA's (tests/no_device.py), so what is measured is Python
and torch on the host: checks, memory for results, and the launch up to the call of a driver. Each
time is the best of many rounds, in microseconds, once as Triton launches kernels and once as
crossvit_kernels/gpu/launcher.py does. Memory comes from torch's allocator for CPUs. Where the
extension has CUDA kernels, also up to the call of the extension, which is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}  # read by Triton
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import measure
import no_device
import report
import torch
import triton
from fusion_cases import make_weights

import crossvit_kernels as ck
from crossvit_kernels import extension
from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.candidates import Candidates
from crossvit_kernels.gpu.configurations import PAIRS
from crossvit_kernels.ops.cross_attention import cuda
from crossvit_kernels.ops.cross_attention import triton as fusion

#: CrossViT-15 at 240 pixels: C_own, C and patches of the L branch's CLS, then of the S branch's.
SIZES = ((384, 192, 400), (192, 384, 196))
HEADS = 6


class Nothing:
    """In place of a launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


def as_triton_does(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    candidates: Candidates,
    constants: tuple[Any, ...] = (),
    weights: tuple[Any, ...] = (),
    eps: float | None = None,
) -> None:
    preferred = candidates[0]
    constants = *preferred.constants, *constants
    numbers = sizes if eps is None else (*sizes, eps)
    kernel[grid](*tensors, *weights, *numbers, *constants, **preferred.options)


def inputs(own: int, channels: int, num_tokens: int) -> ck.FusionInputs:
    """Of one image; weights are a module's parameters."""
    weights = (torch.nn.Parameter(t.bfloat16()) for t in make_weights(own, channels))
    cls = torch.randn(1, own).bfloat16()
    tokens = torch.randn(1, 1 + num_tokens, channels).bfloat16()[:, 1:]
    return ck.FusionInputs(cls, tokens, ck.FusionWeights(*weights), HEADS)


def best(call: Callable[[], Any], rounds: int, calls: int = 200) -> float:
    """Microseconds of a call, in the round that other work on the machine disturbed least."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return round(min(times), 1)


def measure_all(rounds: int) -> dict[str, float]:
    a, b = (inputs(*sizes) for sizes in SIZES)

    def alone(x: ck.FusionInputs) -> torch.Tensor:
        return ck.cross_attention_fusion(*x[:4], backend="triton")

    def pair(form: str) -> tuple[torch.Tensor, ...]:
        with PAIRS.choose(form):
            return ck.cross_attention_fusion_pair(a, b, backend="triton")

    calls: dict[str, Callable[[], Any]] = {
        "forward, Triton's part": lambda: fusion.forward(*a[:3], None, HEADS, 1e-6),
        "forward": lambda: alone(a),
        "both, two calls": lambda: (alone(a), alone(b)),
        "both, in two launches": lambda: pair("apart"),
        "both, in one launch": lambda: pair("paired"),
    }
    with torch.no_grad():
        return {name: best(call, rounds) for name, call in calls.items()}


def measure_cuda(rounds: int) -> dict[str, float]:
    found = extension.cuda_kernels
    if found is None:
        return {}
    functions = {name: getattr(found.functions, name) for name in dir(found.functions)}
    functions["cross_attention_forward"] = lambda **arguments: None
    stand_in = extension.CudaKernels(types.SimpleNamespace(**functions), "cpu")
    cls, tokens, weights, heads, _ = inputs(*SIZES[0])

    def call() -> Any:
        return cuda.forward(cls, tokens, weights, None, heads, 1e-6)

    extension.cuda_kernels = stand_in
    try:
        with torch.no_grad():
            return {"forward, CUDA's part": best(call, rounds)}
    finally:
        extension.cuda_kernels = found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    no_device.NoDevice.launcher_cls = Nothing
    fusion.why_not = lambda *inputs: None  # no GPU is no reason here
    ours, start = measure_all(options.rounds), launcher.start
    launcher.start = as_triton_does
    theirs, launcher.start = measure_all(options.rounds), start
    print(f"Triton {triton.__version__}, us{'':24} as Triton launches    as we do")
    for name, value in ours.items():
        print(f"{name:38} {theirs[name]:18.1f} {value:11.1f}")
    cuda_us = measure_cuda(options.rounds)
    for name, value in cuda_us.items():
        print(f"{name:57} {value:11.1f}")
    if options.json:
        facts = measure.environment(torch.device("cpu")) | {"triton": triton.__version__}
        found = {"benchmark": "host", "environment": facts, "triton_us": theirs, "ours_us": ours}
        found["cuda_us"] = cuda_us
        report.write_json(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Host time of launches, without a GPU: ``python bench/host_bench.py``.

A driver that does nothing stands in for CUDA's (tests/no_device.py), so this measures Python and
torch on the host: checks, the choice of a backend, memory for results (from torch's CPU allocator),
and the launch up to the call of the driver: of a fusion, of a transformer block and its halves, and
of all blocks of CrossViT-15. Each time is the best of many rounds, in microseconds, once with
Triton's own launch and once with crossvit_kernels/gpu/launcher.py. If the extension has CUDA
kernels, the time up to the call of the extension is measured too.

As on a GPU, calls choose Triton by themselves, and kernels are watched (``ck.verification``), here
without being compared. Backward passes are of few tokens, as their matrix products run on the CPU.

There are no results to check. Instead, before timing, each call must make the expected number of
launches, with the same kernels and arguments both ways.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read by Triton
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import command_line
import measure
import no_device
import report
import torch
import triton
from block_cases import ffn_weights, msa_weights
from command_line import positive
from fusion_cases import make_weights

import crossvit_kernels as ck
from crossvit import create_model
from crossvit_kernels import extension
from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.tables import Candidates
from crossvit_kernels.modules import TransformerBlock
from crossvit_kernels.ops.cross_attention import cuda
from crossvit_kernels.ops.cross_attention import triton as fusion
from crossvit_kernels.verify import compare

#: CrossViT-15 at 240 pixels: cls_dim, C and patches of the L branch's CLS, then of the S branch's.
SIZES = ((384, 192, 400), (192, 384, 196))
HEADS = 6
#: Channels and tokens of a block: CrossViT-15's L branch; with backward.
BLOCK, BLOCK_WITH_BACKWARD = (384, 197), (48, 9)
CPU = torch.device("cpu")
#: Calls per round: during longer ones, other processes would run as well.
CALLS = 4
#: Of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
EXPECTED_LAUNCHES = {
    "forward, Triton's part": 1,
    "forward": 1,
    "both, two calls": 2,
    "both, as a pair": 2,
    "layernorm_msa": 3,
    "layernorm_ffn": 2,
    "layernorm_msa, with backward": 6,
    "layernorm_ffn, with backward": 5,
    "TransformerBlock": 5,
    "CrossViT-15, all blocks": 18 * 5 + 3 * 2,
}


class Nothing:
    """Stands in for a launch."""

    #: The launches of a call that is being checked; None during timing.
    launches: list[tuple[Any, ...]] | None = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        if Nothing.launches is not None:
            Nothing.launches.append((self.name, arguments[:3], len(arguments)))


def launched(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """Kernel, grid and number of arguments of each launch of a call."""
    Nothing.launches = launches = []
    try:
        call()
    finally:
        Nothing.launches = None
    return launches


def start_as_triton(
    kernel: Any,
    grid: Any,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    candidates: Candidates,
    constants: tuple[Any, ...] = (),
    weights: tuple[Any, ...] = (),
    eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    preferred = candidates[0]
    made: tuple[torch.Tensor, ...] = ()
    if callable(grid):
        grid, made, counts = grid(*preferred.constants)
        sizes = *sizes, *counts
    constants = *preferred.constants, *constants
    numbers = sizes if eps is None else (*sizes, eps)
    kernel[grid](*tensors, *made, *weights, *numbers, *constants, **preferred.options)
    return made


def inputs(cls_dim: int, channels: int, num_tokens: int) -> ck.FusionInputs:
    """Inputs of one image; weights are a module's parameters."""
    weights = (torch.nn.Parameter(t.bfloat16()) for t in make_weights(cls_dim, channels))
    cls = torch.randn(1, cls_dim).bfloat16()
    tokens = torch.randn(1, 1 + num_tokens, channels).bfloat16()[:, 1:]
    return ck.FusionInputs(cls, tokens, ck.FusionWeights(*weights), HEADS)


def best_of(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds of each call in its fastest round."""
    timings = measure.round_robin(
        {name: lambda _, call=call: call() for name, call in calls.items()},
        measure.Stopwatch(CPU, most_calls=CALLS),
        min_time=float("inf"),
        repeats=rounds,
    )
    return {name: round(min(timing.seconds) * 1e6, 1) for name, timing in timings.items()}


def calls_to_measure() -> dict[str, Callable[[], Any]]:
    a, b = (inputs(*sizes) for sizes in SIZES)

    def alone(x: ck.FusionInputs) -> torch.Tensor:
        return ck.cross_attention_fusion(*x[:4])

    return {
        "forward, Triton's part": lambda: fusion.forward(a, 1e-6, ""),
        "forward": lambda: alone(a),
        "both, two calls": lambda: (alone(a), alone(b)),
        "both, as a pair": lambda: ck.cross_attention_fusion_pair(a, b),
        **block_calls(),
        **model_calls(),
    }


def block_calls() -> dict[str, Callable[[], Any]]:
    """Calls of the halves of a block, whose weights are parameters."""

    def parameters(weights: Any) -> Any:
        return type(weights)(*(torch.nn.Parameter(t.bfloat16()) for t in weights))

    def gradients(y: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return torch.autograd.grad(y, tensors, dy)

    def halves(channels: int, num_tokens: int) -> tuple[torch.Tensor, Any, Any]:
        msa, ffn = msa_weights(channels), ffn_weights(channels, 3 * channels)
        x = torch.randn(1, num_tokens, channels).bfloat16()
        return x, parameters(msa), parameters(ffn)

    x, msa, ffn = halves(*BLOCK)
    few, small_msa, small_ffn = halves(*BLOCK_WITH_BACKWARD)
    few, dy = few.requires_grad_(), torch.ones_like(few)
    recorded = torch.enable_grad()
    layernorm_msa, layernorm_ffn = recorded(ck.layernorm_msa), recorded(ck.layernorm_ffn)
    return {
        "layernorm_msa": lambda: ck.layernorm_msa(x, msa, HEADS),
        "layernorm_ffn": lambda: ck.layernorm_ffn(x, ffn),
        "layernorm_msa, with backward": lambda: gradients(
            layernorm_msa(few, small_msa, HEADS), few, *small_msa
        ),
        "layernorm_ffn, with backward": lambda: gradients(
            layernorm_ffn(few, small_ffn), few, *small_ffn
        ),
    }


def model_calls() -> dict[str, Callable[[], Any]]:
    """Calls of a block's module and of all blocks of CrossViT-15, for one image."""
    channels, num_tokens = BLOCK
    block = TransformerBlock(channels, HEADS, mlp_ratio=3.0).bfloat16().eval()
    model = create_model("crossvit_15_240", use_fused=True).bfloat16().eval()
    x = torch.randn(1, num_tokens, channels).bfloat16()
    with torch.no_grad():
        embedded = model.embed(torch.randn(1, 3, 240, 240).bfloat16())

    def all_blocks() -> Any:
        branches = embedded
        for multi_scale in model.blocks:
            branches = multi_scale(*branches)
        return branches

    return {"TransformerBlock": lambda: block(x), "CrossViT-15, all blocks": all_blocks}


def measure_both(rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of each call, with our launcher and with Triton's own launch."""
    calls, start = calls_to_measure(), launcher.start
    with torch.no_grad():
        triton_launches = {name: launched(call) for name, call in calls.items()}
        ours = best_of(calls, rounds)
        launcher.start = start_as_triton
        try:
            check(triton_launches, {name: launched(call) for name, call in calls.items()})
            theirs = best_of(calls, rounds)
        finally:
            launcher.start = start
    return ours, theirs


def check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise RuntimeError if a call does not launch the expected kernels."""
    for name, launches in ours.items():
        expected = EXPECTED_LAUNCHES[name]
        if len(launches) != expected:
            raise RuntimeError(f"{name}: expected {expected} launches, found {launches}")
        if launches != theirs[name]:
            raise RuntimeError(f"{name}: we launch {launches}, Triton {theirs[name]}")


def measure_cuda(rounds: int) -> dict[str, float]:
    cuda_kernels = extension.cuda_kernels
    if cuda_kernels is None:
        return {}
    functions = {
        name: getattr(cuda_kernels.functions, name) for name in dir(cuda_kernels.functions)
    }
    calls: list[str] = []
    functions["cross_attention_forward"] = lambda **arguments: calls.append("forward")
    stand_in = extension.CudaKernels(types.SimpleNamespace(**functions), "cpu")
    fusion_inputs = inputs(*SIZES[0])

    def call() -> Any:
        return cuda.forward(fusion_inputs, 1e-6, "")

    extension.cuda_kernels = stand_in
    try:
        with torch.no_grad():
            call()
            if calls != ["forward"]:
                raise RuntimeError(
                    f"CUDA's part: expected one call of the extension, found {calls}"
                )
            stand_in.functions.cross_attention_forward = lambda **arguments: None
            return best_of({"forward, CUDA's part": call}, rounds)
    finally:
        extension.cuda_kernels = cuda_kernels


def as_on_a_gpu() -> None:
    """Let a CPU pass for a GPU whose kernels were found right."""
    no_device.NoDevice.launcher_cls = Nothing
    # The package's attribute of this name is a function.
    importlib.import_module("crossvit_kernels.backends")._ON_A_CPU = ("triton",)
    launcher._INTERPRETING = launcher.interpreter_has_bfloat16 = True
    # Freed memory stays in the process, as with torch's allocator on a GPU.
    for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        ctypes.CDLL(None).mallopt(parameter, 32 << 20)
    compare.check_forward = compare.check_backward = lambda *arguments: None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--rounds", type=positive, default=400, help=f"of at most {CALLS} calls (400)"
    )
    parser.set_defaults(benchmark="host", device=CPU, dtype="bfloat16")
    command_line.add_files(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    as_on_a_gpu()
    with ck.verification("first", trust_evidence=False):
        ours, theirs = measure_both(options.rounds)
        cuda_us = measure_cuda(options.rounds)
    header = (f"Triton {triton.__version__}, us", "as Triton launches", "as we do")
    lines = [(name, f"{theirs[name]:.1f}", f"{us:.1f}") for name, us in ours.items()]
    lines += [(name, "", f"{us:.1f}") for name, us in cuda_us.items()]
    print(report.format_table(header, lines))
    document = report.new_document(options, triton_us=theirs, ours_us=ours, cuda_us=cuda_us)
    document["environment"]["triton"] = triton.__version__
    report.save(options, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A transformer block's two halves, LayerNorm-MSA and LayerNorm-FFN: ours against eager PyTorch.

    python bench/block_bench.py

measures in one run the reference (matmul, softmax, matmul), the same with SDPA as a user would
write it, and every usable backend of crossvit_kernels; forward, and forward with backward, for
both branches of CrossViT-15. A result that is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import report
import torch
import torch.nn.functional as F
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.layernorm_msa.op import BACKENDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EPS = 1e-6
#: Branch: tokens, width, heads; the FFN is three times as wide.
BRANCHES = {"S": (401, 192, 6), "L": (197, 384, 6)}

Call = Callable[[Tensor, Sequence[Tensor]], Tensor]


def sdpa_msa(x: Tensor, weights: Sequence[Tensor], heads: int) -> Tensor:
    w = ck.MsaWeights(*weights)
    normed = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + F.linear(attended, w.out_weight, w.out_bias)


def msa_contenders(heads: int, backends: Sequence[str]) -> dict[str, Call]:
    def ours(backend: str) -> Call:
        return lambda x, w: ck.layernorm_msa(x, ck.MsaWeights(*w), heads, EPS, backend=backend)

    calls: dict[str, Call] = {"eager": ours("reference")}
    calls["eager, SDPA"] = lambda x, w: sdpa_msa(x, w, heads)
    return calls | {f"ours ({name})": ours(name) for name in backends}


def ffn_contenders(backends: Sequence[str]) -> dict[str, Call]:
    def ours(backend: str) -> Call:
        return lambda x, w: ck.layernorm_ffn(x, ck.FfnWeights(*w), EPS, backend=backend)

    return {"eager": ours("reference")} | {f"ours ({name})": ours(name) for name in backends}


def make_weights(shapes: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    def make(shape: tuple[int, ...]) -> Tensor:
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        return (like.new_empty(shape).normal_() * scale).requires_grad_()

    return [make(shape) for shape in shapes]


def timed_calls(
    calls: dict[str, Call], x: Tensor, weights: list[Tensor], train: bool
) -> dict[str, Callable[[int], object]]:
    upstream = torch.randn_like(x)

    def forward(call: Call) -> Callable[[int], object]:
        def run(_: int) -> object:
            with torch.no_grad():
                return call(x, weights)

        return run

    def with_backward(call: Call) -> Callable[[int], object]:
        return lambda _: torch.autograd.grad(call(x, weights), [x, *weights], upstream)

    wrap = with_backward if train else forward
    return {name: wrap(call) for name, call in calls.items()}


def check(calls: dict[str, Call], x: Tensor, weights: list[Tensor]) -> list[str]:
    """The contenders whose output is no worse than twice (16 bits) or 8 times eager's error."""
    factor = 2 if x.dtype.itemsize == 2 else 8
    with torch.no_grad():
        exact = calls["eager"](x.double(), [w.double() for w in weights])
        errors = {
            name: (call(x, weights).double() - exact).square().mean().sqrt().item()
            for name, call in calls.items()
        }
    floor = torch.finfo(x.dtype).eps * exact.square().mean().sqrt().item()
    return [name for name in calls if not errors[name] <= factor * errors["eager"] + floor]


def measured(
    title: str, calls: dict[str, Call], x: Tensor, weights: list[Tensor], min_time: float
) -> list[dict[str, Any]]:
    """A row for each mode and contender."""
    rows = []
    for mode in ("forward", "train"):
        timings = measure.round_robin(
            timed_calls(calls, x, weights, mode == "train"),
            measure.Stopwatch(x.device),
            min_time=min_time,
            repeats=1000,
        )
        for name, timing in timings.items():
            rows.append(
                {
                    "half": title,
                    "mode": mode,
                    "contender": name,
                    "median_ms": timing.quantile(0.5) * 1e3,
                    "times_eager": timing.median_speedup(timings["eager"]),
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--min-time", type=float, default=3.0, help="seconds for each mode")
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args(argv)

    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    on_cpu = device.type == "cpu"
    usable = ck.backends()
    backends = [name for name in BACKENDS if usable[name] and (name == "cpu") == on_cpu]
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for branch, (tokens, dim, heads) in BRANCHES.items():
        x = torch.randn(arguments.batch, tokens, dim, device=device).to(dtype).requires_grad_()
        hidden = 3 * dim
        halves = {
            "msa": (
                msa_contenders(heads, backends),
                [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)],
            ),
            "ffn": (
                ffn_contenders(backends),
                [(dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)],
            ),
        }
        for half, (calls, shapes) in halves.items():
            weights = make_weights(shapes, x.detach())
            bad = check(calls, x, weights)
            wrong += [f"{branch} {half}: {name}" for name in bad]
            good = {name: call for name, call in calls.items() if name not in bad}
            title = f"{half}, {branch} branch"
            rows += measured(title, good, x, weights, arguments.min_time)
    header = ("half", "mode", "contender", "median ms", "vs eager")
    shown = [
        (r["half"], r["mode"], r["contender"], f"{r['median_ms']:.4g}", f"{r['times_eager']:.2f}x")
        for r in rows
    ]
    print(f"{measure.device_name(device)}, batch {arguments.batch}, {arguments.dtype}")
    print(report.format_table(header, shown))
    if arguments.json:
        document = {
            "environment": measure.environment(device),
            "arguments": {"batch": arguments.batch, "dtype": arguments.dtype},
            "results": rows,
        }
        report.write_json(arguments.json, document)
    for name in wrong:
        print(f"WRONG RESULT, not timed: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

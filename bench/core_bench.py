"""attention_core, the pass over the tokens alone: ours against PyTorch, beside the memory's speed.

    python bench/core_bench.py --channels 192 384 --batch 64 256

measures the reference (LayerNorm, two matrix products, softmax), the same compiled, and every
usable backend of crossvit_kernels; forward, and forward with backward. The floor is the time in
which the device copies the tokens' bytes: read once forward, read twice and written once with
backward. A result or, where backward is timed, a gradient that is wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import report
import torch
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.gpu import launch
from crossvit_kernels.ops.attention_core import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-6

Core = Callable[[Tensor, Tensor], Tensor]


def eager(u: Tensor, x: Tensor) -> Tensor:
    return reference.attention_core(u, x, EPS)[0]


def contenders(options: argparse.Namespace) -> dict[str, Core]:
    def ours(backend: str) -> Core:
        return lambda u, x: ck.attention_core(u, x, EPS, backend=backend)[0]

    found: dict[str, Core] = {"eager": eager}
    if not options.no_compile:
        found["eager, compiled"] = torch.compile(eager, mode=options.compile_mode)
    for name, usable in ck.backends().items():
        is_slow = name == "triton" and launch.interpreting()
        wrong_device = (name == "cpu") != (options.device == "cpu")
        if usable and name != "reference" and not is_slow and not wrong_device:
            found[f"ours ({name})"] = ours(name)
    return found


class Point:
    """One size: inputs to rotate through, and calls on them."""

    def __init__(self, options: argparse.Namespace, channels: int, batch: int) -> None:
        self.device, dtype = torch.device(options.device), DTYPES[options.dtype]
        self.sizes = {"channels": channels, "batch": batch, "tokens": options.tokens}
        self.rows = options.rows or max(channels // 64, 1)
        self.token_bytes = batch * options.tokens * channels * dtype.itemsize
        sets = 1
        if self.device.type == "cuda":
            sets = math.ceil(4 * measure.l2_bytes(self.device) / self.token_bytes)
        self.sets = [self._inputs(dtype) for _ in range(min(max(sets, 1), 256))]
        self.upstream = torch.randn_like(self.sets[0][0])

    def _inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        s = self.sizes
        u = torch.randn(s["batch"], self.rows, s["channels"], device=self.device)
        x = torch.randn(s["batch"], s["tokens"], s["channels"], device=self.device)
        u, x = (u * s["channels"] ** -0.5).to(dtype), x.to(dtype)
        return u.requires_grad_(), x.requires_grad_()

    def call(self, core: Core, mode: str) -> Callable[[int], Any]:
        def forward(index: int) -> Tensor:
            with torch.no_grad():
                return core(*self.sets[index % len(self.sets)])

        def train(index: int) -> tuple[Tensor, ...]:
            inputs = self.sets[index % len(self.sets)]
            return torch.autograd.grad(core(*inputs), inputs, self.upstream)

        return forward if mode == "forward" else train

    def judge(self, core: Core, mode: str) -> dict[str, Any]:
        """The result, in training also both gradients, by the rule (measure.Tolerance)."""
        inputs = self.sets[0]
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        exact = self._results(eager, doubles, mode)
        of_eager = self._results(eager, inputs, mode)
        allowed = {
            name: measure.Tolerance(e, measure.error_of(r, e), inputs[1].dtype)
            for name, e, r in zip(("m", "du", "dx"), exact, of_eager, strict=False)
        }
        return measure.judge(self._results(core, inputs, mode), allowed)

    def _results(self, core: Core, inputs: Sequence[Tensor], mode: str) -> list[Tensor]:
        with torch.set_grad_enabled(mode == "train"):
            m = core(*inputs)
            if mode == "forward":
                return [m]
            return [m, *torch.autograd.grad(m, inputs, self.upstream.to(m.dtype))]


def measured(
    point: Point, field: dict[str, Core], mode: str, options: argparse.Namespace, copy: float
) -> list[dict[str, Any]]:
    """A row for each contender; copy is bytes a second."""
    timings = measure.round_robin(
        {name: point.call(core, mode) for name, core in field.items()},
        measure.Stopwatch(point.device),
        min_time=options.min_time,
        repeats=options.repeats,
    )
    floor = point.token_bytes * (1 if mode == "forward" else 3)
    return [
        point.sizes
        | {
            "rows": point.rows,
            "mode": mode,
            "contender": name,
            "input_sets": len(point.sets),
            "median_ms": timing.quantile(0.5) * 1e3,
            "p10_ms": timing.quantile(0.1) * 1e3,
            "p90_ms": timing.quantile(0.9) * 1e3,
            "host_us": sum(timing.host) / len(timing.host) * 1e6 if timing.host else None,
            "times_eager": timing.median_speedup(timings["eager"]),
            "floor_bytes": floor,
            "floor_ms": floor / copy * 1e3,
            "share_of_copy": floor / timing.quantile(0.5) / copy,
        }
        for name, timing in timings.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    ceilings = measure.measure_ceilings(device, DTYPES[options.dtype])
    copy = ceilings.copy_bytes_per_second
    print(
        f"{measure.device_name(device)}, torch {torch.__version__}, {options.dtype}, "
        f"{options.tokens} tokens, copy {copy / 1e9:.4g} GB/s"
    )
    field, rows, wrong = contenders(options), [], []
    verdicts: list[str] = []
    for channels in options.channels:
        for batch in options.batch:
            point = Point(options, channels, batch)
            for mode in ("forward", "train"):
                where, good = f"C {channels}, batch {batch}, {mode}", {}
                for name, core in field.items():
                    outcome = point.judge(core, mode)
                    if outcome["status"] == "ok":
                        good[name] = core
                    else:
                        wrong.append(f"{where}: {name}: {outcome['reason']}")
                found = measured(point, good, mode, options, copy)
                rows += found
                verdicts.append(report.verdict(where, found, "times_eager"))
                save(options, device, ceilings, rows)
    print(report.format_table(_HEADER, [_row(r) for r in rows]))
    print("\n" + "\n".join(verdicts))
    for name in wrong:
        print(f"WRONG RESULT, not timed: {name}", file=sys.stderr)
    return 1 if wrong else 0


_HEADER = (
    "C",
    "batch",
    "mode",
    "contender",
    "median ms",
    "floor ms",
    "of copy",
    "vs eager",
    "host us",
)


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(r["channels"]),
        str(r["batch"]),
        r["mode"],
        r["contender"],
        f"{r['median_ms']:.4g}",
        f"{r['floor_ms']:.4g}",
        f"{r['share_of_copy']:.0%}",
        f"{r['times_eager']:.2f}x",
        "-" if r["host_us"] is None else f"{r['host_us']:.0f}",
    )


def save(
    options: argparse.Namespace,
    device: torch.device,
    ceilings: measure.Ceilings,
    rows: list[dict[str, Any]],
) -> None:
    """After every point: what was measured is kept, whatever happens to the rest."""
    if options.json:
        facts = measure.environment(device)
        document = report.document("attention_core", options, facts, ceilings, rows)
        report.write_json(options.json, document)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--channels", type=int, nargs="+", default=[192, 384])
    add("--batch", type=int, nargs="+", default=[64])
    add("--tokens", type=int, default=401)
    add("--rows", type=int, help="score rows; one for every 64 channels by default")
    add("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    add("--device", default="cuda" if cuda else "cpu")
    add("--min-time", type=float, default=2.0, help="seconds to measure each mode for")
    add("--repeats", type=int, default=200, help="rounds at most")
    add("--compile-mode", default="max-autotune" if cuda else "default")
    add("--no-compile", action="store_true", help="leave the compiled baseline out")
    add("--json", type=Path, metavar="PATH")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

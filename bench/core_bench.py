"""attention_core, the pass over the tokens alone: ours against PyTorch, beside the memory's speed.

    python bench/core_bench.py --channels 192 384 --batch 64 256

measures the reference (LayerNorm, two matrix products, softmax), the same compiled, what
attention_core chooses by itself, and every usable backend of crossvit_kernels; forward, and forward
with backward. The floor is the time in which the device copies the tokens' bytes: read once
forward, read twice and written once with backward. A contender whose output or gradients are wrong
is reported and not timed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import command_line
import contest
import environment
import measure
import report
import torch
from command_line import DTYPES, positive
from contest import Contender
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_core import reference
from crossvit_kernels.ops.operator import OPERATIONS

EPS = 1e-6
MODES = {"forward": "forward", "train": "with backward"}
RESULTS = ("m", "grad u", "grad x")

Core = Callable[[Tensor, Tensor], Tensor]


def eager(u: Tensor, x: Tensor) -> Tensor:
    return reference.attention_core(u, x, EPS)[0]


def our_backend(name: str) -> Core:
    return lambda u, x: ck.attention_core(u, x, EPS, backend=name)[0]


class Point:
    """One size: inputs to rotate through, and calls on them."""

    def __init__(self, options: argparse.Namespace, channels: int, batch: int) -> None:
        self.device, self.dtype = options.device, DTYPES[options.dtype]
        self.sizes = {"channels": channels, "batch": batch, "tokens": options.tokens}
        self.rows = options.rows or max(channels // 64, 1)
        self.token_bytes = batch * options.tokens * channels * self.dtype.itemsize
        sets = 1
        if self.device.type == "cuda":
            sets = math.ceil(4 * environment.l2_bytes(self.device) / self.token_bytes)
        self.sets = [self._inputs() for _ in range(min(max(sets, 1), 256))]
        self.upstream = torch.randn_like(self.sets[0][0])

    def _inputs(self) -> tuple[Tensor, Tensor]:
        s = self.sizes
        u = torch.randn(s["batch"], self.rows, s["channels"], device=self.device)
        x = torch.randn(s["batch"], s["tokens"], s["channels"], device=self.device)
        u, x = (u * s["channels"] ** -0.5).to(self.dtype), x.to(self.dtype)
        return u.requires_grad_(), x.requires_grad_()

    def call(self, core: Core, mode: str) -> Callable[[int], tuple[Tensor, ...]]:
        """A function of an input set's number that returns what ``RESULTS`` names."""

        def forward(index: int) -> tuple[Tensor]:
            with torch.no_grad():
                return (core(*self.sets[index % len(self.sets)]),)

        def train(index: int) -> tuple[Tensor, ...]:
            inputs = self.sets[index % len(self.sets)]
            return differentiated(core, inputs, self.upstream)

        return forward if mode == "forward" else train

    def tolerances(self, mode: str) -> dict[str, measure.Tolerance]:
        eagers = self.call(eager, mode)(0)
        doubles = [t.detach().double().requires_grad_() for t in self.sets[0]]
        exact = differentiated(eager, doubles, self.upstream.double())[: len(eagers)]
        return measure.tolerances(RESULTS[: len(eagers)], exact, eagers, self.dtype)

    def floor_bytes(self, mode: str) -> int:
        return self.token_bytes * (1 if mode == "forward" else 3)


def differentiated(core: Core, inputs: Sequence[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    m = core(*inputs)
    return m.detach(), *torch.autograd.grad(m, inputs, upstream)


def contenders(options: argparse.Namespace, point: Point, mode: str) -> list[Contender]:
    """Eager first."""
    compiled = contest.compiled(eager, options)
    skip = "--no-compile" if options.no_compile else None
    found = [
        Contender("eager", point.call(eager, mode)),
        Contender("eager, compiled", point.call(compiled, mode), compiled=True, skip=skip),
    ]
    for name in options.backends:
        call, may_decline = point.call(our_backend(name), mode), name not in options.named
        found.append(Contender(contest.our_name(name), call, ours=True, may_decline=may_decline))
    return found


def measure_point(run: contest.Contest, point: Point, mode: str) -> list[dict[str, Any]]:
    """A row for each contender."""
    floor, copy = point.floor_bytes(mode), run.ceilings.copy_bytes_per_second
    sizes = f"C {point.sizes['channels']}, batch {point.sizes['batch']}"
    common = {
        "rows": point.rows,
        "mode": mode,
        "input_sets": len(point.sets),
        "floor_bytes": floor,
        "floor_ms": floor / copy * 1e3,
    }
    rows = run.point(
        MODES[mode],
        sizes,
        lambda: (contenders(run.options, point, mode), point.tolerances(mode)),
        point.sizes | common,
    )
    for row in rows:
        if row["status"] == "ok":
            row["share_of_copy"] = row["floor_ms"] / row["median_ms"]
    return rows


HEADER = ("C", "batch", "mode", "contender", "median ms", "floor ms", "of copy", "vs eager")
HEADER += ("host us", "MiB", "error (eager's)")


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(r["channels"]),
        str(r["batch"]),
        r["mode"],
        r["contender"],
        f"{r['median_ms']:.4g}",
        f"{r['floor_ms']:.4g}",
        f"{r['share_of_copy']:.0%}",
        *report.usual_cells(r),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--channels", type=positive, nargs="+", default=[192, 384], help="widths")
    add("--batch", type=positive, nargs="+", default=[64], help="images")
    add("--tokens", type=positive, default=401, help="of an image (401)")
    add("--rows", type=positive, help="score rows; one for every 64 channels by default")
    add("--mode", choices=("forward", "train", "both"), default="both")
    command_line.add_backends(parser)
    command_line.add_common(parser, min_time=2.0, repeats=200)
    command_line.add_files(parser, "core")
    return command_line.completed(parser, arguments, OPERATIONS["attention_core"].backends)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with contest.Contest(options, "attention_core") as run:
        print(run.introduction(), flush=True)
        for channels in options.channels:
            for batch in options.batch:
                point = Point(options, channels, batch)
                for mode in MODES if options.mode == "both" else (options.mode,):
                    measure_point(run, point, mode)
        table = report.format_table(HEADER, map(cells, report.timed(run.rows)))
        print("\n".join([table, *report.unsteady(run.rows)]))
        return run.finish()


if __name__ == "__main__":
    sys.exit(main())

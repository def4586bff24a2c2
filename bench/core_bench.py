"""attention_core, the token pass on its own: ours against PyTorch and against the copy bandwidth.

    python bench/core_bench.py --channels 192 384 --batch 64 256

measures the reference (LayerNorm, two matrix products, softmax), the same compiled, the default of
attention_core, and every usable backend of crossvit_kernels; forward, and forward with backward.
The floor is the time the device takes to copy the tokens' bytes: read once in forward, read twice
and written once with backward. Contenders whose output or gradients are wrong are reported and not
timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import command_line
import report
from command_line import DTYPES, positive
from contender import Contender, compiled_contender, our_contender
from contest import Contest
from inputs import EPS, MODE_WORDS, Inputs, Normal, make_inputs, num_rotated_sets
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_core import reference
from crossvit_kernels.ops.operator import OPERATIONS

Core = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]


def eager(u: Tensor, x: Tensor, _: Sequence[Tensor]) -> Tensor:
    return reference.attention_core(u, x, EPS)[0]


def our_backend(name: str) -> Core:
    return lambda u, x, _: ck.attention_core(u, x, EPS, backend=name)[0]


def contenders(options: argparse.Namespace) -> list[Contender]:
    """All contenders, eager first."""
    candidates = [Contender("eager", eager), compiled_contender("eager", eager, options)]
    return candidates + [
        our_contender(name, our_backend(name), options) for name in options.backends
    ]


def measure_point(run: Contest, channels: int, batch: int, mode: str) -> None:
    options, dtype = run.options, DTYPES[run.options.dtype]
    tokens, rows = options.tokens, options.rows or max(channels // 64, 1)
    token_bytes = batch * tokens * channels * dtype.itemsize
    num_sets = num_rotated_sets(token_bytes, options.device)

    def one_set(normal: Normal) -> tuple[Tensor, Tensor]:
        u = normal(batch, rows, channels, scale=channels**-0.5)
        return u, normal(batch, tokens, channels)

    def prepare() -> Any:
        inputs: Inputs = make_inputs(
            (["m"], ["u", "x"]),
            one_set,
            {},
            (batch, rows, channels),
            mode,
            options.device,
            dtype,
            num_sets,
        )
        return [c.on(inputs) for c in contenders(options)], inputs.tolerances(eager)

    def complete(timed_rows: list[report.Row]) -> None:
        for row in timed_rows:
            row["share_of_copy"] = row["floor_ms"] / row["median_ms"]

    sizes = {"channels": channels, "batch": batch, "tokens": tokens, "rows": rows}
    floor = token_bytes * (1 if mode == "forward" else 3)
    floor_ms = floor / run.ceilings.copy_bytes_per_second * 1e3
    floors = {"floor_bytes": floor, "floor_ms": floor_ms}
    run.point(
        MODE_WORDS[mode],
        f"C {channels}, batch {batch}",
        prepare,
        {**sizes, "mode": mode, "input_sets": num_sets, **floors},
        title=f"C {channels}, batch {batch}, {tokens} tokens, {rows} rows of u, {options.dtype}, "
        f"{mode}; floor: {floor_ms:.4g} ms at the copy's bandwidth",
        complete=complete,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.benchmark_parser(__doc__, "core", min_time=2.0, repeats=200)
    add = parser.add_argument
    add("--channels", type=positive, nargs="+", default=[192, 384], help="widths")
    add("--batch", type=positive, nargs="+", default=[64], help="images")
    add("--tokens", type=positive, default=401, help="per image (401)")
    add("--rows", type=positive, help="rows of u; default: one per 64 channels")
    return command_line.completed(parser, arguments, OPERATIONS["attention_core"].backends)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    columns = {"of copy": lambda row: f"{row['share_of_copy']:.0%}"}
    with Contest(options, "attention_core", columns) as run:
        for channels in options.channels:
            for batch in options.batch:
                for mode in command_line.modes_of(options):
                    measure_point(run, channels, batch, mode)
        return run.finish()


if __name__ == "__main__":
    sys.exit(main())

"""A transformer block and its halves, LayerNorm-MSA and LayerNorm-FFN: ours against PyTorch.

    python bench/block_bench.py
    python bench/block_bench.py --frozen
    python bench/block_bench.py --preset few-rows

measures in one run the reference (matmul, softmax, matmul), the operators that timm's Block calls
(SDPA among them), both under torch.compile, what the library chooses by itself (the row "ours
(auto)"), and each way it has; forward, and forward with backward, for both branches of a named
model. With --frozen backward is that of fine-tuning: weights frozen and the gradient of x wanted
("frozen"), or nothing trained but a head behind ("heads").

Beside each time stand the floor (the time of its FLOP at the rate of matrix products, or of reading
x and writing y at the rate of a copy, whichever is longer) and what a call allocates. A contender
whose output or gradients are wrong is reported and not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import command_line
import contest
import report
from block_contenders import PARTS, Sizes, contenders, make_inputs, tolerances
from command_line import DTYPES, positive

from crossvit_kernels.ops.operator import OPERATIONS

MODES = {
    "forward": "forward",
    "train": "with backward",
    "frozen": "with frozen weights",
    "heads": "with a head alone trained",
}
#: Model: width of S (L is twice as wide), heads, hidden units per channel.
WIDTHS = {
    "Ti": (96, 3, 4),
    "S": (192, 6, 4),
    "B": (384, 12, 4),
    "9": (128, 4, 3),
    "15": (192, 6, 3),
    "18": (224, 7, 3),
}
TOKENS = {"S": 401, "L": 197}  # at 240 pixels, CLS counted in
#: Defaults of options, by name.
PRESETS: dict[str, dict[str, Any]] = {
    "crossvit": {},
    "few-rows": {
        "channels": [768, 1024],
        "tokens": [50, 100, 200, 400],
        "batch": [1],
        "parts": ["block"],
        "mode": "forward",
    },
}
CALLED = {
    "msa": "layernorm_msa",
    "ffn": "layernorm_ffn",
    "block": "layernorm_msa with layernorm_ffn",
}
HEADER = ("size", "batch", "tokens", "part", "mode", "contender", "median ms", "of floor")
HEADER += ("vs timm", "vs eager", "host us", "MiB", "error (eager's)")


def measure_part(run: contest.Contest, part: str, size: Sizes, mode: str) -> list[dict[str, Any]]:
    """A row for each contender."""
    options = run.options
    dtype = DTYPES[options.dtype]
    floor = size.floor_seconds(part, mode, dtype.itemsize, run.ceilings)

    def prepare() -> Any:
        inputs = make_inputs(part, size, mode, options.device, dtype)
        return contenders(part, size, inputs, options), tolerances(part, size, inputs)

    where = f"{size.name}, batch {size.batch}, {size.tokens} tokens"
    common = {"part": part, "mode": mode, "floor_ms": floor * 1e3}
    common = dataclasses.asdict(size) | common
    rows = run.point(MODES[mode], where, prepare, common, CALLED[part])
    medians = {row["contender"]: row["median_ms"] for row in report.timed(rows)}
    for row in report.timed(rows):
        row["share_of_floor"] = row["floor_ms"] / row["median_ms"]
        row["times_timm"] = medians.get("timm-like", float("nan")) / row["median_ms"]
    return rows


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        r["name"],
        str(r["batch"]),
        str(r["tokens"]),
        r["part"],
        r["mode"],
        r["contender"],
        f"{r['median_ms']:.4g}",
        f"{r['share_of_floor']:.0%}",
        f"{r['times_timm']:.2f}x",
        *report.usual_cells(r),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="crossvit", help="defaults of the other options")
    add("--models", nargs="+", choices=WIDTHS, default=["15"], help="whose widths")
    add("--branches", nargs="+", choices=tuple(TOKENS), default=list(TOKENS))
    add("--channels", type=positive, nargs="+", help="other widths; heads of 64, hidden 4 C")
    add("--parts", nargs="+", choices=PARTS, default=["msa", "ffn"])
    add("--batch", type=positive, nargs="+", help="16 on a CPU, 256 on a GPU")
    add("--tokens", type=positive, nargs="+", help="rather than a branch's at 240 pixels")
    command_line.add_modes(parser)
    command_line.add_backends(parser)
    command_line.add_common(parser, min_time=3.0, repeats=1000, compile_budget=float("inf"))
    command_line.add_files(parser, "blocks")
    preset, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**PRESETS[preset.preset])
    options = command_line.completed(parser, arguments, OPERATIONS["layernorm_msa"].backends)
    options.batch = options.batch or [256 if options.device.type == "cuda" else 16]
    return options


def sizes(options: argparse.Namespace) -> list[Sizes]:
    widths: list[tuple[str, int, int, int, int]] = []
    if options.channels:
        widths = [(f"C {c}", 401, c, max(c // 64, 1), 4 * c) for c in options.channels]
    else:
        for model in options.models:
            small, heads, ratio = WIDTHS[model]
            for branch in options.branches:
                channels = small if branch == "S" else 2 * small
                widths.append(
                    (f"{model} {branch}", TOKENS[branch], channels, heads, ratio * channels)
                )
    return [
        Sizes(name, batch, tokens, channels, heads, hidden)
        for name, usual, channels, heads, hidden in widths
        for batch in options.batch
        for tokens in options.tokens or [usual]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with contest.Contest(options, "the block") as run:
        print(run.introduction(), flush=True)
        for size in sizes(options):
            for part in options.parts:
                for mode in command_line.MODES[options.mode]:
                    measure_part(run, part, size, mode)
        table = report.format_table(HEADER, map(cells, report.timed(run.rows)))
        print("\n".join([table, *report.unsteady(run.rows)]))
        return run.finish()


if __name__ == "__main__":
    sys.exit(main())

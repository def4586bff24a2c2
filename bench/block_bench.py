"""A transformer block and its halves, LayerNorm-MSA and LayerNorm-FFN: ours against PyTorch.

    python bench/block_bench.py
    python bench/block_bench.py --frozen
    python bench/block_bench.py --preset few-rows

measures in one run the reference (matmul, softmax, matmul), the operators that timm's Block calls
(including SDPA), both under torch.compile, the library's default (the row "ours (auto)"), and each
of its kernel variants; forward, and forward with backward, for both branches of a named model. With
--frozen, backward is that of fine-tuning: frozen weights with the gradient of x ("frozen"), or only
a head on the output trained ("heads").

Each time comes with its floor (the time of its FLOP at the rate of matrix products, or of reading
x and writing y at copy speed, whichever is longer) and the memory that a call allocates. Contenders
whose output or gradients are wrong are reported and not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import command_line
from block_contenders import PARTS, BlockSize, contenders, make_inputs, ours
from command_line import DTYPES, positive
from contest import Contest
from inputs import MODE_WORDS
from report import Row
from sizes import TOKENS, WIDTHS

from crossvit_kernels.ops.operator import OPERATIONS

#: Preset -> defaults of other options.
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
COLUMNS = {
    "of floor": lambda row: f"{row['share_of_floor']:.0%}",
    "vs timm-like": lambda row: f"{row['times_timm']:.2f}x",
}


def measure_part(run: Contest, part: str, size: BlockSize, mode: str) -> None:
    options = run.options
    dtype = DTYPES[options.dtype]
    floor_ms = size.floor_seconds(part, mode, dtype.itemsize, run.ceilings) * 1e3

    def prepare() -> Any:
        inputs = make_inputs(part, size, mode, options.device, dtype)
        candidates = [c.on(inputs) for c in contenders(part, size, options)]
        return candidates, inputs.tolerances(ours(part, size, "reference"))

    def complete(timed_rows: list[Row]) -> None:
        medians = {row["contender"]: row["median_ms"] for row in timed_rows}
        for row in timed_rows:
            row["share_of_floor"] = row["floor_ms"] / row["median_ms"]
            row["times_timm"] = medians.get("timm-like", float("nan")) / row["median_ms"]

    where = f"{size.name}, batch {size.batch}, {size.tokens} tokens"
    run.point(
        MODE_WORDS[mode],
        where,
        prepare,
        {**dataclasses.asdict(size), "part": part, "mode": mode, "floor_ms": floor_ms},
        title=f"{part} of {where}, {options.dtype}, {mode}; floor: {floor_ms:.4g} ms",
        complete=complete,
        called=CALLED[part],
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.benchmark_parser(
        __doc__, "blocks", min_time=3.0, repeats=1000, frozen=True, compile_budget=float("inf")
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="crossvit", help="defaults of the other options")
    add("--models", nargs="+", choices=WIDTHS, default=["15"], help="models whose widths to use")
    add("--branches", nargs="+", choices=tuple(TOKENS), default=list(TOKENS))
    add("--channels", type=positive, nargs="+", help="other widths; heads of 64, hidden 4 C")
    add("--parts", nargs="+", choices=PARTS, default=["msa", "ffn"])
    add("--batch", type=positive, nargs="+", help="16 on a CPU, 256 on a GPU")
    add("--tokens", type=positive, nargs="+", help="default: those of the branch at 240 pixels")
    preset, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**PRESETS[preset.preset])
    options = command_line.completed(parser, arguments, OPERATIONS["layernorm_msa"].backends)
    options.batch = options.batch or [256 if options.device.type == "cuda" else 16]
    return options


def sizes(options: argparse.Namespace) -> list[BlockSize]:
    base_sizes = []
    if options.channels:
        base_sizes = [
            BlockSize(f"C {c}", 1, 401, c, max(c // 64, 1), 4 * c) for c in options.channels
        ]
    else:
        for model in options.models:
            small, heads, ratio = WIDTHS[model]
            for branch in options.branches:
                channels = small if branch == "S" else 2 * small
                name, tokens = f"{model} {branch}", TOKENS[branch]
                base_sizes.append(BlockSize(name, 1, tokens, channels, heads, ratio * channels))
    return [
        dataclasses.replace(size, batch=batch, tokens=tokens)
        for size in base_sizes
        for batch in options.batch
        for tokens in options.tokens or [size.tokens]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with Contest(options, "the block", COLUMNS) as run:
        for size in sizes(options):
            for part in options.parts:
                for mode in command_line.modes_of(options):
                    measure_part(run, part, size, mode)
        return run.finish()


if __name__ == "__main__":
    sys.exit(main())

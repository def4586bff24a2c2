"""The fusion of one branch's CLS with the other branch's patches: ours against PyTorch.

    python bench/fusion_bench.py --tokens 401
    python bench/fusion_bench.py --tokens 401 --frozen

measures CrossViT-15's L-branch CLS over 400 S-branch patches on the device at hand: eager with
materialised keys and values, SDPA on them, the absorbed algorithm (no keys, no values) in PyTorch,
compiled baselines, the default of cross_attention_fusion (the row "ours (auto)"), and every usable
backend of crossvit_kernels. With --frozen, backward is that of fine-tuning: frozen weights with
the inputs' gradients ("frozen"), or only a head on the output trained ("heads").

All results and gradients of each contender are first checked against float64; one that is wrong is
never timed, and if it is ours, the program fails. The last lines say what was fastest.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import command_line
import measure
import report
from command_line import DTYPES, positive
from contender import Contender
from contest import Contest
from fusion_contenders import Shape, contenders, definition, make_inputs
from inputs import MODE_WORDS, num_rotated_sets
from report import Row

import crossvit_kernels as ck
from crossvit_kernels.ops.operator import OPERATIONS

WORDS = {
    "eager": "eager mode",
    "eager, compiled": "eager mode under torch.compile",
    "SDPA": "keys and values on SDPA",
    "absorbed": "this algorithm in PyTorch",
    "absorbed, compiled": "this algorithm under torch.compile",
    "absorbed, SDPA": "this algorithm on SDPA",
}


COLUMNS = {
    "GB/s": lambda row: f"{row['achieved_gbps']:.4g}",
    "of copy": lambda row: f"{row['share_of_copy']:.1%}",
    "GFLOP/s": lambda row: f"{row['achieved_gflops']:.4g}",
}


def measure_shape(run: Contest, shape: Shape) -> None:
    """Measure one shape in every requested mode."""
    options = run.options
    candidates = contenders(options, shape)
    num_sets = num_rotated_sets(shape.token_bytes, options.device)
    kinds = {"one set" if options.device.type == "cpu" else "rotated": num_sets}
    if options.hot and options.device.type == "cuda":
        kinds["L2-hot"] = 1
    for mode in command_line.modes_of(options):
        for kind, count in kinds.items():
            measure_point(run, shape, candidates, mode, kind, count)


def measure_point(
    run: Contest, shape: Shape, candidates: Sequence[Contender], mode: str, kind: str, num_sets: int
) -> None:
    def prepare() -> Any:
        inputs = make_inputs(shape, mode, run.device, num_sets)
        return [c.on(inputs) for c in candidates], inputs.tolerances(definition(shape))

    def complete(timed_rows: list[Row]) -> None:
        for row in timed_rows:
            row |= rates(shape, mode, row["median_ms"] / 1e3, run.ceilings)

    common = dataclasses.asdict(shape) | {"dtype": measure.dtype_name(shape.dtype)}
    floor, flops = shape.floor_bytes(mode), shape.flops(mode)
    other = f" and the other fusion's {shape.pair_tokens}" if shape.pair_tokens else ""
    run.point(
        MODE_WORDS[mode] + (", tokens in the L2" if kind == "L2-hot" else ""),
        f"{shape.tokens} tokens, batch {shape.batch}",
        prepare,
        {**common, "mode": mode, "inputs": kind, "input_sets": num_sets},
        title=f"{shape.tokens} tokens{other}, batch {shape.batch}, "
        f"width {shape.dim} (CLS {shape.own_dim}), {shape.heads} heads, {common['dtype']}, {mode}\n"
        f"inputs: {kind}, {num_sets * shape.token_bytes / 1e6:.4g} MB of tokens; "
        f"floor: {floor / 1e6:.1f} MB, {floor / run.ceilings.copy_bytes_per_second * 1e3:.3g} ms "
        f"at the copy's bandwidth; {flops / 1e9:.3g} GFLOP absorbed",
        complete=complete,
    )


def rates(shape: Shape, mode: str, seconds: float, ceilings: measure.Ceilings) -> dict[str, Any]:
    floor, flops = shape.floor_bytes(mode), shape.flops(mode)
    return {
        "floor_bytes": floor,
        "floor_ms": floor / ceilings.copy_bytes_per_second * 1e3,
        "achieved_gbps": floor / seconds / 1e9,
        "share_of_copy": floor / seconds / ceilings.copy_bytes_per_second,
        "flops": flops,
        "achieved_gflops": flops / seconds / 1e9,
        "share_of_matmul": flops / seconds / ceilings.matmul_flops_per_second,
    }


def panels(options: argparse.Namespace, rows: list[Row]) -> list[report.Panel]:
    """Latency and roofline share over each swept size, for each mode."""
    ok = [row for row in rows if row["status"] == "ok" and row["inputs"] != "L2-hot"]
    result = []
    for axis in dict.fromkeys(axis for axis, _ in options.sweep) or ["tokens"]:
        other = "batch" if axis == "tokens" else "tokens"
        fixed = getattr(options, other)
        for mode in command_line.modes_of(options):
            shown = [row for row in ok if row["mode"] == mode and row[other] == fixed]
            for key, label in (("median_ms", "ms"), ("share_of_copy", "share of copy bandwidth")):
                series: dict[str, list[tuple[float, float]]] = {}
                for row in shown:
                    series.setdefault(row["contender"], []).append((row[axis], row[key]))
                title = f"{mode}, {other} {fixed}"
                log = key == "median_ms"
                result.append(report.Panel(title, axis, label, series, log_y=log))
    return result


def sweep(text: str) -> tuple[str, list[int]]:
    axis, _, values = text.partition("=")
    if axis not in ("tokens", "batch") or not values:
        raise argparse.ArgumentTypeError(f"expected tokens=N,N,... or batch=B,B,..., got {text!r}")
    return axis, [positive(value) for value in values.split(",")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.benchmark_parser(
        __doc__, "fusion", min_time=6.0, repeats=200, frozen=True, plot=True
    )
    add = parser.add_argument
    add("--tokens", type=positive, default=401, help="rows attended to, including the CLS (401)")
    add("--batch", type=positive, default=64, help="images (64)")
    add("--dim", type=positive, default=192, help="width of the tokens (192)")
    add("--own-dim", type=positive, help="width of the CLS (twice --dim)")
    add("--heads", type=positive, default=6)
    add(
        "--pair-tokens",
        type=positive,
        metavar="TOKENS",
        help="both fusions of a block, forward: rows that the other branch's CLS attends to",
    )
    add(
        "--sweep",
        type=sweep,
        action="append",
        default=[],
        metavar="AXIS=N,N,...",
        help="tokens=49,197,401 or batch=1,64,256, or both, each with the default of the other",
    )
    add("--hot", action="store_true", help="on a GPU, also with one set of inputs, hot in L2")
    backends = OPERATIONS["cross_attention_fusion"].backends
    options = command_line.completed(parser, arguments, backends)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check(options: argparse.Namespace) -> None:
    """Complete the sizes; raise ValueError if they do not fit each other."""
    options.own_dim = options.own_dim or 2 * options.dim
    if options.pair_tokens:
        if options.mode in ("train", "frozen"):
            raise ValueError("--pair-tokens: both fusions at once are measured forward alone")
        if options.own_dim % options.heads:
            raise ValueError(f"--own-dim {options.own_dim} is no multiple of --heads")
        options.mode = "forward"
    if options.dim % options.heads:
        raise ValueError(f"--dim {options.dim} is no multiple of --heads {options.heads}")
    if min(s.tokens for shape in shapes(options) for s in (shape, shape.other) if s) < 2:
        raise ValueError("--tokens counts the CLS and at least one patch: 2 or more")


def shapes(options: argparse.Namespace) -> list[Shape]:
    """One shape for each swept value, the other size at its default; or only the default."""
    default = {"tokens": options.tokens, "batch": options.batch}
    points = [default | {axis: value} for axis, values in options.sweep for value in values]
    dtype = DTYPES[options.dtype]
    swept = (
        Shape(
            **point,
            dim=options.dim,
            own_dim=options.own_dim,
            heads=options.heads,
            dtype=dtype,
            pair_tokens=options.pair_tokens or 0,
        )
        for point in points or [default]
    )
    return list(dict.fromkeys(swept))


def notes(options: argparse.Namespace) -> list[str]:
    lines = [f"backend {name} is not usable: {why}" for name, why in ck.backends().reasons.items()]
    if options.device.type == "cpu":
        lines += ["One set of inputs: caches may hold some of it, and lift the share of the copy."]
    return [*lines, "GB/s: floor bytes over time."]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    called = "cross_attention_fusion_pair" if options.pair_tokens else "cross_attention_fusion"

    def plotted(rows: list[Row]) -> list[report.Panel]:
        return panels(options, rows)

    with Contest(options, called, COLUMNS, WORDS, notes(options), plotted) as run:
        for shape in shapes(options):
            measure_shape(run, shape)
        return run.finish()


if __name__ == "__main__":
    sys.exit(main())

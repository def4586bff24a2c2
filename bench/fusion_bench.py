"""The fusion of one branch's CLS with the other branch's patches: ours against what PyTorch offers.

    python bench/fusion_bench.py --tokens 401

measures CrossViT-15's L-branch CLS over 400 S-branch patches on the device at hand: eager with
materialised keys and values, SDPA on them, the absorbed form (no keys, no values) in PyTorch,
compiled baselines, and every usable backend of crossvit_kernels. Each contender is first checked
against float64; one that is wrong is never timed, and if it is ours, the program fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import report
import torch
from fusion_contenders import (
    Caller,
    Contender,
    Inputs,
    Shape,
    caller,
    contenders,
    make_inputs,
    our_name,
    rotated_sets,
    tolerances,
)
from measure import Timing, Tolerance

import crossvit_kernels as ck
from crossvit_kernels.gpu import launch

MODES = {"both": ("forward", "train"), "forward": ("forward",), "train": ("train",)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Bench:
    """Measures points on one device and collects a flat row for each contender of each."""

    def __init__(self, options: argparse.Namespace, progress: measure.Progress) -> None:
        self.options = options
        self.progress = progress
        self.device: torch.device = options.device
        self.stopwatch = measure.Stopwatch(self.device)
        self.environment = measure.environment(self.device)
        progress.stage("measuring a large copy and a large matrix product")
        self.ceilings = measure.measure_ceilings(self.device, DTYPES[options.dtype])
        self.rows: list[dict[str, Any]] = []
        self.verdicts: list[str] = []
        self._compile_seconds = 0.0

    def measure_point(self, shape: Shape) -> None:
        """Measure, print and keep one shape in every mode asked for."""
        field = contenders(self.options, shape, self.device)
        rotated = make_inputs(shape, self.device, rotated_sets(shape, self.device))
        kinds = {"one set" if self.device.type == "cpu" else "rotated": rotated}
        if self.options.hot and self.device.type == "cuda":
            kinds["L2-hot"] = dataclasses.replace(rotated, sets=rotated.sets[:1])
        for mode in MODES[self.options.mode]:
            for kind, inputs in kinds.items():
                with torch.set_grad_enabled(mode == "train"):
                    rows = self._measure(shape, field, inputs, mode, kind)
                self.rows += rows
                what = f"{shape.tokens} tokens, batch {shape.batch}, {mode}"
                what += f", {kind}" if kind == "L2-hot" else ""
                self.verdicts.append(report.verdict(what, rows, "speedup_over_eager"))
                self.progress.clear()
                print(report.point_table(shape, rows, self.ceilings), flush=True)

    def _measure(
        self, shape: Shape, field: list[Contender], inputs: Inputs, mode: str, kind: str
    ) -> list[dict[str, Any]]:
        where = f"{shape.tokens} tokens, batch {shape.batch}, {mode}"
        self.progress.stage(f"{where}: float64 and eager results")
        allowed = tolerances(inputs, shape.heads, mode)
        common = dataclasses.asdict(shape) | {"dtype": measure.dtype_name(shape.dtype)}
        common |= {"mode": mode, "inputs": kind, "input_sets": len(inputs.sets)}
        rows, runners = [], {}
        for contender in field:
            call = caller(contender, inputs, shape.heads, mode)
            skip = self._reason_to_skip(contender)
            if skip:
                outcome: dict[str, Any] = {"status": "skipped", "reason": skip}
            else:
                say = self.progress.stage if contender.compiled else self.progress.tick
                say(f"{where}: checking {contender.name}")
                outcome = self._check(contender, call, allowed)
            if outcome["status"] == "ok":
                runners[contender.name] = call
            rows.append(common | {"contender": contender.name, "ours": contender.ours} | outcome)
        self.progress.stage(f"{where}: timing {len(runners)} contenders")
        timings = measure.round_robin(
            runners,
            self.stopwatch,
            min_time=self.options.min_time,
            repeats=self.options.repeats,
            on_round=lambda index: self.progress.tick(f"{where}: round {index + 1}"),
        )
        for row in rows:
            name = row["contender"]
            if name in timings:
                row |= figures(shape, mode, timings[name], timings["eager"], self.ceilings)
                row["extra_peak_bytes"] = self._extra_peak(name, runners[name])
        return rows

    def _reason_to_skip(self, contender: Contender) -> str | None:
        budget = self.options.compile_budget
        if contender.skip is None and contender.compiled and self._compile_seconds > budget:
            return f"--compile-budget {budget:g} is spent"
        return contender.skip

    def _check(
        self, contender: Contender, call: Caller, allowed: dict[str, Tolerance]
    ) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            # The third call of a compiled function is the first to replay its CUDA graph.
            for _ in range(3 if contender.compiled else 1):
                results = call(0)
            return measure.judge(results, allowed)
        except Exception as error:  # whatever a compiler may raise: the others are still measured
            named = contender.name in map(our_name, self.options.named)
            declined = contender.ours and isinstance(error, ValueError) and not named
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return {"status": "declined" if declined else "failed", "reason": reason}
        finally:
            if contender.compiled:
                self._compile_seconds += time.perf_counter() - start

    def _extra_peak(self, name: str, call: Caller) -> int | None:
        cuda_graphs = self.options.compile_mode in ("max-autotune", "reduce-overhead")
        if "compiled" in name and self.device.type == "cuda" and cuda_graphs:
            return None  # held in the graphs' own pool, before a call and after it
        return measure.extra_peak_bytes(call, self.device)


def figures(
    shape: Shape, mode: str, timing: Timing, eager_timing: Timing, ceilings: measure.Ceilings
) -> dict[str, Any]:
    seconds = timing.quantile(0.5)
    floor, flops = shape.floor_bytes(mode), shape.flops(mode)
    return {
        "median_ms": seconds * 1e3,
        "p10_ms": timing.quantile(0.1) * 1e3,
        "p90_ms": timing.quantile(0.9) * 1e3,
        "speedup_over_eager": timing.median_speedup(eager_timing),
        "host_us": statistics.median(timing.host) * 1e6 if timing.host else None,
        "rounds": len(timing.seconds),
        "calls_per_round": timing.calls_per_round,
        "floor_bytes": floor,
        "floor_ms": floor / ceilings.copy_bytes_per_second * 1e3,
        "achieved_gbps": floor / seconds / 1e9,
        "share_of_copy": floor / seconds / ceilings.copy_bytes_per_second,
        "flops": flops,
        "achieved_gflops": flops / seconds / 1e9,
        "share_of_matmul": flops / seconds / ceilings.matmul_flops_per_second,
    }


def panels(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[report.Panel]:
    """Latency and roofline share over each swept size, for each mode."""
    ok = [row for row in rows if row["status"] == "ok" and row["inputs"] != "L2-hot"]
    result = []
    for axis in dict.fromkeys(axis for axis, _ in options.sweep) or ["tokens"]:
        other = "batch" if axis == "tokens" else "tokens"
        fixed = getattr(options, other)
        for mode in MODES[options.mode]:
            shown = [row for row in ok if row["mode"] == mode and row[other] == fixed]
            for key, label in (("median_ms", "ms"), ("share_of_copy", "share of copy bandwidth")):
                series: dict[str, list[tuple[float, float]]] = {}
                for row in shown:
                    series.setdefault(row["contender"], []).append((row[axis], row[key]))
                title = f"{mode}, {other} {fixed}"
                log = key == "median_ms"
                result.append(report.Panel(title, axis, label, series, log_y=log))
    return result


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def sweep(text: str) -> tuple[str, list[int]]:
    axis, _, values = text.partition("=")
    if axis not in ("tokens", "batch") or not values:
        raise argparse.ArgumentTypeError(f"expected tokens=N,N,... or batch=B,B,..., got {text!r}")
    return axis, [positive(value) for value in values.split(",")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=positive, default=401, help="rows attended to, CLS included")
    add("--batch", type=positive, default=64)
    add("--dim", type=positive, default=192, help="width of the tokens")
    add("--own-dim", type=positive, help="width of the CLS (twice --dim)")
    add("--heads", type=positive, default=6)
    add(
        "--pair-tokens",
        type=positive,
        metavar="TOKENS",
        help="both fusions of a block, forward: the other branch's CLS attends to so many rows",
    )
    add("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--mode", choices=MODES, default="both")
    add("--backend", default="all", help="of ours: all that are usable, none, or a comma list")
    add(
        "--sweep",
        type=sweep,
        action="append",
        default=[],
        metavar="AXIS=N,N,...",
        help="tokens=49,197,401 or batch=1,64,256; both may be given, each at the other's default",
    )
    add("--min-time", type=float, default=6.0, help="seconds to measure each mode for")
    add("--repeats", type=positive, default=200, help="rounds at most")
    add("--hot", action="store_true", help="on a GPU, also with one set of inputs, hot in the L2")
    add("--compile-mode", help="of torch.compile: default on a CPU, max-autotune on a GPU")
    add("--compile-budget", type=float, help="seconds of compilation after which none begins")
    add("--no-compile", action="store_true", help="leave the compiled baselines out")
    add("--json", type=Path, metavar="PATH")
    add("--csv", type=Path, metavar="PATH")
    add("--plot", type=Path, metavar="PATH.png")
    add(
        "--save",
        action="store_true",
        help="write bench/results/<device>/<date>-fusion-<dtype>.json",
    )
    options = parser.parse_args(arguments)
    try:
        complete(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on the device and on other options; ValueError says what is wrong."""
    cuda = torch.cuda.is_available()
    if options.device == "auto":
        options.device = "cuda" if cuda else "cpu"
    if options.device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", options.device):
        raise ValueError(f"--device {options.device}: expected auto, cpu, cuda or cuda:N")
    on_gpu = options.device != "cpu"
    if on_gpu and not cuda:
        raise ValueError(f"--device {options.device}: torch finds no CUDA device")
    options.device = torch.device(options.device)
    if on_gpu and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.compile_mode = options.compile_mode or ("max-autotune" if on_gpu else "default")
    if options.compile_budget is None:
        options.compile_budget = 300.0 if on_gpu else 60.0
    options.own_dim = options.own_dim or 2 * options.dim
    if options.pair_tokens:
        if options.mode == "train":
            raise ValueError("--pair-tokens: both fusions at once are measured forward alone")
        if options.own_dim % options.heads:
            raise ValueError(f"--own-dim {options.own_dim} is no multiple of --heads")
        options.mode = "forward"
    if options.dim % options.heads:
        raise ValueError(f"--dim {options.dim} is no multiple of --heads {options.heads}")
    if min(s.tokens for shape in shapes(options) for s in (shape, shape.other) if s) < 2:
        raise ValueError("--tokens counts the CLS and at least one patch: 2 or more")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    usable = ck.backends()
    options.named = [] if options.backend in ("all", "none") else options.backend.split(",")
    for name in options.named:
        if not usable.get(name, False):
            reason = usable.reasons.get(name, f"expected one of {', '.join(usable)}")
            raise ValueError(f"--backend {name}: {reason}")
    if options.backend == "all":  # the reference is the row "eager", an interpreter no contender
        others = {"reference"} | ({"triton"} if launch.interpreting() else set())
        options.backends = [name for name, ok in usable.items() if ok and name not in others]
    else:
        options.backends = options.named


def shapes(options: argparse.Namespace) -> list[Shape]:
    """One for each value swept, the other size at its default; or the default alone."""
    default = {"tokens": options.tokens, "batch": options.batch}
    points = [default | {axis: value} for axis, values in options.sweep for value in values]
    dtype = DTYPES[options.dtype]
    found = (
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
    return list(dict.fromkeys(found))


def introduction(bench: Bench) -> str:
    """What the tables below it need to be read."""
    options, ceilings, device = bench.options, bench.ceilings, bench.device
    usable = ck.backends()
    if device.type == "cpu":
        times = "One set of inputs: caches may hold some of it, and lift the share of the copy. "
        times += f"Load average before: {bench.environment['load_average']}."
    else:
        times = "Times are the device's; host us: until a call is issued. A CUDA graph's memory: -."
    return "\n".join(
        [
            f"{bench.environment['device']}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, torch.compile mode {options.compile_mode}",
            f"ceilings: copy {ceilings.copy_bytes_per_second / 1e9:.4g} GB/s, read + written "
            f"({ceilings.copy_buffer_bytes / 2**20:.0f} MiB); matmul "
            f"{ceilings.matmul_flops_per_second / 1e9:.4g} GFLOP/s "
            f"({ceilings.matmul_dtype}, {ceilings.matmul_size} cubed)",
            *(f"backend {name} is not usable here: {why}" for name, why in usable.reasons.items()),
            times,
            "GB/s: floor bytes over time. Error: relative RMS against float64, of the result "
            "furthest from eager's.",
        ]
    )


def save(options: argparse.Namespace, bench: Bench) -> None:
    """Write the files asked for."""
    facts = bench.environment
    document = report.document("fusion", options, facts, bench.ceilings, bench.rows)
    if options.save:
        name = f"{facts['date'][:10]}-fusion-{options.dtype}.json"
        report.write_json(report.RESULTS / measure.device_slug(options.device) / name, document)
    if options.json:
        report.write_json(options.json, document)
    if options.csv:
        report.write_csv(options.csv, bench.rows)
    if options.plot:
        title = f"Fusion, {facts['device']}, {options.dtype}, width {options.dim}"
        report.plot(options.plot, panels(options, bench.rows), title)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    progress = measure.Progress()
    bench = Bench(options, progress)
    progress.clear()
    print(introduction(bench), flush=True)
    try:
        for shape in shapes(options):
            try:
                bench.measure_point(shape)
            except torch.OutOfMemoryError as error:
                print(f"\n{shape.tokens} tokens, batch {shape.batch}: left out: {error}")
    finally:  # what was measured before a fault or Ctrl-C is kept
        if bench.rows:
            save(options, bench)
    print("\n" + "\n".join(bench.verdicts))
    faults = [row for row in bench.rows if row["ours"] and row["status"] in ("wrong", "failed")]
    for row in faults:
        print(f"ERROR: {row['contender']} {row['mode']}: {row['reason']}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the GPU kernels compile to, without a GPU: ``python -m crossvit_kernels.inspect``.

Compiles the Triton kernels for NVIDIA GPUs, in every specialization that inference and training
launch, and in the configuration that the installed Triton would get: the table's first candidate
that fits in shared memory without spilling registers. Shows registers and spilled words per thread,
shared memory per program, the share of an SM's threads that can be resident, tensor-core
instructions and 16-byte loads; the tensors that a specialization omits; and, below a kernel, the
rejected candidates, with the reason. Compiled kernels go to Triton's cache, where the first calls
of a program find them.

The Gluon kernels, for sm_90 in 16 bits, have one configuration: one that spills is not launched.
Their registers are those of a launch, of which each of two consumers then takes 232. Three would
have 160 each: no more than accumulators and rows take at 384 channels.

The CUDA kernels' code is read from the extension. Each handles all tokens up to a width; its shared
memory and occupancy are given for that width.

With --model: how long the kernels of Triton and CUDA take at the sizes of models, by a cycle model
of their machine code (docs/cycle_model.md). It is never a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossvit_kernels import extension, supported
from crossvit_kernels.gpu import launcher
from crossvit_kernels.inspect import (
    ahead_of_time,
    block_code,
    extension_code,
    gluon_code,
    machine_code,
)
from crossvit_kernels.inspect.ahead_of_time import reports
from crossvit_kernels.inspect.compile_cases import (
    BLOCKS,
    IDENTITIES,
    WIDTHS,
    compile_cases,
    extremes,
)
from crossvit_kernels.inspect.machine_code import Report
from crossvit_kernels.ops.common import sm90_linear
from crossvit_kernels.ops.common.configs import VARIANTS

ARCHITECTURES = (80, 90, 100)
MODELS = ("tiny", "small", "base", "9", "15", "18")
_GLUON = "triton:gluon"
_SECONDS_OF_SILENCE = 5


def extension_reports(
    options: argparse.Namespace, blocks: Sequence[tuple[int, int, int]]
) -> Iterator[Report]:
    """Report on the CUDA kernels, for the architectures that the extension was built for."""
    if not extension.cuda_kernels:
        reason = extension.missing or extension.NO_CUDA
        print(f"inspect: no CUDA kernels: {reason}", file=sys.stderr)
        return
    for arch in options.arch:
        if arch in extension_code.targets():
            name = options.kernel or ""
            yield from extension_code.reports(arch, options.dtype, options.channels, name)
            yield from block_code.reports(arch, options.dtype, blocks, name)


def gluon_reports(
    options: argparse.Namespace, blocks: Sequence[tuple[int, int, int]]
) -> Iterator[Report]:
    """Report on the Gluon kernels, of which the first column's kernels are alternatives."""
    if gluon_code.ARCH in options.arch and not options.quick and sm90_linear.has_gluon():
        name = options.kernel or ""
        yield from gluon_code.reports(options.dtype, blocks, name, options.processes)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if not launcher.installed():
        print("inspect: triton is not installed", file=sys.stderr)
        return 1
    if launcher.interpreting():
        print("inspect: TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 1
    channels = {*options.channels} if options.channels else {c for w in WIDTHS for c in w[:2]}
    widths = [w for w in WIDTHS if {*w[:2]} <= channels]
    blocks = [b for b in BLOCKS if b[0] in channels]
    if options.model:
        _model(options)
        return 0
    variants = VARIANTS.names if options.all else ("auto",)
    select, identities = (extremes, ("",)) if options.quick else (list, IDENTITIES)
    cases = [
        (case, arch)
        for arch in options.arch
        for case in select(compile_cases(arch, options.dtype, widths, blocks, variants, identities))
        if options.kernel is None or options.kernel in case.name
    ]
    rows = []
    if not options.json:
        print(_HEADER, flush=True)
    for report in itertools.chain(
        _with_progress(reports(cases, options.processes), len(cases)),
        gluon_reports(options, blocks),
        extension_reports(options, blocks),
    ):
        rows.append(report)
        if not options.json:
            print(_row(report), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0


def _model(options: argparse.Namespace) -> None:
    """Print modelled times of the launches of models' operations, or write them to a file."""
    from crossvit_kernels.inspect.model import cuda_launch, gluon_launch, report
    from crossvit_kernels.inspect.model.gpus import GPUS

    gpu, backends = GPUS[options.gpu], options.backend
    if "cuda" in backends and (reason := cuda_launch.why_not(gpu)):
        print(f"inspect: no CUDA kernels: {reason}", file=sys.stderr)
        backends = [name for name in backends if name != "cuda"]
    if _GLUON in backends and (reason := gluon_launch.why_not(gpu)):
        print(f"inspect: no Gluon kernels: {reason}", file=sys.stderr)
        backends = [name for name in backends if name != _GLUON]
    models = MODELS if options.model == "all" else [options.model]
    jobs = report.jobs(
        backends, gpu, models, options.dtype, options.batch, options.channels, options.kernel or ""
    )
    if options.output:
        report.keep(options.output, gpu, jobs, options.processes)
    elif options.json:
        by_job = report.rows(jobs, options.processes)
        rows = [report.as_json(row) for rows in by_job for row in rows]
        print(json.dumps(report.document(gpu, rows), indent=1))
    else:
        report.show(gpu, report.rows(jobs, options.processes))


def _with_progress(rows: Iterator[Report], total: int) -> Iterator[Report]:
    """Yield the reports, with a line to stderr at the start and every few seconds."""
    version, start = supported.installed_version("triton"), time.monotonic()
    print(f"inspect: {total} kernels on Triton {version}", file=sys.stderr, flush=True)
    last = start
    for done, report in enumerate(rows, 1):
        now = time.monotonic()
        if now - last > _SECONDS_OF_SILENCE or done == total:
            last = now
            print(f"inspect: {done} of {total}, {now - start:.0f} s", file=sys.stderr, flush=True)
        yield report


_HEADER = (
    f"{'kernel':31} {'configuration':62} {'sm':>4} {'registers':>9} {'spills':>6} {'shared':>8} "
    f"{'occupancy':>9} {'tensor':>6} {'wide':>5}  without"
)


def _row(r: Report) -> str:
    """Format a report as a line, and one for each rejected candidate."""
    line = (
        f"{r.kernel:31} {r.config:62} {r.arch:4} {r.registers:9} {r.spills:6} {r.shared_bytes:8} "
        f"{r.occupancy:9.0%} {r.tensor_core_instructions:6} {r.wide_loads:5}  {' '.join(r.absent)}"
    )
    return "\n".join((line.rstrip(), *(f"    passed over {other}" for other in r.passed_over)))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m crossvit_kernels.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def dtypes(text: str) -> list[str]:
        names = tuple(ahead_of_time.DTYPES)
        unknown = set(text.split(",")) - set(names)
        if unknown:
            raise argparse.ArgumentTypeError(f"{sorted(unknown)}: expected some of {names}")
        return text.split(",")

    def backends(text: str) -> list[str]:
        names = ("triton", "cuda", *(f"triton:{name}" for name in VARIANTS.names[1:]))
        unknown = set(text.split(",")) - set(names)
        if unknown:
            raise argparse.ArgumentTypeError(f"{sorted(unknown)}: expected some of {names}")
        return text.split(",")

    add = parser.add_argument
    add(
        "--arch",
        type=numbers,
        default=list(ARCHITECTURES),
        help="80,90,100 by default; also 86,89,103,120",
    )
    add(
        "--dtype", type=dtypes, default=["bf16"], help="of bf16,fp16,fp32,autocast; bf16 by default"
    )
    add("--channels", type=numbers, help="only these widths, e.g. 192,384")
    add("--kernel", metavar="NAME", help="only kernels whose name contains this")
    add("--json", action="store_true", help="a JSON list of objects instead of a table")
    add(
        "--quick",
        action="store_true",
        help="only each kernel's variants with most and fewest tensors, and no Gluon kernels",
    )
    add(
        "--all",
        action="store_true",
        help="also variants of blocks that are never the default",
    )
    add(
        "--model",
        nargs="?",
        const="15",
        choices=(*MODELS, "all"),
        help="how long kernels take in a CrossViT, by default 15; daggers have the same kernels",
    )
    add("--output", type=Path, help="of the model: a JSON file, continued if it is there")
    add(
        "--gpu",
        choices=("A100", "RTX4090", "H100", "H200", "B200"),
        default="H200",
        help="of the model",
    )
    add(
        "--backend",
        type=backends,
        default=["triton", "cuda"],
        help="of the model: triton,cuda by default; also triton:gluon and other variants",
    )
    add("--batch", type=numbers, default=[1, 64, 256], help="of the model: 1,64,256 by default")
    add("--processes", type=int, default=os.cpu_count(), help="one for each core by default")
    options = parser.parse_args(arguments)
    unknown = set(options.arch) - set(machine_code.LIMITS)
    if unknown:
        parser.error(f"--arch: {sorted(unknown)}: expected some of {sorted(machine_code.LIMITS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())

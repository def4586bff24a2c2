"""What the GPU kernels compile to, without a GPU: ``python -m crossvit_kernels.inspect``.

Compiles Triton's kernels for NVIDIA GPUs, in every form in which inference and training launch
them, and in the configuration that is chosen on the installed Triton: the first candidate of the
table that spills no registers and has enough shared memory. Shown are registers and spilled words
of a thread, shared memory of a program, the share of a multiprocessor's threads that can be
resident, tensor-core instructions and 16-byte loads; which tensors a form goes without; and, below
a kernel, the candidates that were passed over, with the reason. What is compiled goes to Triton's
cache, where the first calls of a program find it.

The CUDA kernels' code is read from the extension. One is for all tokens up to a width; its shared
memory and occupancy are those of tokens of that width.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from crossvit_kernels import extension, supported
from crossvit_kernels.gpu import ahead_of_time, extension_code, launch, machine_code, row_tiles
from crossvit_kernels.gpu.ahead_of_time import Specimen
from crossvit_kernels.gpu.machine_code import Report
from crossvit_kernels.ops.attention_core import specimens as core
from crossvit_kernels.ops.cross_attention import specimens as fusion
from crossvit_kernels.ops.layernorm_ffn import specimens as ffn
from crossvit_kernels.ops.layernorm_msa import specimens as msa

#: (C_own, C, heads) of all fusions of the named models: Ti, S, B, 9, 15, 18.
WIDTHS = tuple(
    (own, channels, heads)
    for small, heads in ((96, 3), (192, 6), (384, 12), (128, 4), (224, 7))
    for own, channels in ((small, 2 * small), (2 * small, small))
)
#: (C, heads, hidden units) of all their transformer blocks.
BLOCKS = tuple(
    (channels, heads, ratio * channels)
    for channels, heads, ratio in (
        *((96, 3, 4), (192, 3, 4)),
        *((192, 6, 4), (384, 6, 4), (192, 6, 3), (384, 6, 3)),
        *((384, 12, 4), (768, 12, 4)),
        *((128, 4, 3), (256, 4, 3)),
        *((224, 7, 3), (448, 7, 3)),
    )
)
ARCHITECTURES = (80, 90, 100)
_FORMS = row_tiles.FORMS.names
_SECONDS_OF_SILENCE = 5


def specimens(
    chip: int,
    dtypes: Sequence[str],
    widths: Sequence[tuple[int, int, int]] = WIDTHS,
    blocks: Sequence[tuple[int, int, int]] = BLOCKS,
    forms: Sequence[str] = _FORMS,
) -> list[Specimen]:
    """Every form in which kernels are launched, for tokens of these dtypes and widths.

    Args:
        chip: Compute capability, 90 for 9.0.
        dtypes: Names in ahead_of_time.DTYPES.
        widths: (C_own, C, heads) of fusions.
        blocks: (C, heads, hidden units) of transformer blocks.
        forms: Of blocks: the names in row_tiles.FORMS.
    """

    def runs() -> Iterator[Callable[[], object]]:
        for name in dtypes:
            dtype = ahead_of_time.DTYPES[name]
            for channels, heads in sorted({(c, h) for _, c, h in widths}):
                yield functools.partial(core.run, dtype.tokens, channels, heads)
            for own, channels, heads in widths:
                yield functools.partial(fusion.run, dtype, own, channels, heads)
                if own < channels and (channels, own, heads) in widths:
                    yield functools.partial(fusion.run_pair, dtype, own, channels, heads)
            for channels, heads in sorted({(c, h) for c, h, _ in blocks}):
                yield from in_forms(functools.partial(msa.run, dtype, channels, heads))
            for channels, hidden in sorted({(c, f) for c, _, f in blocks}):
                yield from in_forms(functools.partial(ffn.run, dtype, channels, hidden))

    def in_forms(run: Callable[[], object]) -> Iterator[Callable[[], object]]:
        for form in forms:
            yield functools.partial(_in_form, form, run)

    return ahead_of_time.specimens(chip, runs())


def extremes(found: Sequence[Specimen]) -> list[Specimen]:
    """Of a kernel's forms that differ in which tensors there are, those with most and fewest."""
    alike: dict[Hashable, list[Specimen]] = {}
    for specimen in found:
        form = specimen.form
        alike.setdefault((specimen.name, form.candidates, form.constants), []).append(specimen)
    return [
        specimen
        for group in alike.values()
        for index, specimen in enumerate(sorted(group, key=lambda s: len(s.absent)))
        if index in (0, len(group) - 1)
    ]


def _in_form(form: str, run: Callable[[], object]) -> None:
    with row_tiles.FORMS.choose(form):
        run()


def reports(found: Sequence[tuple[Specimen, int]], processes: int) -> Iterator[Report]:
    """Reports on (specimen, architecture) in order, compiled by several processes."""
    if processes == 1 or len(found) < 2:
        for specimen, arch in found:
            yield ahead_of_time.inspect(specimen, arch)
        return
    with ProcessPoolExecutor(min(processes, len(found))) as pool:
        yield from pool.map(ahead_of_time.inspect, *zip(*found, strict=True))


def extension_reports(options: argparse.Namespace) -> Iterator[Report]:
    """Reports on the CUDA kernels, for the architectures that the extension was built for."""
    if not extension.cuda_kernels:
        reason = extension.missing or extension.NO_CUDA
        print(f"inspect: no CUDA kernels: {reason}", file=sys.stderr)
        return
    for arch in options.arch:
        if arch in extension_code.targets():
            yield from extension_code.reports(
                arch, options.dtype, options.channels, options.kernel or ""
            )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if not launch.installed():
        print("inspect: triton is not installed", file=sys.stderr)
        return 1
    if launch.interpreting():
        print("inspect: TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 1
    # What Triton's default was up to 3.9, and what a GPU would run.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    wanted = {*options.channels} if options.channels else {c for w in WIDTHS for c in w[:2]}
    widths = [w for w in WIDTHS if {*w[:2]} <= wanted]
    blocks = [b for b in BLOCKS if b[0] in wanted]
    forms, some = _FORMS if options.all else ("auto",), extremes if options.quick else list
    found = [
        (specimen, arch)
        for arch in options.arch
        for specimen in some(specimens(arch, options.dtype, widths, blocks, forms))
        if options.kernel is None or options.kernel in specimen.name
    ]
    rows = []
    if not options.json:
        print(_HEADER, flush=True)
    for report in itertools.chain(
        _with_progress(reports(found, options.processes), len(found)), extension_reports(options)
    ):
        rows.append(report)
        if not options.json:
            print(_row(report), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0


def _with_progress(found: Iterator[Report], total: int) -> Iterator[Report]:
    """The same, with a line to stderr at the start and every few seconds."""
    version, start = supported.installed_version("triton"), time.monotonic()
    print(f"inspect: {total} kernels on Triton {version}", file=sys.stderr, flush=True)
    last = start
    for done, report in enumerate(found, 1):
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
    """A line, and one for each candidate that was passed over."""
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
        return [int(part) for part in text.split(",")]

    def dtypes(text: str) -> list[str]:
        names = tuple(ahead_of_time.DTYPES)
        unknown = set(text.split(",")) - set(names)
        if unknown:
            raise argparse.ArgumentTypeError(f"{sorted(unknown)}: expected some of {names}")
        return text.split(",")

    add = parser.add_argument
    add("--arch", type=numbers, default=list(ARCHITECTURES), help="80,90,100 by default")
    add(
        "--dtype", type=dtypes, default=["bf16"], help="of bf16,fp16,fp32,autocast; bf16 by default"
    )
    add("--channels", type=numbers, help="only these widths, e.g. 192,384")
    add("--kernel", metavar="NAME", help="only kernels whose name contains this")
    add("--json", action="store_true", help="a JSON list of objects instead of a table")
    add("--quick", action="store_true", help="of a kernel's forms the fullest and the barest")
    add("--all", action="store_true", help="also what CROSSVIT_KERNELS_BLOCKS can ask for")
    add("--processes", type=int, default=os.cpu_count(), help="one for each core by default")
    options = parser.parse_args(arguments)
    unknown = set(options.arch) - set(machine_code.SHARED_BYTES)
    if unknown:
        parser.error(f"--arch: {sorted(unknown)}: expected some of {ARCHITECTURES}")
    return options


if __name__ == "__main__":
    sys.exit(main())

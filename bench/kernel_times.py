"""Measure every kernel that the operations of a CrossViT launch, beside what the model says of it.

    python bench/kernel_times.py --json FILE [--modelled MODEL.json]

Runs the passes that ``python -m crossvit_kernels.inspect --model`` models, on the GPU, and reads
the time of each kernel from CUPTI. Before each pass the L2 is filled with something else. With
--modelled, a file that inspect's --output wrote for this GPU is put beside the measurement: the
n-th kernel of a name in a pass is the n-th such launch that the model has.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import environment
import report
import torch
from command_line import positive
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import crossvit_kernels as ck
from crossvit_kernels.inspect.ahead_of_time import DTYPES
from crossvit_kernels.inspect.model.workloads import MODELS, Workload, workloads

_EPS = 1e-6
#: Starts before each pass, where it also waits for the host, and after it.
_MARK = "spin_kernel"
_SPIN_CYCLES = 400_000

Row = dict[str, Any]


class Kernel(NamedTuple):
    """A kernel that ran: its name and times in microseconds."""

    name: str
    start: float
    end: float


def filled(inputs: Any, operation: Any, device: torch.device) -> Any:
    """Return inputs of an operation with memory and random values, in the layout they have."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        size = (
            1
            + t.storage_offset()
            + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        )
        values = torch.randn(size, dtype=torch.float32, device=device, generator=generator)
        if t.ndim == 2 and t.shape[0] > 1:
            values *= t.shape[1] ** -0.5
        return values.to(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())

    heads = getattr(inputs, "num_heads", None)
    return operation.inputs([fill(t) for t in operation.flat(inputs)], heads)


def pass_of(workload: Workload, backend: str, device: torch.device) -> Callable[[], object]:
    """Return what runs the workload on a backend once; ValueError if the backend declines."""
    operation, module = workload.operation, workload.operation.backends[backend]
    inputs = filled(workload.inputs(), operation, device)
    if reason := module.why_not(inputs):
        raise ValueError(reason)
    if workload.direction == "forward":
        return lambda: module.forward(inputs, _EPS, "")
    if workload.direction == "training":
        return lambda: module.forward(inputs, _EPS, workload.keep)
    outputs, saved = module.forward(inputs, _EPS, workload.keep)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    saved = saved or module.Saved(*outputs)
    douts = tuple(torch.randn_like(t) for t in outputs)
    wanted = operation.inputs([t is not None for t in operation.flat(inputs)])
    return lambda: module.backward(douts, inputs, saved, _EPS, wanted)


def run_marked(run: Callable[[], object], flush: Tensor, repeats: int) -> Iterator[None]:
    """Run a pass after warming up, between marks and with an L2 that holds something else.

    Yields before each pass: what fails has its marks all the same.
    """
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    for index in range(repeats):
        flush.fill_(index % 2)
        yield
        torch.cuda._sleep(_SPIN_CYCLES)
        try:
            run()
        finally:
            torch.cuda._sleep(1)
    torch.cuda.synchronize()


def kernels_in(profiled: profile) -> list[Kernel]:
    """Return what ran on the GPU, in the order of its start."""
    # Not profiled.events(), which takes a minute to put them into a tree.
    results: Any = profiled.profiler
    found = (
        Kernel(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3)
        for event in results.kineto_results.events()
        if event.device_type().name == "CUDA"
    )
    return sorted(found, key=lambda kernel: kernel.start)


def passes(kernels: Iterable[Kernel]) -> Iterator[list[Kernel]]:
    """Yield the kernels between each two marks."""
    current: list[Kernel] | None = None
    for kernel in kernels:
        if _MARK not in kernel.name:
            if current is not None:
                current.append(kernel)
        elif current is None:
            current = []
        else:
            yield current
            current = None


def times_of(found: Sequence[Sequence[Kernel]]) -> Row:
    """Return medians over the passes: of each kernel, and from the first's start to the end."""
    names = collections.Counter(tuple(k.name for k in one) for one in found).most_common(1)[0][0]
    alike = [one for one in found if tuple(k.name for k in one) == names]

    def median(values: Iterator[float]) -> float:
        return round(statistics.median(values), 3)

    kernels = [
        {
            "kernel": name,
            "microseconds": median(one[index].end - one[index].start for one in alike),
        }
        for index, name in enumerate(names)
    ]
    span = median(max(k.end for k in one) - one[0].start for one in alike) if names else 0.0
    return {"passes": len(alike), "span_microseconds": span, "kernels": kernels}


def put_beside(rows: Sequence[Row], modelled: Sequence[Row]) -> None:
    """Add what the model says of the launch to each kernel that it has, in the order of both."""
    by_pass = collections.defaultdict(list)
    for row in modelled:
        by_pass[_key(row)].append(row)
    for row in rows:
        launches = by_pass[_key(row)][:]
        for kernel in row["kernels"]:
            for launch in launches:
                if re.search(rf"\b{launch['kernel']}\b", kernel["kernel"]):
                    kernel["modelled"] = launch["modelled"]["microseconds"]
                    kernel["floor"] = launch["modelled"]["floor"]
                    kernel["config"] = launch["config"]
                    launches.remove(launch)
                    break


def _key(row: Row) -> tuple[Any, ...]:
    names = ("model", "operation", "direction", "channels", "batch", "dtype")
    return row["backend"].partition(":")[0], *(row[name] for name in names)


def show(row: Row) -> None:
    """Print a pass and its kernels."""
    print(
        f"{row['backend']:12} {row['operation']:22} {row['direction']:8} C {row['channels']:<4} "
        f"B {row['batch']:<4} {row['span_microseconds']:9.1f} us, "
        f"{sum(k['microseconds'] for k in row['kernels']):9.1f} in kernels"
    )
    for kernel in row["kernels"]:
        beside = f", modelled {kernel['modelled']:9.1f}" if "modelled" in kernel else ""
        print(f"    {kernel['microseconds']:9.1f}{beside}  {kernel['kernel'][:70]}", flush=True)


def cases(options: argparse.Namespace) -> Iterator[tuple[Row, Workload]]:
    """Yield the passes to measure, each with what its row says of it."""
    usable = ck.backends()
    for model, backend in itertools.product(options.models, options.backends):
        name = backend.partition(":")[0]
        if not usable[name]:
            print(f"{backend}: {usable.reasons[name]}", flush=True)
            continue
        for dtype, batch in itertools.product(options.dtype, options.batch):
            for workload in workloads(model, DTYPES[dtype], batch):
                operation = workload.operation
                if backend not in operation.backends:
                    continue
                if options.operations and operation.name not in options.operations:
                    continue
                row = {
                    "backend": backend,
                    "model": model,
                    "operation": operation.name,
                    "direction": workload.direction,
                    "channels": workload.channels,
                    "tokens": workload.tokens,
                    "batch": batch,
                    "dtype": dtype,
                }
                yield row, workload


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["15"])
    add("--batch", type=positive, nargs="+", default=[1, 64, 256])
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    add(
        "--backends",
        nargs="+",
        default=["triton", "cuda", "library"],
        help="variants too: triton:split",
    )
    add("--operations", nargs="+", help="by default all")
    add("--repeats", type=positive, default=15, help="passes of each")
    add("--json", type=Path, metavar="PATH", help="results and environment")
    add("--modelled", type=Path, metavar="PATH", help="of inspect --model --output, for this GPU")
    options: argparse.Namespace = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda")
    flush = torch.empty(4 * environment.l2_bytes(device), dtype=torch.uint8, device=device)
    modelled = json.loads(options.modelled.read_text())["rows"] if options.modelled else []
    rows: list[Row] = []
    marked: list[int] = []  # the row of each pass
    failed = 0
    # One profile for all: to start and to stop it takes seconds.
    with profile(activities=[ProfilerActivity.CUDA]) as profiled, suppress(KeyboardInterrupt):
        for row, workload in cases(options):
            try:
                run = pass_of(workload, row["backend"], device)
                for _ in run_marked(run, flush, options.repeats):
                    marked.append(len(rows))
            except (ValueError, RuntimeError) as error:
                failed += not isinstance(error, ValueError)
                print(f"{_key(row)}: {str(error).splitlines()[0]}", flush=True)
            rows.append(row)
    found: dict[int, list[list[Kernel]]] = collections.defaultdict(list)
    for index, kernels in zip(marked, passes(kernels_in(profiled)), strict=False):
        found[index].append(kernels)
    rows = [row | times_of(found[index]) for index, row in enumerate(rows) if found[index]]
    put_beside(rows, modelled)
    for row in rows:
        show(row)
    if options.json:
        facts = environment.environment(device)
        report.write_json(options.json, {"environment": facts, "results": rows})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

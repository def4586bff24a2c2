"""What heads_bench and zoo_bench share: a model before and after ``accelerate``, in turn."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import command_line
import environment
import report
import torch
from command_line import DTYPES
from torch import Tensor, nn

from crossvit_kernels.calibration.measure import measure
from crossvit_kernels.calibration.whole_model import backward

#: Speedups are over this contender: the module as its library has it.
OWN = "own forward"
Arguments = tuple[Any, ...]


def call(module: Callable[..., Any], inputs: Arguments, training: bool) -> Any:
    """Run a module; in training also backward, to all inputs and parameters."""
    with torch.set_grad_enabled(training):
        output = module(*inputs)
        if training:
            leaves = [t for t in inputs if isinstance(t, Tensor)]
            backward(_tensors(output), [*leaves, *getattr(module, "parameters", list)()])
        return output


def _tensors(output: Any) -> tuple[Tensor, ...]:
    if isinstance(output, Tensor):
        return (output,)
    values = output.values() if isinstance(output, Mapping) else output
    return tuple(t for t in values if isinstance(t, Tensor))


def copies(module: nn.Module, count: int) -> list[nn.Module]:
    """Return copies, which may be accelerated differently."""
    return [copy.deepcopy(module) for _ in range(count)]


def compiled(module: nn.Module, inputs: Arguments, training: bool) -> Any:
    """Return a compiled module that has run once, or a string that says why it does not."""
    torch._dynamo.reset()
    function = torch.compile(module)
    try:
        call(function, inputs, training)
    except Exception as error:  # third-party compilers may raise anything
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return function


def time_contenders(
    contenders: Mapping[str, Any],
    inputs: Arguments,
    training: bool,
    options: argparse.Namespace,
    facts: Mapping[str, Any],
) -> list[report.Row]:
    """Time contenders in turn; those whose output is wrong are reported and not timed.

    Args:
        contenders: Modules by name, OWN first; a string instead says why there is none.
        inputs: Their arguments.
        training: Whether backward is timed as well.
        options: ``min_time`` and ``dtype``.
        facts: Further fields of every row.
    """
    expected = _tensors(call(contenders[OWN], inputs, False))
    rows, runs = {}, {}
    for name, module in contenders.items():
        row: report.Row = {**facts, "contender": name, "mode": "train" if training else "forward"}
        reason = module if isinstance(module, str) else None
        if reason is None:
            error = _largest_error(_tensors(call(module, inputs, False)), expected)
            allowed = 1e-4 if options.dtype == "float32" else 3e-2
            reason = None if error <= allowed else f"its largest error is {error:.2g}"
            row["error"] = error
        rows[name] = {**row, "status": "ok" if reason is None else "not timed", "reason": reason}
        if reason is None:
            runs[name] = lambda module=module: call(module, inputs, training)
    seconds = medians(runs, options)
    for name, value in seconds.items():
        rows[name]["median_ms"] = value * 1e3
        rows[name]["speedup"] = seconds[OWN] / value
    return list(rows.values())


def _largest_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest error of any output, over its largest value."""
    if len(actual) != len(expected):
        return float("inf")
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e.is_floating_point()]
    errors = [(a - e).abs().max() / e.abs().max().clamp_min(1e-30) for a, e in pairs]
    return max(error.item() for error in errors)


def medians(
    runs: Mapping[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, float]:
    """Return the median seconds of each run, measured in turn; of CPU time with --cpu-time."""
    if not options.cpu_time:
        return measure(runs, options.device, options.min_time * len(runs))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.process_time() + options.min_time * len(runs)
    while len(times[OWN]) < 5 or (time.process_time() < end and len(times[OWN]) < options.repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def add_options(parser: command_line.Parser) -> None:
    """Add the options that both benchmarks have."""
    add = parser.add_argument
    add("--batch", type=command_line.positive, nargs="+", default=[1, 8], help="images (1 8)")
    add("--markdown", type=Path, metavar="PATH", help="the table")
    text = "on one thread, count the CPU's time: for a machine that others use as well"
    add("--cpu-time", action="store_true", help=text)


def completed(parser: command_line.Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options, and set the number of threads that they ask for."""
    options = command_line.completed(parser, arguments)
    if options.cpu_time:
        if options.device.type != "cpu":
            parser.error("--cpu-time needs --device cpu")
        torch.set_num_threads(1)
    return options


class Kept:
    """What was measured before: a file with a line of JSON for each point.

    Args:
        options: zoo_bench's; ``resume`` is the file, or None. Lines of another machine, version,
            commit or setting are neither used nor removed.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path | None = options.resume
        facts = environment.environment(options.device, options.dtype)
        names = ("commit", "dirty", "device", "dtype", "torch", "threads")
        self.facts = {name: facts[name] for name in names}
        self.facts |= {
            "cpu_time": options.cpu_time,
            "compiles": not options.no_compile,
            "measures": not options.no_example,
            "min_time": options.min_time,
        }
        self.found: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            lines = self.path.read_text().splitlines()
            self.found = [json.loads(line) for line in lines if line.endswith("]}")]

    def rows(self, point: report.Row) -> list[report.Row] | None:
        """Return the rows of a point, or None if it is not there."""
        key = {**self.facts, **point}
        return next((line["rows"] for line in self.found if line["key"] == key), None)

    def add(self, point: report.Row, rows: list[report.Row]) -> None:
        """Write the rows of a point to the file."""
        if self.path is not None:
            line = json.dumps({"key": {**self.facts, **point}, "rows": rows})
            with self.path.open("a") as file:
                file.write(f"\n{line}")  # whatever the last line is, of a run that was killed


def cell(row: report.Row) -> str:
    """Return a row's time and speedup, or a dash."""
    if row["status"] != "ok":
        return "-"
    gain = "" if row["contender"] == OWN else f", {report.times(row['speedup'])}"
    return f"{row['median_ms']:.3g} ms{gain}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


#: The rows of one point by the names of their contenders.
ByContender = Mapping[str, report.Row]


def tabulate(
    options: argparse.Namespace,
    header: list[str],
    points: Iterable[list[report.Row]],
    line_of: Callable[[report.Row, ByContender], list[str]],
) -> int:
    """Print each point's line as soon as it is measured, then finish with all of them.

    Args:
        options: The program's.
        header: Of the table.
        points: The rows of each.
        line_of: Returns a point's line from its first row and all by contender.
    """
    rows: list[report.Row] = []
    lines = []
    for point in points:
        rows += point
        lines.append(line_of(point[0], {row["contender"]: row for row in point}))
        print("  ".join(lines[-1]), file=sys.stderr, flush=True)
    return finish(options, rows, markdown(header, lines))


def finish(options: argparse.Namespace, rows: list[report.Row], table: str) -> int:
    """Print the table, write the requested files; 1 if something of ours was wrong."""
    print(table)
    document = report.new_document(options, results=rows)
    report.save(options, document)
    facts = document["environment"]
    note = (
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['dtype']}; medians of {'CPU' if options.cpu_time else 'wall'} time"
    )
    targets: list[Path] = [options.markdown] if options.markdown else []
    if options.save:
        name = "-".join((facts["date"][:10], options.benchmark, facts["dtype"]))
        folder = report.RESULTS / environment.device_slug(options.device)
        targets.append(folder / f"{name}.md")
    for path in targets:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{table}\n\n{note}\n")
    wrong = [r for r in rows if r["status"] != "ok" and not r["contender"].startswith("compile")]
    for row in wrong:
        print(f"ERROR: {row['contender']}: {row['reason']}")
    return int(bool(wrong))


def tensors(*shape: int, options: argparse.Namespace, grad: bool = False) -> Tensor:
    """Return random inputs of the run's dtype and device."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(options.device, DTYPES[options.dtype]).requires_grad_(grad)

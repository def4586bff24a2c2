"""Whole models of timm and transformers before and after crossvit_kernels.accelerate.

    python bench/zoo_bench.py --resume zoo.jsonl

measures each model in evaluation: as its library has it, compiled, served by ``accelerate(model)``,
and by ``accelerate(model, example=images)``, which keeps what it measured to be faster. Random
weights; needs timm and transformers. What is measured is added to the file of --resume; if the
program is started again with it, it goes on with the rest. On two cores all models take about two
hours, most of which is compilation; ``--models`` names some, ``--list`` prints the names.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import command_line
import report
import served
import zoo_models
from command_line import positive
from served import OWN

import crossvit_kernels as ck

#: Speedups from here on are not told from 1.
_NOISE = 0.97


def points(options: argparse.Namespace, slower: list[str]) -> Iterator[list[report.Row]]:
    """Measure; yields the rows of each model and batch, and adds to what is slower served."""
    kept = served.Kept(options)
    for name in options.models:
        size = zoo_models.size_of(name, options)
        own: Any = None
        for batch in options.batch:
            point = {"model": name, "batch": batch, "size": size}
            rows = kept.rows(point)
            if rows is None:
                own = own or zoo_models.build(name, size, options)
                rows = measured(own, point, options)
                kept.add(point, rows)
            slower += [
                _slow(row) for row in rows if row.get("speedup", 1.0) < _NOISE and "modules" in row
            ]
            yield rows
        gc.collect()


def measured(own: Any, point: report.Row, options: argparse.Namespace) -> list[report.Row]:
    """Return the rows of a model at one batch."""
    inputs = zoo_models.inputs(point["model"], point["size"], point["batch"], options)
    known, measured, other = served.copies(own, 3)
    tables = {"served": ck.accelerate(known)}
    contenders: dict[str, Any] = {OWN: own, "served": known}
    if not options.no_example:
        budget = 6 * options.min_time
        tables["measured"] = ck.accelerate(measured, example=inputs, budget_s=budget)
        contenders["measured"] = measured
    seconds = None
    if not options.no_compile:
        start = time.perf_counter()
        contenders["compiled"] = served.compiled(other, inputs, False)
        seconds = time.perf_counter() - start
    rows = served.time_contenders(contenders, inputs, False, options, point)
    for row in rows:
        if row["contender"] in tables:
            row["modules"] = modules(tables[row["contender"]])
        elif row["contender"] == "compiled":
            row["compile_s"] = seconds
    return rows


def modules(table: Any) -> str:
    """Return what is served: ``12 Block, 1 AttentionPoolLatent``."""
    kinds = Counter(row.kind for row in table.rows if row.serves)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = command_line.benchmark_parser(
        __doc__, "zoo", min_time=1.0, repeats=50, modes=("forward",), backends=False
    )
    add = parser.add_argument
    add("--models", nargs="+", default=zoo_models.ALL, metavar="NAME", help="some of --list")
    add("--list", action="store_true", help="print the names of all models")
    add("--no-example", action="store_true", help="leave out what accelerate(example=) keeps")
    add("--size", type=positive, help="of the images; default: the model's")
    add("--resume", type=Path, metavar="PATH", help="a file of what is measured, to go on with")
    served.add_options(parser)
    options = served.completed(parser, arguments)
    if options.list:
        print("\n".join(zoo_models.ALL))
        return 0
    unknown = [
        name
        for name in options.models
        if name.startswith(zoo_models.PREFIX) and name not in zoo_models.ALL
    ]
    if unknown:
        parser.error(f"--models: no model {unknown[0]!r}; --list prints the names")
    header = ["model", OWN, "compiled", "served", "served, with example"]
    slower: list[str] = []
    code = served.tabulate(options, header, points(options, slower), _line)
    print(f"slower than its own forward by more than 3 %: {'; '.join(slower) or 'none'}")
    return code


def _slow(row: report.Row) -> str:
    where = f"{row['model']}, batch {row['batch']}"
    return f"{where}, {row['contender']}: {report.times(row['speedup'])}"


def _line(first: report.Row, by: served.ByContender) -> list[str]:
    cells = [served.cell(by[name]) if name in by else "-" for name in (OWN, "compiled")]
    for name in ("served", "measured"):
        cells.append(f"{served.cell(by[name])}: {by[name]['modules']}" if name in by else "-")
    return [f"{first['model']}, batch {first['batch']}", *cells]


if __name__ == "__main__":
    sys.exit(main())

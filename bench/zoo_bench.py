"""Whole models of timm before and after crossvit_kernels.accelerate.

    python bench/zoo_bench.py --batch 1 8

measures each model in evaluation: as timm has it, compiled, and served by ``accelerate(model)``;
with ``--example`` also by ``accelerate(model, example=images)``, which keeps what it measured to be
faster. Random weights; needs timm.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import command_line
import report
import served
import torch
from command_line import DTYPES, positive
from served import OWN

import crossvit_kernels as ck

MODELS = (
    "deit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_siglip_224",
    "crossvit_9_240",
    "crossvit_15_240",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "volo_d1_224",
    "pit_ti_224",
    "mobilevit_xxs",
    "resnet50_clip",
    "vit_small_patch14_dinov2",
)


def points(options: argparse.Namespace) -> Iterator[list[report.Row]]:
    """Measure; yields the rows of each model and batch."""
    import timm

    for name in options.models:
        torch.manual_seed(0)
        own = timm.create_model(name, num_classes=1000).eval()
        own.to(options.device, DTYPES[options.dtype])
        size = options.size or own.pretrained_cfg["input_size"][-1]
        for batch in options.batch:
            inputs = (served.tensors(batch, 3, size, size, options=options),)
            known, measured, other = served.copies(own, 3)
            tables = {"served": ck.accelerate(known)}
            contenders: dict[str, Any] = {OWN: own, "served": known}
            if options.example:
                budget = 6 * options.min_time
                tables["measured"] = ck.accelerate(measured, example=inputs, budget_s=budget)
                contenders["measured"] = measured
            if not options.no_compile:
                contenders["compiled"] = served.compiled(other, inputs, False)
            facts = {"model": name, "batch": batch, "size": size}
            rows = served.time_contenders(contenders, inputs, False, options, facts)
            for row in rows:
                if row["contender"] in tables:
                    row["modules"] = modules(tables[row["contender"]])
            yield rows


def modules(table: Any) -> str:
    """Return what is served: ``12 Block, 1 AttentionPoolLatent``."""
    kinds = Counter(row.kind for row in table.rows if row.serves)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = command_line.benchmark_parser(
        __doc__, "zoo", min_time=1.5, repeats=50, modes=("forward",), backends=False
    )
    add = parser.add_argument
    add("--models", nargs="+", default=MODELS, help="names in timm")
    add("--example", action="store_true", help="also measure what accelerate(example=) keeps")
    add("--size", type=positive, help="of the images; default: the model's")
    served.add_options(parser)
    options = served.completed(parser, arguments)
    header = ["model", OWN, "compiled", "served", "served, with example"]
    return served.tabulate(options, header, points(options), _line)


def _line(first: report.Row, by: served.ByContender) -> list[str]:
    cells = [served.cell(by[name]) if name in by else "-" for name in (OWN, "compiled")]
    for name in ("served", "measured"):
        cells.append(f"{served.cell(by[name])}: {by[name]['modules']}" if name in by else "-")
    return [f"{first['model']}, batch {first['batch']}", *cells]


if __name__ == "__main__":
    sys.exit(main())

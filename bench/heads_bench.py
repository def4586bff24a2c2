"""Pooling heads of timm and transformers, before and after crossvit_kernels.accelerate.

    python bench/heads_bench.py --batch 1 8

measures each head's own forward, the same compiled, and the head as ``accelerate`` serves it;
forward, and forward with backward. Needs timm and transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import command_line
import report
import served
import torch
from command_line import DTYPES
from served import OWN

import crossvit_kernels as ck


class Head(NamedTuple):
    """A head: how it is made, and the shapes of its inputs without the batch."""

    make: Callable[[], Any]
    shapes: tuple[tuple[int, ...], ...]


def heads() -> dict[str, Head]:
    """Return the heads by name, in the sizes of published models."""
    from timm.layers import AttentionPool2d, AttentionPoolLatent
    from timm.models.cait import LayerScaleBlockClassAttn
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    so400m = SiglipVisionConfig(
        hidden_size=1152, num_attention_heads=16, intermediate_size=4304, hidden_act="gelu"
    )

    def pooler(queries: int) -> Head:
        options = {"latent_len": queries, "num_heads": 12, "norm_layer": torch.nn.LayerNorm}
        return Head(lambda: AttentionPoolLatent(768, pool_type="", **options), ((256, 768),))

    return {
        "SigLIP so400m, 576 tokens": Head(
            lambda: SiglipMultiheadAttentionPoolingHead(so400m), ((576, 1152),)
        ),
        "CLIP RN50, AttentionPool2d": Head(
            lambda: AttentionPool2d(2048, 7, 1024, num_heads=32), ((2048, 7, 7),)
        ),
        "CaiT-S24, class attention block": Head(
            lambda: LayerScaleBlockClassAttn(384, 8), ((196, 384), (1, 384))
        ),
        **{
            f"pooler, {queries} {'query' if queries == 1 else 'queries'}": pooler(queries)
            for queries in (1, 8, 64, 256)
        },
    }


def points(options: argparse.Namespace) -> Iterator[list[report.Row]]:
    """Measure; yields the rows of each head, batch and mode."""
    for name, head in heads().items():
        if options.only and options.only not in name:
            continue
        torch.manual_seed(0)
        own = head.make().eval().to(options.device, DTYPES[options.dtype])
        for batch in options.batch:
            inputs = tuple(
                served.tensors(batch, *shape, options=options, grad=True) for shape in head.shapes
            )
            for mode in command_line.modes_of(options):
                ours, other = served.copies(own, 2)
                training = mode == "train"
                table = ck.accelerate(ours, training=training)
                contenders: dict[str, Any] = {OWN: own}
                if not options.no_compile:
                    contenders["compiled"] = served.compiled(other, inputs, training)
                if table.served:
                    contenders["served"] = ours
                facts = {
                    "head": name,
                    "batch": batch,
                    "declined": "; ".join(table.declined.values()),
                }
                yield served.time_contenders(contenders, inputs, training, options, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = command_line.benchmark_parser(
        __doc__, "heads", min_time=0.7, repeats=50, backends=False
    )
    add = parser.add_argument
    add("--only", help="only heads whose name contains this")
    served.add_options(parser)
    options = served.completed(parser, arguments)
    return served.tabulate(options, ["head", OWN, "compiled", "served"], points(options), _line)


def _line(first: report.Row, by: served.ByContender) -> list[str]:
    name = f"{first['head']}, batch {first['batch']}, {first['mode']}"
    ours = served.cell(by["served"]) if "served" in by else f"own: {first['declined']}"
    compiled = served.cell(by["compiled"]) if "compiled" in by else "-"
    return [name, served.cell(by[OWN]), compiled, ours]


if __name__ == "__main__":
    sys.exit(main())

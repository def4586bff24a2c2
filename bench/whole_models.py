"""Compare whole models with torch's composition of them, by the cycle model.

    python bench/whole_models.py [--images 64,256] [--gluon] [--json FILE]

Every model of the paper's Table 1 in bfloat16 on an H200: GPU time without gaps between launches.
Nothing here is measured. Ours are the modelled kernels in bench/results/model, as `auto` chooses
them where the extension is built: CUDA's fusions, Triton's blocks. The composition is
LayerNorm, cuBLAS, flash attention and pointwise kernels, as library_model.py models them, and in
its favour: a residual and the LayerNorm behind it are one pass, tiles of products are never partly
empty, and the layers of the CLS tokens cost only their starts. Against it, GELU is a pass of its
own, and attention is in tiles of 128 keys. The embedding and the products for gradients of weights
are torch's in both; loss and optimizer are in neither. Models with daggers differ in the embedding
alone. With --gluon blocks are those of `triton:gluon`, whose kernels also multiply by W_o, W_qkv
and W_1 in backward, for 256 images.

The largest model takes minutes; products of one shape are modelled once.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from library_model import Block, flash_attention, memory_pass, product, write

from crossvit.configs import Config, config_grids, named_config
from crossvit_kernels.inspect.model.gpus import H200
from crossvit_kernels.inspect.model.workloads import MODELS
from crossvit_kernels.ops.common.configs import NORM_BACKWARD_PROGRAMS
from crossvit_kernels.ops.layernorm_ffn import configs as ffn_configs

MODELLED = Path(__file__).parent / "results/model"
#: Between two kernels of a stream, in microseconds: docs/cycle_model.md, beside an H100.
START = 1.1
#: Launches of torch for a fusion: eight layers and norms of CLS tokens, and what joins them.
FUSION_STARTS = 12
#: The products of attention's backward, of which forward has two.
BACKWARD_PRODUCTS = 2.5
#: What torch adds up of our kernels in a block's backward, for gradients of biases and norms.
SUMS_LAUNCHES = 12
#: Of LayerNorm's backward: its gradient and input, read twice, the residual's gradient, the result.
NORM_BACKWARD = 6


class Cost(NamedTuple):
    """Microseconds of launches, without their starts, and the number of launches."""

    us: float = 0.0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.us + other.us, self.launches + other.launches)

    def times(self, count: int) -> Cost:
        return Cost(self.us * count, self.launches * count)

    @property
    def with_starts(self) -> float:
        return self.us + self.launches * START


@functools.cache
def kernels() -> dict[tuple[Any, ...], Cost]:
    """What our operations cost, from the files in bench/results/model."""
    found: dict[tuple[Any, ...], Cost] = collections.defaultdict(Cost)
    seen: dict[tuple[Any, ...], Path] = {}
    for path in sorted(MODELLED.glob("h200*.json")):
        document = json.loads(path.read_text())
        if document["gpu"]["name"] != H200.name:
            continue
        names = ("backend", "operation", "direction", "model", "channels", "batch")
        for row in document["rows"]:
            key = tuple(row[name] for name in names)
            if row["dtype"] == "bf16" and seen.setdefault(key, path) == path:
                found[key] += Cost(row["modelled"]["microseconds"], 1)
    return dict(found)


def ours(operation: str, direction: str, block: Block, variant: str = "") -> Cost:
    backend = "cuda" if operation == "cross_attention_fusion" else f"triton{variant}"
    return kernels()[backend, operation, direction, block.model, block.channels, block.images]


@functools.cache
def products(block: Block, columns: int, terms: int, count: int = 1) -> Cost:
    return Cost(product(block, columns, terms), 1).times(count)


def a_pass(block: Block, columns: int) -> Cost:
    return Cost(memory_pass(block, columns), 1)


@functools.cache
def attention(block: Block) -> Cost:
    return Cost(flash_attention(block), 1)


def layers(block: Block) -> tuple[tuple[int, int], ...]:
    """A block's linear layers: outputs and inputs of qkv, projection, fc1 and fc2."""
    c, hidden = block.channels, block.hidden
    return (3 * c, c), (c, c), (hidden, c), (c, hidden)


def keeps_hidden(block: Block) -> bool:
    return ffn_configs.keeps_hidden(block.channels, 2)


def block_forward(block: Block, variant: str, training: bool) -> tuple[Cost, Cost]:
    """Ours, and the composition."""
    of_ffn = "training" if training and keeps_hidden(block) else "forward"
    ours_ = ours("layernorm_msa", "forward", block, variant)
    ours_ += ours("layernorm_ffn", of_ffn, block, variant)
    composed = attention(block)
    for columns, terms in layers(block):
        composed += products(block, columns, terms)
    # A residual and the LayerNorm behind it, for both halves; GELU.
    composed += a_pass(block, 4 * block.channels).times(2) + a_pass(block, 2 * block.hidden)
    return ours_, composed


def block_backward(block: Block, variant: str) -> tuple[Cost, Cost]:
    """Ours, and the composition."""
    c, hidden = block.channels, block.hidden
    ours_ = ours("layernorm_msa", "backward", block, variant)
    ours_ += ours("layernorm_ffn", "backward", block, variant)
    composed = Cost(attention(block).us * BACKWARD_PRODUCTS, 2) + a_pass(block, 2 * c)
    steps = ffn_configs.HIDDEN_GRADIENT, ffn_configs.KEPT_HIDDEN_GRADIENT
    by_library = steps[keeps_hidden(block)].by_library(block.rows, c, 2)
    for columns, terms in layers(block):
        both = products(block, terms, columns)  # the gradient of what the layer reads
        weights = products(block, columns, terms)  # as many operations
        composed += both + weights
        # fc2's is in a kernel of its own, unless cuBLAS computes it; Gluon's kernels do all others.
        is_fc2 = (columns, terms) == (c, hidden)
        is_ours = not by_library if is_fc2 else bool(variant)
        ours_ += weights if is_ours else both + weights
        composed += a_pass(block, columns)  # the gradient of the bias
    composed += a_pass(block, NORM_BACKWARD * c).times(2) + a_pass(block, 3 * hidden)
    # Both of LayerNorm's kernels leave sums of 3 C columns in float32, one for each program.
    sums = block._replace(tokens=1, images=NORM_BACKWARD_PROGRAMS)
    ours_ += Cost(memory_pass(sums, 2 * 2 * 3 * c), SUMS_LAUNCHES)
    return ours_, composed


def fusion_forward(block: Block) -> tuple[Cost, Cost]:
    """Ours, and the composition, which computes keys and values of all of a branch's patches."""
    c = block.channels
    composed = a_pass(block, 2 * c) + products(block, 2 * c, c) + a_pass(block, 2 * c)
    return ours("cross_attention_fusion", "forward", block), composed + Cost(0, FUSION_STARTS)


def fusion_backward(block: Block) -> tuple[Cost, Cost]:
    c = block.channels
    composed = products(block, c, 2 * c) + products(block, 2 * c, c)
    composed += a_pass(block, 4 * c) + a_pass(block, 2 * c) + a_pass(block, NORM_BACKWARD * c)
    ours_ = ours("cross_attention_fusion", "backward", block)
    starts = Cost(0, FUSION_STARTS)  # gradients of weights, in both
    return ours_ + starts, composed + starts + starts


def embedding(config: Config, blocks: tuple[Block, Block], training: bool) -> Cost:
    """The resize, patches, their products, and tokens: CLS before them, positions added."""
    cost = Cost()
    for block, patch, (rows, columns) in zip(
        blocks, config.patch_sizes, config_grids(config), strict=True
    ):
        pixels = 3 * patch**2
        image = block._replace(tokens=rows * columns)
        cost += a_pass(image, pixels)  # the resize reads one branch's image and writes the other's
        cost += a_pass(image, 2 * pixels)  # a row for each patch
        cost += products(image, block.channels, pixels, 1 + training)
        cost += a_pass(block, 2 * block.channels).times(2 + training)
    return cost


def blocks_of(name: str, images: int) -> tuple[Config, tuple[Block, Block]]:
    config = named_config(f"crossvit_{name}")
    assert isinstance(config, Config)
    small, large = (
        Block(name, channels, rows * columns + 1, images)
        for channels, (rows, columns) in zip(config.dims, config_grids(config), strict=True)
    )
    return config, (small, large)


def model(
    name: str, images: int, training: bool, variant: str = ""
) -> Iterator[tuple[str, Cost, Cost]]:
    """The parts of a model: ours, and the composition."""
    config, blocks = blocks_of(name, images)
    forward = functools.partial(block_forward, variant=variant, training=training)
    passes = [(forward, fusion_forward)]
    if training:
        passes.append((functools.partial(block_backward, variant=variant), fusion_backward))
    for branch, block, depth in zip("SL", blocks, config.depths, strict=True):
        for label, step, count in (("blocks", 0, depth), ("fusions", 1, 1)):
            halves = [functions[step](block) for functions in passes]
            sums = (sum(costs, Cost()) for costs in zip(*halves, strict=True))
            ours_, composed = (cost.times(count * config.num_blocks) for cost in sums)
            yield f"{label} {branch}", ours_, composed
    cost = embedding(config, blocks, training)
    yield "embedding", cost, cost
    heads = Cost(0, 6 * (1 + 2 * training))
    yield "heads", heads, heads


def rows(images: list[int], variant: str = "") -> Iterator[dict[str, Any]]:
    for name in MODELS:
        for batch in images:
            for training in (False, True):
                parts = list(model(name, batch, training, variant))
                ours_, composed = (
                    sum((part[side] for part in parts), Cost()).with_starts / 1000
                    for side in (1, 2)
                )
                yield {
                    "blocks": f"triton{variant}",
                    "model": name,
                    "images": batch,
                    "pass": "training" if training else "inference",
                    "ours_ms": round(ours_, 3),
                    "composition_ms": round(composed, 3),
                    "ratio": round(composed / ours_, 3),
                    "parts": {
                        label: [round(side.with_starts / 1000, 3) for side in sides]
                        for label, *sides in parts
                    },
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="64,256", help="batches, of 1, 64 and 256")
    parser.add_argument("--gluon", action="store_true", help="blocks of triton:gluon")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    print(f"{'model':6} {'images':>6} {'pass':9} {'ours':>8} {'torch':>8} ratio  modelled ms, H200")
    found = []
    images = [int(batch) for batch in options.images.split(",")]
    if not set(images) <= {1, 64, 256}:
        parser.error(f"--images: expected some of 1, 64 and 256, found {options.images}")
    if options.gluon and images != [256]:
        parser.error("--gluon: only 256 images are modelled")
    for row in rows(images, ":gluon" if options.gluon else ""):
        found.append(row)
        print(
            f"{row['model']:6} {row['images']:6} {row['pass']:9} {row['ours_ms']:8.2f}"
            f" {row['composition_ms']:8.2f} {row['ratio']:5.2f}",
            flush=True,
        )
    if options.json:
        write(options.json, found)


if __name__ == "__main__":
    main()

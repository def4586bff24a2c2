"""Compare steps of a transformer block with torch's composition of them, by the cycle model.

    python bench/library_model.py [--json FILE]

256 images in bfloat16 on an H200: our kernels beside LayerNorm, cuBLAS, flash attention and
elementwise kernels. Nothing here is measured. Of the composition,

- a pass over memory is its bytes at the bandwidth that a copy reaches;
- a product of cuBLAS is modelled as the plain one that bench/model_validation.py holds to what is
  published of cuBLAS (128 x 128, the best of its tiles at these sizes; 128 x 64 for C = 192);
- flash attention is modelled as the forward pass that it holds to the FlashAttention-3 paper.

The tables of layernorm_msa/configs.py and layernorm_ffn/configs.py are from this program.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import model_validation as plain
import torch

from crossvit_kernels import supported
from crossvit_kernels.inspect.ahead_of_time import DTYPES
from crossvit_kernels.inspect.model.estimate import estimate
from crossvit_kernels.inspect.model.gpus import H200
from crossvit_kernels.inspect.model.workloads import MODELS, workloads
from crossvit_kernels.ops.common.configs import VARIANTS
from crossvit_kernels.ops.layernorm_ffn.configs import keeps_hidden

IMAGES = 256


class Block(NamedTuple):
    """A block of a model: rows of tokens by channels."""

    model: str
    channels: int
    tokens: int
    images: int = IMAGES

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def hidden(self) -> int:
        return MODELS[self.model].hidden_ratio * self.channels


#: Of CrossViT-15.
BLOCKS = (Block("15", 192, 401), Block("15", 384, 197))


def ours(
    block: Block, operation: str, direction: str, variant: str, keep: str = "fast"
) -> list[tuple[str, float]]:
    """Our kernels of an operation in order, and their modelled microseconds."""
    with VARIANTS.choose(variant):
        (workload,) = (
            w
            for w in workloads(block.model, DTYPES["bf16"], block.images)
            if (w.operation.name, w.direction, w.channels) == (operation, direction, block.channels)
        )
        launches = workload._replace(keep=keep).launches("triton", H200)
        return [(launch.kernel.name, estimate(launch, H200).microseconds) for launch, _ in launches]


def memory_pass(block: Block, columns: int) -> float:
    """Microseconds to move so many columns of all rows, in 16 bits."""
    return 2 * block.rows * columns / (H200.dram_bytes_per_second * H200.achievable_dram) * 1e6


def product(block: Block, columns: int, terms: int) -> float:
    """Microseconds of a plain product [rows, terms] times [terms, columns].

    It is made in whole tiles; of what they compute in vain, nothing is counted.
    """
    width, step = 128 if columns % 128 == 0 else 64, 64
    rows, padded = -(-block.rows // 128) * 128, -(-columns // width) * width
    useful = block.rows / rows * columns / padded * terms / (-(-terms // step) * step)
    grid = (rows // 128 * (padded // width),)
    shapes = (rows, terms), (terms, padded), (rows, padded)
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    parameters = [*tensors, rows, padded, terms]
    constants = [128, width, step, 8]
    warps = 8 if width == 128 else 4
    launch = plain.compiled(H200, plain.matmul_kernel, parameters, constants, grid, warps, 3)
    return estimate(launch, H200).microseconds * useful


def flash_attention(block: Block) -> float:
    """Microseconds of attention over tokens padded to its tiles."""
    heads = MODELS[block.model].heads
    padded, head_dim = -(-block.tokens // 128) * 128, block.channels // heads
    tensors = [
        torch.empty(block.images * heads, padded, head_dim, dtype=torch.bfloat16, device="meta")
        for _ in range(4)
    ]
    launch = plain.compiled(
        H200,
        plain.attention_kernel,
        [*tensors, padded, 0.125],
        [128, 64, head_dim],
        (padded // 128, block.images * heads),
        4,
        3,
    )
    return estimate(launch, H200).microseconds


def steps(block: Block) -> Iterator[tuple[str, float, float]]:
    """Steps by the names of their tables: modelled microseconds of ours and of the library's."""
    c, hidden = block.channels, block.hidden
    norm, residual = memory_pass(block, 2 * c), memory_pass(block, 3 * c)
    *before, (_, attention), (_, projection) = ours(block, "layernorm_msa", "forward", "split")
    yield "QKV", sum(us for _, us in before), norm + product(block, 3 * c, c)
    yield "SELF_ATTENTION", attention, flash_attention(block)
    yield "PROJECTION", projection, product(block, c, c) + residual
    *before, (_, fc2) = ours(block, "layernorm_ffn", "forward", "split")
    fc1 = product(block, hidden, c)
    yield "FC1", sum(us for _, us in before), norm + fc1 + memory_pass(block, 2 * hidden)
    yield "FC2", fc2, product(block, c, hidden) + residual
    # One kernel for all products, or cuBLAS's before one that reads its result.
    for step, keep in (("HIDDEN_GRADIENT", "lean"), ("KEPT_HIDDEN_GRADIENT", "fast")):
        if step == "HIDDEN_GRADIENT" or keeps_hidden(c, 2):
            in_kernel, behind_library = (
                dict(ours(block, "layernorm_ffn", "backward", variant, keep))["ffn_hidden_backward"]
                for variant in ("split", "library")
            )
            yield step, in_kernel, behind_library + fc1


def write(path: Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write modelled rows as JSON, with what they are and depend on."""
    result = {
        "what": "a model of machine code, not a measurement",
        "date": datetime.date.today().isoformat(),
        "versions": {name: supported.installed_version(name) for name in ("torch", "triton")},
        "gpu": H200.name,
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args()
    print(f"{'C':>4} {'step':16} {'ours':>7} {'library':>7}  modelled us on an H200")
    rows = []
    for block in BLOCKS:
        for step, our_us, library_us in steps(block):
            print(f"{block.channels:4} {step:16} {our_us:7.1f} {library_us:7.1f}", flush=True)
            figures = {"ours": round(our_us, 1), "library": round(library_us, 1)}
            rows.append({"step": step, "channels": block.channels, **figures})
    if options.json:
        write(options.json, rows, images=IMAGES)


if __name__ == "__main__":
    main()

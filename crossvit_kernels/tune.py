"""Measure the Triton kernels' configurations on this GPU: ``python -m crossvit_kernels.tune``.

Times every candidate on the given sizes and writes the fastest for each kernel, width and element
size to a JSON file, under the device's name. The library loads that file when it first runs a
kernel: the one that CROSSVIT_KERNELS_TUNED names, else crossvit_kernels/tuned.json in the user's
cache. Existing entries for other widths and devices are kept. When a configuration changes, results
stay within the same error bounds but are not bitwise the same.

With ``--model`` it calibrates a model, on a GPU or a CPU: ``--model --help`` has its options.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crossvit_kernels import functional
from crossvit_kernels.calibration import command
from crossvit_kernels.gpu import launcher, tables, tuned
from crossvit_kernels.gpu.tables import Table
from crossvit_kernels.ops.attention_core import configs as core
from crossvit_kernels.ops.attention_core.configs import TokenPass
from crossvit_kernels.ops.common import configs as layers
from crossvit_kernels.ops.common.configs import RowTable, RowTile
from crossvit_kernels.ops.cross_attention import configs as fusion
from crossvit_kernels.ops.cross_attention.reference import FusionWeights
from crossvit_kernels.ops.layernorm_ffn import configs as ffn
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa import configs as msa
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights

#: Launches the kernel once.
Run = Callable[[], object]
Config = TokenPass | RowTile


class InBlock(NamedTuple):
    """How to run a kernel of a transformer block."""

    table: RowTable
    half: str
    variant: str
    is_backward: bool
    keep: str = "fast"


BLOCK_KERNELS = {
    kernel.table.name: kernel
    for kernel in (
        InBlock(layers.NORM_LINEAR, "msa", "split", False),
        InBlock(layers.LINEAR, "ffn", "split", False),
        InBlock(layers.NORM_BACKWARD, "ffn", "split", True),
        InBlock(msa.ATTENTION, "msa", "split", False),
        InBlock(msa.BACKWARD_QUERIES, "msa", "split", True),
        InBlock(msa.BACKWARD_KEYS, "msa", "split", True),
        InBlock(ffn.FFN, "ffn", "fused", False),
        InBlock(ffn.HIDDEN_BACKWARD, "ffn", "auto", True, "lean"),
        InBlock(ffn.KEPT_HIDDEN_BACKWARD, "ffn", "auto", True),
    )
}
PASSES = {
    table.name: table for table in (core.FORWARD, core.BACKWARD, fusion.FORWARD, fusion.BACKWARD)
}
KERNELS = (*PASSES, *BLOCK_KERNELS)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def candidates(table: Table[Any], sm: int, width: int, element_size: int) -> list[Config]:
    """Return the table's configuration first; row tiles then by how little they differ from it."""
    preferred = table.preferred(sm, width, element_size)
    if table is layers.NORM_BACKWARD:
        return _whole_rows(preferred)
    if isinstance(preferred, RowTile):
        return _row_tiles(preferred)
    chunks = [c for c in (32, 64, 128) if c < 2 * width] or [32]
    varied = [
        dataclasses.replace(preferred, chunk=c, tokens=t, num_warps=w, num_stages=s)
        for c in chunks
        for t in (16, 32, 64, 128)
        for w in (4, 8)
        for s in (1, 2, 3, 4)
        # Beyond these a program has too few registers, or too little shared memory.
        if t * width * element_size * s <= 200_000 and t * width <= 128 * 32 * w
    ]
    return [preferred, *(c for c in varied if c != preferred)]


def _whole_rows(table: RowTile) -> list[Config]:
    """Candidates of a kernel that holds whole rows, whose other sizes it does not read."""
    varied = [
        dataclasses.replace(table, rows=rows, num_warps=num_warps)
        for num_warps in (1, 2, 4)
        for rows in (1, 2, 4, 8)
    ]
    return [table, *(config for config in varied if config != table)]


def _row_tiles(table: RowTile) -> list[Config]:
    varied = [
        RowTile(rows, columns, chunk, num_warps, num_stages)
        for rows in (32, 64, 128)
        for columns in (16, 32, 64, 128)
        for chunk in (32, 64, 128)
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3, 4)
    ]

    def changes(config: RowTile) -> int:
        fields = zip(dataclasses.astuple(config), dataclasses.astuple(table), strict=True)
        return sum(a != b for a, b in fields)

    return [table, *sorted((c for c in varied if c != table), key=changes)]


def main(
    arguments: Sequence[str] | None = None, measure: Callable[[Run], float] | None = None
) -> int:
    """Tune; measure returns the seconds of a run, by default on the GPU with rotated inputs."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(word.split("=")[0] == "--model" for word in given):
        return command.main(given)
    options = _parse(given)
    reason = launcher.missing()
    if reason:
        print(f"tune: {reason}", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.output or tuned.file()
    for channels in options.channels:
        for kernel in options.kernels:
            table, size = table_of(kernel), _DTYPES[options.dtype].itemsize
            if width_of(kernel, channels, options.heads) > table.widest(size):
                continue
            if table is ffn.KEPT_HIDDEN_BACKWARD and not ffn.keeps_hidden(channels, size):
                continue
            entry = _tune(kernel, channels, options, device, measure or _seconds)
            _add(path, entry)
    print(f"written to {path}")
    return 0


def _tune(
    kernel: str,
    channels: int,
    options: argparse.Namespace,
    device: torch.device,
    measure: Callable[[Run], float],
) -> tuple[str, Config]:
    """Return the key and fastest configuration of a kernel."""
    dtype = _DTYPES[options.dtype]
    heads = heads_of(channels, options.heads)
    batch, tokens = options.batch, options.tokens
    table, width = table_of(kernel), width_of(kernel, channels, options.heads)
    if kernel in BLOCK_KERNELS:
        run = _block(BLOCK_KERNELS[kernel], batch, tokens, channels, heads, dtype, device)
        table = BLOCK_KERNELS[kernel].table.for_rows(batch * tokens, dtype.itemsize)
    else:
        run = _pass(kernel, batch, tokens, channels, heads, dtype, device)
    name = table.name
    configs = candidates(table, tables.sm(device), width, dtype.itemsize)
    tried: list[tuple[float, Config]] = []
    for config in configs[: options.limit]:
        with table.only(config):
            try:
                seconds = measure(run)
            except Exception as error:
                reason = str(error).strip().splitlines()[:1]
                print(f"  {config}: {type(error).__name__}: {reason}", flush=True)
                continue
        tried.append((seconds, config))
        print(f"  {config}: {seconds * 1e6:.1f} us", flush=True)
    if not tried:
        raise RuntimeError(f"{name}, C {channels}: no configuration runs")
    seconds, best = min(tried, key=lambda pair: pair[0])
    print(f"{name}, C {channels}: {tried[0][0] / seconds:.2f}x the table's: {best}", flush=True)
    return tuned.key(name, tables.device_name(device), width, dtype.itemsize), best


def table_of(kernel: str) -> Table[Any]:
    """Return the table of a kernel by name."""
    return PASSES[kernel] if kernel in PASSES else BLOCK_KERNELS[kernel].table


def heads_of(channels: int, heads: int | None) -> int:
    """Return the requested heads, or one for every 64 channels."""
    return heads or max(channels // 64, 1)


def width_of(kernel: str, channels: int, heads: int | None) -> int:
    """Return the width that keys the kernel's table: C, or the head dimension."""
    of_a_head = (msa.ATTENTION, msa.BACKWARD_QUERIES, msa.BACKWARD_KEYS)
    alone = kernel in [table.name for table in of_a_head]
    return channels // heads_of(channels, heads) if alone else channels


def _input_sets(bytes_of_tokens: int, device: torch.device) -> int:
    """Return how many inputs to rotate, together larger than any L2."""
    return max(1, min(16, 2**28 // bytes_of_tokens)) if device.type == "cuda" else 1


def _block(
    where: InBlock,
    batch: int,
    tokens: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Run:
    """Return a run of half a transformer block, forward or backward."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    c, hidden = channels, 3 * channels
    kind: Any = MsaWeights if where.half == "msa" else FfnWeights
    terms = c if where.half == "msa" else hidden
    shapes = [(c,), (c,), (hidden, c), (hidden,), (c, terms), (c,)]
    weights = kind(*(random(*shape) * 0.05 for shape in shapes))

    def call(x: torch.Tensor) -> torch.Tensor:
        if where.half == "msa":
            return functional.layernorm_msa(x, weights, heads, backend="triton")
        return functional.layernorm_ffn(x, weights, backend="triton", keep=where.keep)

    count = _input_sets(batch * tokens * channels * dtype.itemsize, device)
    xs = [random(batch, tokens, channels).requires_grad_(where.is_backward) for _ in range(count)]
    run = _rotate([functools.partial(call, x) for x in xs], where.is_backward)

    def in_variant() -> object:
        with layers.VARIANTS.choose(where.variant):
            return run()

    return in_variant


def _pass(
    kernel: str,
    batch: int,
    tokens: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Run:
    """Return a run of attention_core or a fusion, forward or backward."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    is_fusion = PASSES[kernel] in (fusion.FORWARD, fusion.BACKWARD)
    is_backward = PASSES[kernel] in (core.BACKWARD, fusion.BACKWARD)
    matrix, vector = (channels, channels), (channels,)
    weights = FusionWeights(
        *(
            random(*(matrix if name.endswith("weight") and "norm" not in name else vector)) * 0.05
            for name in FusionWeights._fields
        )
    )
    calls: list[Callable[[], torch.Tensor]] = []
    call = functional.cross_attention_fusion
    for _ in range(_input_sets(batch * tokens * channels * dtype.itemsize, device)):
        x = random(batch, tokens, channels).requires_grad_(is_backward)
        u = random(batch, *(vector if is_fusion else (heads, channels))).requires_grad_(is_backward)

        if is_fusion:
            calls.append(functools.partial(call, u, x, weights, heads, backend="triton"))
        else:
            calls.append(functools.partial(_core, u, x))
    return _rotate(calls, is_backward)


def _core(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.attention_core(u, x, backend="triton")[0]


def _rotate(calls: list[Callable[[], torch.Tensor]], is_backward: bool) -> Run:
    if is_backward:
        # Graphs are kept: only backward is measured, and forward may have run in any configuration.
        results: list[torch.Tensor] = []

        def backward(i: int) -> None:
            if not results:
                results.extend(call() for call in calls)
            results[i].backward(torch.ones_like(results[i]), retain_graph=True)

        runs: list[Run] = [lambda i=i: backward(i) for i in range(len(calls))]  # type: ignore[misc]
    else:
        runs = list(calls)
    rotation = _cycle(runs)
    return lambda: next(rotation)()


def _cycle(runs: list[Run]) -> Iterator[Run]:
    while True:
        yield from runs


def _seconds(run: Run, repeats: int = 30) -> float:
    """Return the median time of a run, after a few warm-up runs that compile."""
    for _ in range(5):
        run()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start_event, end_event in pairs:
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e-3


def _add(path: Path, entry: tuple[str, Config]) -> None:
    """Add an entry to the file, which is replaced atomically."""
    key, config = entry
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[key] = dataclasses.asdict(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m crossvit_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    add = parser.add_argument
    add("--channels", type=numbers, default=[96, 128, 192, 224, 256, 384, 448, 768])
    add("--heads", type=int, help="queries; one for every 64 channels by default")
    add("--kernels", type=lambda text: text.split(","), default=list(KERNELS))
    add("--dtype", choices=_DTYPES, default="bf16")
    add("--batch", type=int, default=256)
    add("--tokens", type=int, default=401)
    add("--limit", type=int, help="maximum number of candidates to try")
    add("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if set(options.kernels) - set(KERNELS):
        parser.error(f"--kernels: expected some of {KERNELS}")
    return options


if __name__ == "__main__":
    sys.exit(main())

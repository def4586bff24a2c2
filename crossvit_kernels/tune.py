"""Measure the Triton kernels' configurations on this GPU: ``python -m crossvit_kernels.tune``.

Every candidate is timed on the sizes given, and the fastest of each kernel, width and element size
is written to a JSON file, under the device's name. The library loads that file when it first runs a
kernel: the one that CROSSVIT_KERNELS_TUNED names, else crossvit_kernels/tuned.json in the user's
cache. What a file holds already for other widths and devices stays. Results keep within the same
error bounds, but not bit for bit, when a configuration changes.
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

import torch

from crossvit_kernels import functional
from crossvit_kernels.gpu import configurations, launch, tuned
from crossvit_kernels.gpu.configurations import TokenPass
from crossvit_kernels.ops.cross_attention.weights import FusionWeights

#: A run: launches the kernel once.
Run = Callable[[], object]
KERNELS = ("forward", "backward", "fusion forward", "fusion backward")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def candidates(kernel: str, chip: int, channels: int, element_size: int) -> list[TokenPass]:
    """The table's configuration first."""
    table = configurations.from_table(kernel, chip, channels, element_size)
    chunks = [c for c in (32, 64, 128) if c < 2 * channels] or [32]
    varied = [
        dataclasses.replace(table, chunk=c, tokens=t, num_warps=w, num_stages=s)
        for c in chunks
        for t in (16, 32, 64, 128)
        for w in (4, 8)
        for s in (1, 2, 3, 4)
        # Beyond these a program has too few registers, or too little shared memory.
        if t * channels * element_size * s <= 200_000 and t * channels <= 128 * 32 * w
    ]
    return [table, *(c for c in varied if c != table)]


def main(
    arguments: Sequence[str] | None = None, measure: Callable[[Run], float] | None = None
) -> int:
    """measure: seconds that a run takes; by default on the GPU, with rotated inputs."""
    options = _parse(arguments)
    reason = launch.missing()
    if reason:
        print(f"tune: {reason}", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.output or tuned.file()
    for channels in options.channels:
        for kernel in options.kernels:
            found = _tune(kernel, channels, options, device, measure or _seconds)
            _add(path, found)
    print(f"written to {path}")
    return 0


def _tune(
    kernel: str,
    channels: int,
    options: argparse.Namespace,
    device: torch.device,
    measure: Callable[[Run], float],
) -> tuple[str, TokenPass]:
    """The key and fastest configuration of a kernel."""
    dtype = _DTYPES[options.dtype]
    heads = options.heads or max(channels // 64, 1)
    run = _run(kernel, options.batch, options.tokens, channels, heads, dtype, device)
    found = candidates(kernel, launch.chip(device), channels, dtype.itemsize)
    tried: list[tuple[float, TokenPass]] = []
    for config in found[: options.limit]:
        with configurations.only(config):
            try:
                seconds = measure(run)
            except Exception as error:
                reason = str(error).strip().splitlines()[:1]
                print(f"  {config}: {type(error).__name__}: {reason}", flush=True)
                continue
        tried.append((seconds, config))
        print(f"  {config}: {seconds * 1e6:.1f} us", flush=True)
    if not tried:
        raise RuntimeError(f"{kernel}, C {channels}: no configuration runs")
    seconds, best = min(tried, key=lambda pair: pair[0])
    print(f"{kernel}, C {channels}: {tried[0][0] / seconds:.2f}x the table's: {best}", flush=True)
    name = launch.device_name(device)
    return tuned.key(kernel, name, channels, dtype.itemsize), best


def _run(
    kernel: str,
    batch: int,
    tokens: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Run:
    """Forward or backward on the next of several inputs, together larger than any L2."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    bytes_of_tokens = batch * tokens * channels * dtype.itemsize
    count = max(1, min(16, 2**28 // bytes_of_tokens)) if device.type == "cuda" else 1
    is_fusion, is_backward = kernel.startswith("fusion"), kernel.endswith("backward")
    matrix, vector = (channels, channels), (channels,)
    weights = FusionWeights(
        *(
            random(*(matrix if name.endswith("weight") and "norm" not in name else vector)) * 0.05
            for name in FusionWeights._fields
        )
    )
    calls: list[Callable[[], torch.Tensor]] = []
    fusion = functional.cross_attention_fusion
    for _ in range(count):
        x = random(batch, tokens, channels).requires_grad_(is_backward)
        u = random(batch, *(vector if is_fusion else (heads, channels))).requires_grad_(is_backward)

        if is_fusion:
            calls.append(functools.partial(fusion, u, x, weights, heads, backend="triton"))
        else:
            calls.append(functools.partial(_core, u, x))
    return _rotate(calls, is_backward)


def _core(u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return functional.attention_core(u, x, backend="triton")[0]


def _rotate(calls: list[Callable[[], torch.Tensor]], is_backward: bool) -> Run:
    if is_backward:
        # Graphs are kept: what is measured is backward alone, whatever forward ran in.
        results: list[torch.Tensor] = []

        def backward(i: int) -> None:
            if not results:
                results.extend(call() for call in calls)
            results[i].backward(torch.ones_like(results[i]), retain_graph=True)

        runs: list[Run] = [lambda i=i: backward(i) for i in range(len(calls))]  # type: ignore[misc]
    else:
        runs = list(calls)
    turns = _cycle(runs)
    return lambda: next(turns)()


def _cycle(runs: list[Run]) -> Iterator[Run]:
    while True:
        yield from runs


def _seconds(run: Run, repeats: int = 30) -> float:
    """Median of events around runs, after the compilation and a few more."""
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


def _add(path: Path, found: tuple[str, TokenPass]) -> None:
    """To the file, which is replaced as a whole or not at all."""
    key, config = found
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
        return [int(part) for part in text.split(",")]

    add = parser.add_argument
    add("--channels", type=numbers, default=[96, 128, 192, 224, 256, 384, 448, 768])
    add("--heads", type=int, help="score rows; one for every 64 channels by default")
    add("--kernels", type=lambda text: text.split(","), default=list(KERNELS))
    add("--dtype", choices=_DTYPES, default="bf16")
    add("--batch", type=int, default=256)
    add("--tokens", type=int, default=401)
    add("--limit", type=int, help="try only so many candidates")
    add("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if set(options.kernels) - set(KERNELS):
        parser.error(f"--kernels: expected some of {KERNELS}")
    return options


if __name__ == "__main__":
    sys.exit(main())

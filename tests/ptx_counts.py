"""Compares what the executor of PTX counts with what the cycle model finds in the machine code.

    python tests/ptx_counts.py triton layernorm_ffn_split --sm 80 --dtype bf16
    python tests/ptx_counts.py cuda attention_core

prints a JSON object a launch: for each count, the executor's and the model's.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parent))

import ptx_launches
from ptx_cases import CASES, DTYPES

from crossvit_kernels import extension
from crossvit_kernels.inspect.model import cuda_launch, sass, triton_launch
from crossvit_kernels.inspect.model.emulator import Emulator
from crossvit_kernels.inspect.model.launch import Launch
from crossvit_kernels.inspect.model.mbarriers import PASSED_BY

#: Counts of the executor, and the instructions of the machine code that they are compared with.
INSTRUCTIONS = {
    "special functions": ("MUFU",),
    "tensor-core products": ("HMMA", "HGMMA"),
    "shfl": ("SHFL",),
    "ldmatrix": ("LDSM",),
    "stmatrix": ("STSM",),
    "barriers": ("BAR",),
    "atom": ("ATOMG", "ATOM", "RED"),
}
_NAME_OF = {opcode: name for name, opcodes in INSTRUCTIONS.items() for opcode in opcodes}
_SHARED = ("LDS", "STS", "LDSM", "STSM", "LDGSTS")
_LOADS, _STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")
#: What is compared.
COUNTS = (*INSTRUCTIONS, "sectors from L2", "sectors stored", "shared passes")


def of_model(launch: Launch) -> tuple[dict[str, int], dict[str, int]]:
    """Return what the model finds that all warps of a launch do, and its guessed branches."""
    emulator = Emulator(launch.kernel, launch.constants(), unlikely=launch.unlikely)
    blocks = [launch.block(n) for n in range(launch.num_blocks)]
    trace = emulator.run(blocks, launch.num_warps)
    counts: collections.Counter[str] = collections.Counter()
    for step in (step for block in trace.warps for path in block for step in path):
        i = launch.kernel.instructions[step.instruction]
        counts["instructions"] += 1
        if i.opcode in _NAME_OF and step.arrivals != PASSED_BY:
            counts[_NAME_OF[i.opcode]] += 1
        if i.opcode in _LOADS:
            counts["sectors from L2"] += step.sectors
        if i.opcode in _STORES:
            counts["sectors stored"] += step.sectors
        of_shared = i.opcode in ("LD", "ST") and step.tensor < 0  # generic addresses
        if i.opcode in _SHARED or of_shared:
            counts["shared passes"] += step.wavefronts
    return counts, dict(trace.unknown_branches)


def _of_triton(launch: Any, sm: int) -> Launch:
    cubin, grid, num_warps, parameters = launch
    (kernel,) = sass.disassemble(cubin).values()
    unlikely = triton_launch.unlikely_lines()
    return Launch(kernel, grid, num_warps, 0, 0, parameters, (), sm, unlikely=unlikely)


def _of_cuda(launch: extension.RecordedLaunch) -> Launch:
    name = extension.cuda_architectures()[-1]
    architecture = int(re.match(r"\d+", name)[0])  # type: ignore[index]
    kernel, _ = cuda_launch._code(architecture, launch.symbol)
    num_warps = math.prod(launch.block) // 32
    rest = launch.parameters, (), architecture, launch.cluster
    return Launch(kernel, launch.grid, num_warps, 0, launch.shared_bytes, *rest)


def compare(backend: str, case: str, sm: int, dtype: str) -> list[dict[str, Any]]:
    """Run a case; return each launch's kernel, counts as (executor's, model's), and guesses."""
    _, start = ptx_launches.run_case(backend, case, sm, dtype, 0)
    rows = []
    for recorded, counters in start.launches:
        launch = _of_triton(recorded, sm) if backend == "triton" else _of_cuda(recorded)
        modelled, guessed = of_model(launch)
        counts = {name: (counters[name], modelled[name]) for name in COUNTS}
        executed = sum(n for name, n in counters.items() if name in _CLASSES)
        rows.append(
            {
                "kernel": launch.kernel.name,
                **{name: pair for name, pair in counts.items() if any(pair)},
                "instructions": (executed, modelled["instructions"]),
                "votes": (counters["votes that hold"], counters["votes"]),
                "guessed": guessed,
            }
        )
    return rows


#: Classes of instructions that the executor counts.
_CLASSES = (
    *("integer", "floating point", "special functions", "ld", "st", "atom", "red", "cp"),
    *("ldmatrix", "stmatrix", "mma", "wgmma", "shfl", "branches", "barriers", "waits"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backend", choices=CASES)
    parser.add_argument("cases", nargs="+", metavar="CASE")
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    for case in options.cases:
        for row in compare(options.backend, case, options.sm, options.dtype):
            print(json.dumps({"case": case, **row}), flush=True)


if __name__ == "__main__":
    main()

"""Reports on the extension's kernels of transformer blocks, as the operations launch them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from crossvit_kernels import extension
from crossvit_kernels.extension import DeviceLimits, Multiprocessors, RecordedLaunch
from crossvit_kernels.inspect import ahead_of_time, extension_code, machine_code
from crossvit_kernels.inspect.ahead_of_time import Dtypes, empty, empty_weights
from crossvit_kernels.inspect.machine_code import Report
from crossvit_kernels.ops.layernorm_ffn import cuda as ffn
from crossvit_kernels.ops.layernorm_ffn.reference import SHAPES as FFN_SHAPES
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa import cuda as msa
from crossvit_kernels.ops.layernorm_msa.reference import SHAPES as MSA_SHAPES
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights

NAMES = (
    *("layer_norm_forward", "layer_norm_backward", "linear"),
    *("attention_forward", "attention_backward_queries", "attention_backward_keys"),
)
_ELEMENT = r"(?:f|6__half|13__nv_bfloat16)"
#: Of symbols: name, what distinguishes kernels of that name, and how that is said.
_SYMBOLS: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (re.compile(rf"\d(attention_\w+?)INS\w*?AttentionPlanI{_ELEMENT}Li(\d+)E"), "d <= {0}".format),
    (
        re.compile(rf"\d(layer_norm_\w+?)_kernelI{_ELEMENT}Li(\d)E"),
        lambda vectors: f"C <= {128 * int(vectors)}",
    ),
    (
        re.compile(rf"\d(linear)_kernelI{_ELEMENT}LNS_6LinearE(\d)E"),
        lambda kind: ("a W^T", "f(a W^T)", "a W", "a W f'")[int(kind)],
    ),
)
_EPS = 1e-6
_ADDRESS = 1 << 12  # that kernels are given for all tensors


def reports(
    arch: int, dtypes: Collection[str], blocks: Sequence[tuple[int, int, int]], name: str
) -> Iterator[Report]:
    """Report on the kernels that blocks of these (C, heads, hidden units) launch.

    Args:
        arch: Compute capability, 90 for 9.0.
        dtypes: Names in ahead_of_time.DTYPES; autocast launches the kernels of bf16.
        blocks: Sizes of transformer blocks.
        name: What names of kernels contain.
    """
    if not any(name in known for known in NAMES):
        return
    codes = machine_code.read(extension.location(), extension_code.targets()[arch])
    for dtype in sorted(set(dtypes) - {"autocast"}):
        launches = {r.symbol: r for size in blocks for r in _launches(arch, dtype, *size)}
        for symbol, launch in launches.items():
            kernel, config = described(symbol)
            if name in kernel:
                yield machine_code.report(
                    f"{kernel} (CUDA)",
                    f"{dtype} {config}",
                    arch,
                    codes[symbol],
                    launch.shared_bytes,
                    math.prod(launch.block) // 32,
                )


def described(symbol: str) -> tuple[str, str]:
    """Return a kernel's name and what it is compiled for, from its symbol in the binary."""
    for pattern, say in _SYMBOLS:
        if match := pattern.search(symbol):
            return match[1], say(match[2])
    raise LookupError(f"{symbol}: no kernel of a transformer block")


def _launches(
    arch: int, dtype: str, channels: int, heads: int, hidden: int
) -> list[RecordedLaunch]:
    limits = DeviceLimits(
        Multiprocessors(1, arch >= 90), machine_code.SHARED_BYTES_OF_PROGRAM[arch]
    )
    dtypes = ahead_of_time.DTYPES[dtype]
    return extension.recorded_launches(
        lambda: _run(dtypes, channels, heads, hidden), limits, lambda t: _ADDRESS
    )


def _run(dtypes: Dtypes, channels: int, heads: int, hidden: int) -> None:
    """Run both halves forward and backward, with all gradients."""
    x, sizes = empty((1, 16, channels), dtypes.tokens), {"C": channels, "F": hidden}
    msa_weights = MsaWeights(*empty_weights(MSA_SHAPES, sizes, dtypes))
    ffn_weights = FfnWeights(*empty_weights(FFN_SHAPES, sizes, dtypes))
    halves: tuple[tuple[Any, Any], ...] = (
        (msa, MsaInputs(x, msa_weights, heads, None, None)),
        (ffn, FfnInputs(x, ffn_weights, None)),
    )
    for module, inputs in halves:
        y, saved = module.forward(inputs, _EPS, "fast")
        weights: Any = type(inputs.weights)
        wanted = inputs._replace(x=True, weights=weights(*[True] * len(inputs.weights)))
        module.backward([y], inputs, saved, _EPS, wanted)

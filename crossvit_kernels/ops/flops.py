"""Floating-point operations of each operator, for ``torch.utils.flop_counter.FlopCounterMode``.

As there, matrix products alone count, two operations a multiply-add, and it is the kernels' own
arithmetic that is counted: of a fusion, no keys and values (docs/derivation.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def _core(u: Shape, x: Shape, extra: Shape | None) -> int:
    """Scores and their sums: R rows over N tokens of C channels, each image."""
    (batch, num_tokens, channels), rows = x, u[1]
    return 4 * batch * rows * (num_tokens + (extra is not None)) * channels


def _attention_core_forward(u: Shape, x: Shape, mask: Any, extra: Any, *_: Any, **__: Any) -> int:
    return _core(u, x, extra)


def _attention_core_backward(
    dm: Any, dlse: Any, u: Shape, x: Shape, mask: Any, extra: Any, *_: Any, **__: Any
) -> int:
    """Scores again, dp, du and dx."""
    return 5 * _core(u, x, extra) // 2


def _fusion(cls: Shape, tokens: Shape, num_heads: int, way: int) -> int:
    """f, g, W_q, W_k, W_v and W_o for one row an image; tokens meet a row a head."""
    (batch, own), (_, num_tokens, channels) = cls, tokens
    layers = 2 * batch * (2 * own * channels + 4 * channels * channels)
    core = _core((1, num_heads, channels), (batch, num_tokens + 1, channels), None)
    return layers + core if way == 1 else 2 * layers + 5 * core // 2


def _fusion_forward(
    cls: Shape, tokens: Shape, w: Any, s: Any, num_heads: int, *_: Any, **__: Any
) -> int:
    return _fusion(cls, tokens, num_heads, 1)


def _fusion_backward(
    d: Any, cls: Shape, tokens: Shape, w: Any, s: Any, saved: Any, wanted: Any, num_heads: int,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _fusion(cls, tokens, num_heads, 2)


def _fusion_pair(*args: Any, **_: Any) -> int:
    return sum(_fusion(a[0], a[1], a[3], 1) for a in (args[:5], args[5:10]))


def _msa(x: Shape, way: int) -> int:
    """Projections of 4 C^2 a token; scores and their sums of 2 N C, backward five halves of it."""
    batch, num_tokens, channels = x
    layers = 8 * batch * num_tokens * channels * channels
    attention = 4 * batch * num_tokens * num_tokens * channels
    return layers + attention if way == 1 else 2 * layers + 5 * attention // 2


def _msa_forward(x: Shape, *_: Any, **__: Any) -> int:
    return _msa(x, 1)


def _msa_backward(dy: Any, x: Shape, *_: Any, **__: Any) -> int:
    return _msa(x, 2)


def _ffn(x: Shape, weights: Any) -> int:
    (batch, num_tokens, channels), hidden = x, weights[2][0]
    return 4 * batch * num_tokens * channels * hidden


def _ffn_forward(x: Shape, weights: Any, *_: Any, **__: Any) -> int:
    return _ffn(x, weights)


def _ffn_backward(dy: Any, x: Shape, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _ffn(x, weights)


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_core_forward": _attention_core_forward,
    "attention_core_backward": _attention_core_backward,
    "cross_attention_fusion_forward": _fusion_forward,
    "cross_attention_fusion_backward": _fusion_backward,
    "cross_attention_fusion_pair": _fusion_pair,
    "layernorm_msa_forward": _msa_forward,
    "layernorm_msa_backward": _msa_backward,
    "layernorm_ffn_forward": _ffn_forward,
    "layernorm_ffn_backward": _ffn_backward,
}


def tell_counters() -> None:
    """Register the formulas with torch's counter, where a program has imported it.

    It is slow to import, and imports Triton. A counter copies torch's formulas when it is made, so
    those that are counting are told as well.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    operators = {getattr(torch.ops.crossvit_kernels, name): f for name, f in _FORMULAS.items()}
    for operator, formula in operators.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if registry := getattr(getattr(mode, "counter", None), "flop_registry", None):
            registry.update(
                {op: module.flop_registry[op] for op in operators if op not in registry}
            )

"""Floating-point operations of each operator, for ``torch.utils.flop_counter.FlopCounterMode``.

As there, matrix products alone count, two operations a multiply-add, and it is the kernels' own
arithmetic that is counted: of a fusion, no keys and values (docs/derivation.md). Of a backward pass
those products count whose results are wanted, or lead to some that are.
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
    dm: Any, dlse: Any, u: Shape, x: Shape, mask: Any, extra: Any, m: Any, lse: Any,
    wanted: Sequence[bool], *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Scores again, dp, du and two for dx."""
    return (3 + 2 * wanted[1]) * _core(u, x, extra) // 2


def _fusion(cls: Shape, tokens: Shape, num_heads: int) -> tuple[int, int, int]:
    """f or g, one of W_q, W_k, W_v and W_o, for a row an image; tokens meet a row a head."""
    (batch, own), (_, num_tokens, channels) = cls, tokens
    core = _core((1, num_heads, channels), (batch, num_tokens + 1, channels), None)
    return 2 * batch * own * channels, 2 * batch * channels * channels, core


def _fusion_forward(
    cls: Shape, tokens: Shape, w: Any, s: Any, num_heads: int, *_: Any, **__: Any
) -> int:
    lift, square, core = _fusion(cls, tokens, num_heads)
    return 2 * lift + 4 * square + core


def _fusion_backward(
    d: Any, cls: Shape, tokens: Shape, w: Any, s: Any, saved: Any, wanted: Sequence[bool],
    num_heads: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Gradients of the inputs of all layers, the token pass, and the weights' that are wanted."""
    lift, square, core = _fusion(cls, tokens, num_heads)
    w_f, w_q, w_k, w_v, w_o, w_g = (wanted[i] for i in (4, 8, 10, 12, 14, 18))
    lifts, squares = 2 + w_f + w_g, 4 + w_q + w_k + w_v + w_o
    return lifts * lift + squares * square + (3 + 2 * wanted[1]) * core // 2


def _fusion_pair(*args: Any, **_: Any) -> int:
    return sum(_fusion_forward(*a[:3], None, a[3]) for a in (args[:5], args[5:10]))


def _msa(x: Shape) -> tuple[int, int]:
    """A projection of C^2 a token; scores and their sums of 2 N C."""
    batch, num_tokens, channels = x
    projection = 2 * batch * num_tokens * channels * channels
    return projection, 4 * batch * num_tokens * num_tokens * channels


def _msa_forward(x: Shape, *_: Any, **__: Any) -> int:
    projection, attention = _msa(x)
    return 4 * projection + attention


def _msa_backward(
    dy: Any, x: Shape, w: Any, s: Any, cls: Any, saved: Any, wanted: Sequence[bool],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    projection, attention = _msa(x)
    wants_x, wants_cls, *norm, w_qkv, b_qkv, w_out, _b_out = wanted
    before_qkv = wants_x or wants_cls or any(norm)
    through = before_qkv or w_qkv or b_qkv
    layers = w_out + through + 3 * (w_qkv + before_qkv)
    return layers * projection + through * 5 * attention // 2


def _ffn(x: Shape, weights: Any) -> int:
    """One of the two layers."""
    (batch, num_tokens, channels), hidden = x, weights[2][0]
    return 2 * batch * num_tokens * channels * hidden


def _ffn_forward(x: Shape, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _ffn(x, weights)


def _ffn_backward(
    dy: Any, x: Shape, weights: Any, s: Any, saved: Any, wanted: Sequence[bool], *_: Any, **__: Any
) -> int:
    wants_x, *norm, w_1, b_1, w_2, _b_2 = wanted
    before_fc1 = wants_x or any(norm)
    return (w_2 + (before_fc1 or w_1 or b_1) + w_1 + before_fc1) * _ffn(x, weights)


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

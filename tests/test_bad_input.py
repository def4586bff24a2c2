"""Every public function refuses bad input, naming it, before any kernel starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, FusionWeights, MsaWeights
from crossvit_kernels.ops.cross_attention.reference import F_FIELDS, G_FIELDS

B, N, C, C_CLS, HIDDEN, HEADS = 2, 5, 12, 8, 20, 3
DOUBLE, INT = torch.float64, torch.int64


def fusion_weights() -> FusionWeights:
    c, cls_vector = torch.zeros(C), torch.zeros(C_CLS)
    square = torch.zeros(C, C)
    up, down = torch.zeros(C, C_CLS), torch.zeros(C_CLS, C)
    attention = (square, c) * 4
    return FusionWeights(cls_vector, cls_vector, up, c, c, c, *attention, c, c, down, cls_vector)


def core(**changes: Any) -> Any:
    arguments = {"u": torch.zeros(B, 4, C), "x": torch.zeros(B, N, C)}
    return ck.attention_core(**{**arguments, **changes})


def fusion(**changes: Any) -> Any:
    weights = fusion_weights()
    fields = {k: changes.pop(k) for k in list(changes) if k in FusionWeights._fields}
    arguments = {
        "cls": torch.zeros(B, C_CLS),
        "tokens": torch.zeros(B, N, C),
        "weights": weights._replace(**fields),
        "num_heads": HEADS,
    }
    return ck.cross_attention_fusion(**{**arguments, **changes})


def msa(**changes: Any) -> Any:
    c = torch.zeros(C)
    weights = MsaWeights(c, c, torch.zeros(3 * C, C), torch.zeros(3 * C), torch.zeros(C, C), c)
    fields = {k: changes.pop(k) for k in list(changes) if k in MsaWeights._fields}
    arguments = {"x": torch.zeros(B, N, C), "weights": weights._replace(**fields)}
    return ck.layernorm_msa(**{**arguments, "num_heads": HEADS, **changes})


def ffn(**changes: Any) -> Any:
    c, hidden = torch.zeros(C), torch.zeros(HIDDEN)
    weights = FfnWeights(c, c, torch.zeros(HIDDEN, C), hidden, torch.zeros(C, HIDDEN), c)
    fields = {k: changes.pop(k) for k in list(changes) if k in FfnWeights._fields}
    arguments = {"x": torch.zeros(B, N, C), "weights": weights._replace(**fields)}
    return ck.layernorm_ffn(**{**arguments, **changes})


def reversed_channels(*shape: int) -> torch.Tensor:
    """Return a tensor whose last stride is not 1."""
    return torch.zeros(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


META = torch.zeros(B, N, C, device="meta")

CASES: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    # attention_core
    (core, {"u": torch.zeros(4, C)}, ValueError, r"^u: .*\[B, R, 12\].*found \[4, 12\]"),
    (core, {"u": torch.zeros(B, 4, C + 1)}, ValueError, r"^u: .*found \[2, 4, 13\]"),
    (core, {"u": torch.zeros(B + 1, 4, C)}, ValueError, "^u: expected a batch of 1 or 2"),
    (core, {"u": torch.zeros(B, 4, C, dtype=DOUBLE)}, TypeError, "^u: .*float64"),
    (core, {"u": torch.zeros(B, 4, C, dtype=INT)}, TypeError, "^u: .*floating-point"),
    (core, {"u": "no tensor"}, TypeError, "^u: expected a tensor, found str"),
    (core, {"x": torch.zeros(N, C)}, ValueError, "^x: "),
    (core, {"x": torch.zeros(B, 0, C)}, ValueError, "^x: expected at least one token"),
    (core, {"x": torch.zeros(B, N, C, dtype=torch.bool)}, TypeError, "^x: "),
    (core, {"x": reversed_channels(B, N, C)}, ValueError, "^x: expected unit stride"),
    (core, {"x": META}, ValueError, "^u: is on cpu, but x is on meta"),
    (core, {"norm_eps": -1e-6}, ValueError, "^norm_eps: "),
    (core, {"norm_eps": float("nan")}, ValueError, "^norm_eps: "),
    (core, {"norm_eps": "1e-6"}, TypeError, "^norm_eps: "),
    (core, {"key_mask": torch.ones(B, N)}, TypeError, "^key_mask: expected torch.bool"),
    (core, {"key_mask": torch.ones(B, 1, N).bool()}, ValueError, r"^key_mask: .*\[2, 5\]"),
    (core, {"key_mask": torch.ones(B, N + 1).bool()}, ValueError, "^key_mask: "),
    (core, {"key_mask": [[True] * N] * B}, TypeError, "^key_mask: "),
    (core, {"extra_token": torch.zeros(B, C - 1)}, ValueError, "^extra_token: "),
    (core, {"extra_token": torch.zeros(B, C, dtype=DOUBLE)}, TypeError, "^extra_token: "),
    (core, {"backend": "fpga"}, ValueError, "unknown backend 'fpga'"),
    # cross_attention_fusion
    (fusion, {"cls": torch.zeros(B, 1, C_CLS)}, ValueError, "^cls: "),
    (fusion, {"cls": torch.zeros(B, C_CLS, dtype=INT)}, TypeError, "^cls: "),
    (fusion, {"tokens": torch.zeros(B + 1, N, C)}, ValueError, r"^tokens: .*found \[3, 5, 12\]"),
    (fusion, {"tokens": torch.zeros(B, N, C, dtype=DOUBLE)}, TypeError, "^tokens: .*float64"),
    (fusion, {"tokens": reversed_channels(B, N, C)}, ValueError, "^tokens: expected unit stride"),
    (fusion, {"tokens": META}, ValueError, "^tokens: is on meta"),
    (fusion, {"weights": tuple(fusion_weights())}, TypeError, "^weights: expected FusionWeights"),
    (fusion, {"proj_weight": torch.zeros(C, C)}, ValueError, r"^weights.proj_weight: .*\[12, 8\]"),
    (fusion, {"q_weight": torch.zeros(C, C_CLS)}, ValueError, "^weights.q_weight: "),
    (fusion, {"out_bias": None}, TypeError, "^weights.out_bias: expected a tensor"),
    (fusion, {"back_bias": torch.zeros(C)}, ValueError, "^weights.back_bias: "),
    (fusion, {"k_weight": torch.zeros(C, C, dtype=DOUBLE)}, TypeError, "^weights.k_weight: "),
    (fusion, {"num_heads": 5}, ValueError, "^num_heads: 5 does not divide C = 12"),
    (fusion, {"num_heads": 0}, ValueError, "^num_heads: expected at least 1"),
    (fusion, {"num_heads": 3.0}, TypeError, "^num_heads: expected an int"),
    (fusion, {"eps": -1.0}, ValueError, "^eps: "),
    (fusion, {"residual_scale": torch.ones(B, 1)}, ValueError, r"^residual_scale: .*\[2\]"),
    (fusion, {"residual_scale": torch.ones(B).long()}, TypeError, "^residual_scale: "),
    (fusion, {"dropout_p": 1.0}, ValueError, "^dropout_p: "),
    (fusion, {"backend": "fpga"}, ValueError, "unknown backend 'fpga'"),
    # layernorm_msa
    (msa, {"x": torch.zeros(N, C)}, ValueError, "^x: "),
    (msa, {"x": torch.zeros(B, N, C).long()}, TypeError, "^x: "),
    (msa, {"x": reversed_channels(B, N, C)}, ValueError, "^x: expected unit stride"),
    (msa, {"cls": torch.zeros(B, C + 1)}, ValueError, "^cls: "),
    (msa, {"cls": torch.zeros(B, C), "x": torch.zeros(B, 0, C)}, ValueError, "^cls: "),
    (msa, {"qkv_weight": torch.zeros(C, C)}, ValueError, r"^weights.qkv_weight: .*\[36, 12\]"),
    (msa, {"norm_weight": torch.zeros(C, dtype=DOUBLE)}, TypeError, "^weights.norm_weight: "),
    (msa, {"weights": fusion_weights()}, TypeError, "^weights: expected MsaWeights"),
    (msa, {"num_heads": 7}, ValueError, "^num_heads: "),
    (msa, {"eps": None}, TypeError, "^eps: "),
    (msa, {"residual_scale": torch.ones(B + 1)}, ValueError, "^residual_scale: "),
    (msa, {"dropout_p": -0.1}, ValueError, "^dropout_p: "),
    (msa, {"keep": "all"}, ValueError, "^keep: expected one of"),
    (msa, {"backend": "fpga"}, ValueError, "unknown backend 'fpga'"),
    # f and g that are the identity
    (fusion, dict.fromkeys(F_FIELDS), ValueError, f"^cls: .*width {C}, .*no f .*found {C_CLS}"),
    (fusion, {"proj_bias": None}, TypeError, "^weights.proj_bias: expected a tensor"),
    (fusion, dict.fromkeys(G_FIELDS[:3]), TypeError, "^weights.back_norm_weight: "),
    (
        fusion,
        {**dict.fromkeys(F_FIELDS), "cls": torch.zeros(B, C), "back_bias": torch.zeros(C)},
        ValueError,
        rf"^weights.back_bias: expected shape \[{C_CLS}\]",
    ),
    # layernorm_ffn
    (ffn, {"x": torch.zeros(B, N, C, C)}, ValueError, "^x: "),
    (ffn, {"x": torch.zeros(B, N, C).int()}, TypeError, "^x: "),
    (ffn, {"x": reversed_channels(B, N, C)}, ValueError, "^x: expected unit stride"),
    (ffn, {"fc1_bias": torch.zeros(C)}, ValueError, r"^weights.fc1_bias: .*\[20\]"),
    (ffn, {"fc2_weight": torch.zeros(C, C)}, ValueError, "^weights.fc2_weight: "),
    (ffn, {"fc1_weight": None}, TypeError, "^weights.fc1_weight: "),
    (ffn, {"weights": None}, TypeError, "^weights: expected FfnWeights"),
    (ffn, {"eps": -1e-9}, ValueError, "^eps: "),
    (ffn, {"residual_scale": torch.ones(B, device="meta")}, ValueError, "^residual_scale: "),
    (ffn, {"backend": "fpga"}, ValueError, "unknown backend 'fpga'"),
]


@pytest.mark.parametrize("function", [core, fusion, msa, ffn])
def test_the_unchanged_call_is_good(function: Callable[..., Any]) -> None:
    function()


@pytest.mark.parametrize(
    "function, changes, error, message",
    CASES,
    ids=[f"{f.__name__}-{'-'.join(c)}-{i}" for i, (f, c, _, _) in enumerate(CASES)],
)
def test_bad_input(
    function: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**changes)

"""Every public operation with the same function in plain PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from eager_modules import attend
from torch import Tensor

import crossvit_kernels as ck

C, C_CLS, HEADS, EPS, BATCH, TOKENS = 24, 16, 3, 1e-6, 3, 5


@dataclasses.dataclass(frozen=True)
class Operation:
    """A function of tensors by name.

    Attributes:
        shapes: Shapes of all tensors.
        call: The public function; ``backend`` is a keyword.
        plain: The same without this library.
    """

    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Make random tensors, with weights of the magnitude of a trained model's."""
        values = {}
        for name, shape in self.shapes.items():
            t = torch.randn(shape, dtype=torch.float64, device="cpu")
            t = t * shape[1] ** -0.5 if name.startswith("w_") else t
            values[name] = (t * 0.2 + 1 if name.endswith("norm_weight") else t).to(dtype)
        return values


def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _core(u: Tensor, x: Tensor, extra_token: Tensor, backend: str | None = None) -> Tensor:
    return ck.attention_core(u, x, EPS, extra_token=extra_token, backend=backend)[0]


def _plain_core(u: Tensor, x: Tensor, extra_token: Tensor) -> Tensor:
    xhat = norm(torch.cat([extra_token.unsqueeze(1), x], dim=1))
    return (u @ xhat.mT).softmax(dim=-1) @ xhat


def _pool(
    query: Tensor,
    tokens: Tensor,
    w_q: Tensor,
    b_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor,
    w_o: Tensor,
    b_o: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    return ck.attention_pool(
        query,
        tokens,
        *(w_q, b_q, w_k, None, w_v, b_v, w_o, b_o),
        num_heads=HEADS,
        include_query=True,
        token_norm=(norm_weight, norm_bias),
        norm_eps=EPS,
        backend=backend,
    )


def _plain_pool(query: Tensor, tokens: Tensor, *parameters: Tensor) -> Tensor:
    w_q, b_q, w_k, w_v, b_v, w_o, b_o, *affine = parameters
    keys = norm(torch.cat([query, tokens], dim=1), *affine)
    q, k, v = F.linear(query, w_q, b_q), F.linear(keys, w_k), F.linear(keys, w_v, b_v)
    return F.linear(attend(q, k, v, HEADS), w_o, b_o)


def _fusion(cls: Tensor, tokens: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
    return ck.cross_attention_fusion(
        cls, tokens, ck.FusionWeights(*weights), HEADS, EPS, backend=backend
    )


def _plain_fusion(cls: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
    w = ck.FusionWeights(*weights)
    f = cls
    if w.proj_weight is not None:
        f = F.linear(F.gelu(norm(cls, w.proj_norm_weight, w.proj_norm_bias)), *w[2:4])
    x = norm(torch.cat([f.unsqueeze(1), tokens], dim=1), w.norm_weight, w.norm_bias)
    q = F.linear(x[:, :1], w.q_weight, w.q_bias)
    k, v = F.linear(x, w.k_weight, w.k_bias), F.linear(x, w.v_weight, w.v_bias)
    y = f + F.linear(attend(q, k, v, HEADS), w.out_weight, w.out_bias)[:, 0]
    if w.back_weight is None:
        return y
    return F.linear(
        F.gelu(norm(y, w.back_norm_weight, w.back_norm_bias)), w.back_weight, w.back_bias
    )


def _fusion_without_f(cls: Tensor, tokens: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    return _fusion(cls, tokens, *[None] * 4, *weights, **options)


def _fusion_without_g(cls: Tensor, tokens: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    return _fusion(cls, tokens, *weights, *[None] * 4, **options)


def _plain_fusion_without_f(cls: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
    return _plain_fusion(cls, tokens, *[None] * 4, *weights)


def _plain_fusion_without_g(cls: Tensor, tokens: Tensor, *weights: Tensor) -> Tensor:
    return _plain_fusion(cls, tokens, *weights, *[None] * 4)


def _pair(cls: Tensor, tokens: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
    inputs = ck.FusionInputs(cls, tokens, ck.FusionWeights(*weights), HEADS)
    return torch.cat(ck.cross_attention_fusion_pair(inputs, inputs, EPS, backend=backend))


def _plain_pair(*tensors: Tensor) -> Tensor:
    return torch.cat([_plain_fusion(*tensors)] * 2)


def _msa(x: Tensor, cls: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
    return ck.layernorm_msa(x, ck.MsaWeights(*weights), HEADS, EPS, cls=cls, backend=backend)


def _plain_msa(x: Tensor, cls: Tensor, *weights: Tensor) -> Tensor:
    w = ck.MsaWeights(*weights)
    x = torch.cat([cls.unsqueeze(1), x[:, 1:]], dim=1)
    qkv = F.linear(norm(x, w.norm_weight, w.norm_bias), w.qkv_weight, w.qkv_bias)
    return x + F.linear(attend(*qkv.chunk(3, dim=-1), HEADS), w.out_weight, w.out_bias)


def _ffn(x: Tensor, *weights: Tensor, backend: str | None = None) -> Tensor:
    return ck.layernorm_ffn(x, ck.FfnWeights(*weights), EPS, backend=backend)


def _plain_ffn(x: Tensor, *weights: Tensor) -> Tensor:
    w = ck.FfnWeights(*weights)
    hidden = F.gelu(F.linear(norm(x, w.norm_weight, w.norm_bias), w.fc1_weight, w.fc1_bias))
    return x + F.linear(hidden, w.fc2_weight, w.fc2_bias)


_POOL = {f"w_{name}": (C, C) for name in "qkvo"} | {f"b_{name}": (C,) for name in "qvo"}
_AFFINE = {"norm_weight": (C,), "norm_bias": (C,)}
_POOL = {k: _POOL[k] for k in ("w_q", "b_q", "w_k", "w_v", "b_v", "w_o", "b_o")} | _AFFINE
_FUSION = {
    "cls": (BATCH, C_CLS),
    "tokens": (BATCH, TOKENS, C),
    **{"proj_norm_weight": (C_CLS,), "proj_norm_bias": (C_CLS,)},
    **{"w_proj": (C, C_CLS), "b_proj": (C,)},
    **_AFFINE,
    **{f"{kind}_{n}": (C, C) if kind == "w" else (C,) for n in "qkvo" for kind in "wb"},
    **{"back_norm_weight": (C,), "back_norm_bias": (C,), "w_back": (C_CLS, C), "b_back": (C_CLS,)},
}
_WITHOUT_F = {k: v for k, v in _FUSION.items() if "proj" not in k} | {"cls": (BATCH, C)}
_WITHOUT_G = {k: v for k, v in _FUSION.items() if "back" not in k}
_X = {"x": (BATCH, TOKENS, C)}
_MSA = {"w_qkv": (3 * C, C), "b_qkv": (3 * C,), "w_out": (C, C), "b_out": (C,)}
_FFN = {"w_fc1": (40, C), "b_fc1": (40,), "w_fc2": (C, 40), "b_fc2": (C,)}

OPERATIONS = {
    "attention_core": Operation(
        {"u": (BATCH, 4, C), **_X, "extra_token": (BATCH, C)}, _core, _plain_core
    ),
    "attention_pool": Operation(
        {"query": (BATCH, 1, C), "tokens": (BATCH, TOKENS, C), **_POOL}, _pool, _plain_pool
    ),
    "cross_attention_fusion": Operation(_FUSION, _fusion, _plain_fusion),
    "cross_attention_fusion, no f": Operation(
        _WITHOUT_F, _fusion_without_f, _plain_fusion_without_f
    ),
    "cross_attention_fusion, no g": Operation(
        _WITHOUT_G, _fusion_without_g, _plain_fusion_without_g
    ),
    "cross_attention_fusion_pair": Operation(_FUSION, _pair, _plain_pair),
    "layernorm_msa": Operation({**_X, "cls": (BATCH, C), **_AFFINE, **_MSA}, _msa, _plain_msa),
    "layernorm_ffn": Operation({**_X, **_AFFINE, **_FFN}, _ffn, _plain_ffn),
}

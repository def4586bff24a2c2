"""The public functions: what they compute, take and raise.

Every function runs on the backend that ``backend`` names, or on the fastest usable one if it is
None or ``"auto"`` (see ``use_backend``). All of them support autograd (first derivatives),
``torch.compile(fullgraph=True)``, ``torch.export`` and autocast: under autocast linear layers run
in autocast's dtype as in eager mode, while tokens are read in their own precision and statistics
stay in float32. Two arguments of some are not fused, and run the reference: ``dropout_p`` (of
``attention_pool``, ``cross_attention_fusion`` and ``layernorm_msa``) above 0, and a
``residual_scale`` (of the fusions and the two halves of a block) that requires a gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor

from crossvit_kernels import checks
from crossvit_kernels.functional_blocks import layernorm_ffn as layernorm_ffn
from crossvit_kernels.functional_blocks import layernorm_msa as layernorm_msa
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.ops.attention_core import op as core_op
from crossvit_kernels.ops.attention_core import reference as core_reference
from crossvit_kernels.ops.attention_core.reference import CoreInputs
from crossvit_kernels.ops.attention_pool import op as pool_op
from crossvit_kernels.ops.attention_pool.parameters import Norm, PoolCall, PoolParameters
from crossvit_kernels.ops.cross_attention.op import cross_attention_fusion as fusion
from crossvit_kernels.ops.cross_attention.reference import SHAPES as FUSION_SHAPES
from crossvit_kernels.ops.cross_attention.reference import (
    FusionInputs,
    FusionWeights,
    absent_weights,
)


def attention_core(
    u: Tensor,
    x: Tensor,
    norm_eps: float | None = 1e-6,
    key_mask: Tensor | None = None,
    extra_token: Tensor | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Attention of arbitrary queries over tokens that are LayerNorm-ed on the fly.

    ``m_r = sum_n p_rn xhat_n`` with ``p_r = softmax_n(u_r . xhat_n)`` and ``xhat`` the tokens after
    a LayerNorm without affine parameters. Keys and values are never materialised: u holds queries
    times W_k, and W_v can be applied to m. One token pass forward, one backward.

    Args:
        u: Queries [B, R, C], or [1, R, C] shared by all images. R is queries times heads.
        x: Tokens [B, N, C], N >= 1, any strides with unit last; in u's dtype, or in a lower
            precision than a float32 u.
        norm_eps: LayerNorm's eps, or None to use the tokens as they are.
        key_mask: bool [B, N], True where a token is attended to. Masked tokens are never read.
        extra_token: [B, C]: one more token in front of each image's, always attended to.
        return_weights: Also return p, computed afterwards in another pass.
        backend: Name of a backend, or None.

    Returns:
        m [B, R, C] in u's dtype; lse [B, R], the log-sum-exp of the scores, in float32 (float64
        for float64 tokens); with ``return_weights`` also p [B, R, N], or [B, R, 1 + N] with an
        extra token. If an image's mask is all False, m is 0 and lse is -inf.

    Raises:
        ValueError: A shape, stride, device or eps does not fit, N is 0, or the backend cannot run.
        TypeError: A dtype does not fit.

    Source: docs/derivation.md; with W_k and W_v around it, CrossViT Eq. 6.
    """
    checks.tensor("x", x, "B", "N", "C")
    batch, num_tokens, channels = x.shape
    checks.tensor("u", u, "B", "R", channels)
    if u.shape[0] not in (1, batch):
        raise ValueError(f"u: expected a batch of 1 or {batch}, found {u.shape[0]}")
    if num_tokens == 0:
        raise ValueError("x: expected at least one token, found shape " + str(list(x.shape)))
    checks.some_channels("x", x)
    checks.unit_stride("x", x)
    checks.optional_tensor("extra_token", extra_token, batch, channels)
    checks.same_device_and_dtype("x", x, extra_token=extra_token)
    if u.device != x.device:
        raise ValueError(f"u: is on {u.device}, but x is on {x.device}")
    if u.dtype != x.dtype and (u.dtype != torch.float32 or x.dtype == torch.float64):
        raise TypeError(f"u: expected {x.dtype} as x or torch.float32, found {u.dtype}")
    if norm_eps is not None:
        checks.eps("norm_eps", norm_eps)
    checks.key_mask(key_mask, x)
    inputs = CoreInputs(u, x, key_mask, extra_token)
    m, lse = core_op.attention_core(inputs, norm_eps, backend)
    if not return_weights:
        return m, lse
    return m, lse, core_reference.attention_weights(u, x, lse, norm_eps, key_mask, extra_token)


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    w_q: Tensor | None,
    b_q: Tensor | None,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    w_o: Tensor | None,
    b_o: Tensor | None,
    *,
    num_heads: int,
    scale: float | None = None,
    include_query: bool = False,
    key_mask: Tensor | None = None,
    query_norm: Norm | None = None,
    token_norm: Norm | None = None,
    norm_eps: float = 1e-6,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention of one or a few queries over many tokens, with all projections.

    The general single- or few-query head: SigLIP's MAP head, CaiT's class attention, CLIP's
    AttentionPool2d, V-JEPA's attentive probe (see ``crossvit_kernels.modules``). From head_dim
    queries on (on a CPU from 0.4 head_dim), keys and values are cheaper and the reference computes
    them, unless a backend is named.

    Args:
        query: [B, Q, C_q], or [1, Q, C_q] shared by all images (a parameter).
        tokens: [B, N, C], any strides with unit last.
        w_q: [D, C_q], or None if the query is already projected (then D = C_q).
        b_q: [D] or None.
        w_k: [D, C].
        b_k: [D] or None. Its gradient is exactly zero: softmax drops it.
        w_v: [D_v, C].
        b_v: [D_v] or None.
        w_o: [C_out, D_v], or None for no output projection.
        b_o: [C_out] or None.
        num_heads: h; divides D and D_v.
        scale: Factor of the scores; None for 1 / sqrt(D / h).
        include_query: Also attend to the query rows themselves, in front of the tokens (requires
            C_q = C). A single query needs no copy of the tokens.
        key_mask: bool [B, N], True where a token is attended to. Query rows always are.
        query_norm: (weight, bias) of a LayerNorm on the query before w_q; either may be None.
        token_norm: Likewise on the tokens (and the included query rows) before w_k and w_v.
        norm_eps: The eps of both LayerNorms.
        dropout_p: Attention dropout; above 0 the reference runs.
        return_weights: Also return the attention weights.
        backend: Name of a backend, or None.

    Returns:
        out [B, Q, C_out]; with ``return_weights`` also the weights [B, Q, h, N], or
        [B, Q, h, Q + N] with ``include_query``. An image whose mask is all False pools to 0.

    Raises:
        ValueError: A shape, stride, device, eps or head count does not fit, or the backend cannot
            run the call.
        TypeError: A dtype does not fit.
    """
    parameters = PoolParameters(
        w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, query_norm, token_norm, norm_eps
    )
    _check_pool(query, tokens, parameters, num_heads, include_query)
    if scale is not None:
        checks.number("scale", scale)
    checks.probability("dropout_p", dropout_p)
    checks.key_mask(key_mask, tokens)
    scale = (w_k.shape[0] // num_heads) ** -0.5 if scale is None else scale
    call = PoolCall(num_heads, scale, include_query, dropout_p, return_weights)
    out, weights = pool_op.attention_pool(query, tokens, parameters, call, key_mask, backend)
    return out if weights is None else (out, weights)


def cross_attention_fusion(
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    num_heads: int,
    eps: float = 1e-6,
    residual_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The fusion of one CrossViT branch: f, LayerNorm, cross-attention, residual, g.

    The CLS of one branch, projected to the other branch's width by f, attends to itself and the
    other branch's patch tokens; the result is added to f(cls) and projected back by g. f and g are
    LayerNorm -> GELU -> Linear, or the identity if their weights are None. Several
    cross-attentions in a row are calls of which only the first has f and only the last has g.

    Args:
        cls: CLS tokens [B, C_cls]; [B, C] without f.
        tokens: The other branch's patch tokens [B, N, C] without its CLS; any strides with unit
            last, so ``x[:, 1:]`` is fine. N may be 0; the CLS then attends only to itself.
        weights: ``FusionWeights``. The gradient of k_bias is exactly zero: softmax drops it. So are
            those of q and k without tokens.
        num_heads: h; divides C.
        eps: The eps of all three LayerNorms.
        residual_scale: [B]: factor of each image's attention update (drop path), or None.
        dropout_p: Attention dropout; above 0 the reference runs.
        backend: Name of a backend, or None.

    Returns:
        The new CLS tokens [B, C_cls]; [B, C] without g.

    Raises:
        ValueError: A shape, stride, device, eps or head count does not fit, or the backend cannot
            run the call.
        TypeError: A dtype does not fit, weights is not a FusionWeights, or only some of the weights
            of f or of g are None.

    Source: CrossViT (ICCV 2021), Eq. 5-7 and Figure 4.
    """
    _check_fusion(cls, tokens, weights, num_heads, residual_scale)
    checks.eps("eps", eps)
    checks.probability("dropout_p", dropout_p)
    inputs = FusionInputs(cls, tokens, weights, num_heads, residual_scale)
    return cast(Tensor, fusion(inputs, eps, dropout_p=dropout_p, backend=backend))


def cross_attention_fusion_pair(
    first: FusionInputs,
    second: FusionInputs,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Both fusions of a multi-scale block, or any two independent ones.

    The results are those of two calls of ``cross_attention_fusion``. In a CUDA graph of few images
    both run concurrently (``make_graphed``).

    Args:
        first: ``FusionInputs``: cls, tokens, weights, num_heads and residual_scale of one fusion.
        second: Those of the other.
        eps: The eps of all LayerNorms.
        dropout_p: Attention dropout; above 0 the reference runs.
        backend: Name of a backend, or None.

    Returns:
        The new CLS tokens of the first and of the second.

    Raises:
        ValueError, TypeError: As there, with the argument's name prefixed by ``first.`` or
            ``second.``.
    """
    for name, inputs in (("first", first), ("second", second)):
        if not isinstance(inputs, FusionInputs):
            raise TypeError(f"{name}: expected FusionInputs, found {type(inputs).__name__}")
        try:
            _check_fusion(*inputs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}.{error}") from None
    checks.eps("eps", eps)
    checks.probability("dropout_p", dropout_p)
    new_cls = side_by_side(
        lambda: fusion(first, eps, dropout_p=dropout_p, backend=backend),
        lambda: fusion(second, eps, dropout_p=dropout_p, backend=backend),
        like=first.cls,
    )
    return new_cls[0], new_cls[1]


def _check_fusion(
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    num_heads: int,
    residual_scale: Tensor | None,
) -> None:
    checks.tensor("cls", cls, "B", "C_cls")
    batch, cls_dim = cls.shape
    checks.tensor("tokens", tokens, batch, "N", "C")
    channels = tokens.shape[2]
    checks.some_channels("tokens", tokens)
    checks.unit_stride("tokens", tokens)
    absent: Collection[str] = ()
    if getattr(weights, "proj_weight", ()) is None or getattr(weights, "back_weight", ()) is None:
        absent = absent_weights(weights)
    if "proj_weight" in absent:
        if cls_dim != channels:
            raise ValueError(
                f"cls: expected the tokens' width {channels}, as there is no f (weights.proj_*), "
                f"found {cls_dim}"
            )
        back = getattr(weights, "back_weight", None)
        cls_dim = back.shape[0] if isinstance(back, Tensor) and back.dim() == 2 else channels
    sizes = {"C": channels, "C_cls": cls_dim}
    checks.weights(weights, FusionWeights, FUSION_SHAPES, sizes, cls, absent)
    checks.same_device_and_dtype("cls", cls, tokens=tokens)
    checks.heads(num_heads, C=channels)
    checks.residual_scale(residual_scale, batch, cls.device)


def _check_pool(
    query: Tensor, tokens: Tensor, p: PoolParameters, num_heads: int, include_query: bool
) -> None:
    """Check attention_pool's tensors: matching shapes, devices, dtypes."""
    checks.tensor("tokens", tokens, "B", "N", "C")
    batch, num_tokens, channels = tokens.shape
    checks.tensor("query", query, "B", "Q", "C_q")
    query_width = query.shape[2]
    if query.shape[0] not in (1, batch):
        raise ValueError(f"query: expected a batch of 1 or {batch}, found {query.shape[0]}")
    if query.shape[1] == 0:
        raise ValueError("query: expected at least one query, found none")
    if num_tokens == 0 and not include_query:
        raise ValueError("tokens: expected at least one token, found none")
    checks.some_channels("tokens", tokens)
    checks.unit_stride("tokens", tokens)
    checks.tensor("w_k", p.w_k, "D", channels)
    checks.tensor("w_v", p.w_v, "D_v", channels)
    width, value_width = p.w_k.shape[0], p.w_v.shape[0]
    if width == 0:
        raise ValueError("w_k: expected at least one row, found none")
    checks.optional_tensor("w_q", p.w_q, width, query_width)
    if p.w_q is None and query_width != width:
        raise ValueError(f"query: without w_q its width must be {width}, found {query_width}")
    if p.w_q is None and p.b_q is not None:
        raise ValueError("b_q: given without w_q")
    if p.w_o is None and p.b_o is not None:
        raise ValueError("b_o: given without w_o")
    checks.optional_tensor("b_q", p.b_q, width)
    checks.optional_tensor("b_k", p.b_k, width)
    checks.optional_tensor("b_v", p.b_v, value_width)
    checks.optional_tensor("w_o", p.w_o, "C_out", value_width)
    checks.optional_tensor("b_o", p.b_o, p.w_o.shape[0] if p.w_o is not None else "C_out")
    if include_query and query_width != channels:
        raise ValueError(
            f"include_query: the query's width {query_width} is not the tokens' {channels}"
        )
    checks.eps("norm_eps", p.norm_eps)
    norms = {
        "query_norm": _check_norm("query_norm", p.query_norm, query_width),
        "token_norm": _check_norm("token_norm", p.token_norm, channels),
    }
    checks.same_device_and_dtype(
        "tokens",
        tokens,
        query=query,
        **{name: getattr(p, name) for name in ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v")},
        w_o=p.w_o,
        b_o=p.b_o,
        **{f"{name}[{i}]": t for name, norm in norms.items() for i, t in enumerate(norm)},
    )
    checks.heads(num_heads, w_k_rows=width, w_v_rows=value_width)


def _check_norm(name: str, norm: Norm | None, width: int) -> Norm:
    if norm is None:
        return None, None
    if not isinstance(norm, tuple) or len(norm) != 2:
        raise TypeError(f"{name}: expected a pair (weight, bias), found {type(norm).__name__}")
    for i, t in enumerate(norm):
        checks.optional_tensor(f"{name}[{i}]", t, width)
    return norm

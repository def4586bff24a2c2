"""The layout of what a fusion saves and of what its backward pass stores, on every backend.

Kernels use the same names: in Triton for pointers of one image, in C++ in
csrc/cross_attention/layout.h.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from crossvit_kernels.backends import accumulate_dtype
from crossvit_kernels.ops.common.column_sums import column_sums
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights


class Saved(NamedTuple):
    """What forward keeps for backward: O(h C) per image, independent of the number of tokens.

    One tensor, as several allocations would take longer than a small kernel.
    """

    vectors: Tensor  # the fields of Vectors, concatenated, in accumulate_dtype of the tokens


class Vectors(NamedTuple):
    """The vectors in Saved.vectors. Those of f or g are not written if it is the identity."""

    activated: Any  # [B, C_cls]: gelu(LN_f(cls))
    y0: Any  # [B, C]: f(cls)
    normed: Any  # [B, C]: LN(y0)
    q: Any  # [B, C], before the scale 1 / sqrt(d)
    o: Any  # [B, C]
    y: Any  # [B, C]: y0 + scaled update
    back_activated: Any  # [B, C]: gelu(LN_g(y))
    kt: Any  # [h, B, C]: W_k,h^T q_h / sqrt(d)
    m: Any  # [h, B, C]
    lse: Any  # [B, h]
    head_stride: Any  # elements between the heads of kt and m


class Gradients(NamedTuple):
    """The fields of an image's row of gradients [B, gradient_size].

    Fields named after a vector parameter are an image's share of its gradient; the others are
    gradients of a layer's output, whose sums are those of its bias. Those of f or g are not written
    if it is the identity.
    """

    proj_norm_weight: Any  # C_cls
    proj_norm_bias: Any  # C_cls
    y0: Any  # C, and of f's bias
    norm_weight: Any  # C
    norm_bias: Any  # C
    q: Any  # C, and of b_q
    o: Any  # C, and of b_v
    update: Any  # C, and of b_o
    back_norm_weight: Any  # C
    back_norm_bias: Any  # C
    new_cls: Any  # C_cls, and of g's bias


#: Bias -> the field whose sum over the images is its gradient; parameters of norms have their own.
_SUMMED = {
    "proj_bias": "y0",
    "q_bias": "q",
    "v_bias": "o",
    "out_bias": "update",
    "back_bias": "new_cls",
}


def cls_dim(inputs: FusionInputs) -> int:
    """Return C_cls, the width that f maps from and g to; C if both are the identity."""
    cls, tokens, weights, *_ = inputs
    if weights.proj_weight is not None:
        return int(cls.shape[1])
    if weights.back_weight is not None:
        return int(weights.back_weight.shape[0])
    return int(tokens.shape[2])


def empty_new_cls(inputs: FusionInputs) -> Tensor:
    """Allocate the result: [B, C_cls] in the dtype of g; [B, C] if g is the identity."""
    cls, tokens, w, *_ = inputs
    if w.back_weight is not None:
        return cls.new_empty(cls.shape[0], w.back_weight.shape[0], dtype=w.back_weight.dtype)
    y0_dtype = cls.dtype if w.proj_weight is None else w.proj_weight.dtype
    dtype = torch.promote_types(y0_dtype, w.out_weight.dtype)
    return cls.new_empty(cls.shape[0], tokens.shape[2], dtype=dtype)


def vectors(saved: Saved, inputs: FusionInputs) -> Vectors:
    """Return views of the saved tensor."""
    shapes = _shapes(inputs)
    flat = saved.vectors.split_with_sizes([math.prod(shape) for shape in shapes])
    views = [vector.view(shape) for vector, shape in zip(flat, shapes, strict=True)]
    return Vectors._make([*views, math.prod(shapes[1])])


def empty_saved(inputs: FusionInputs, keep: str) -> Saved:
    """Allocate what forward saves; zero without f or g, whose vectors no kernel then writes."""
    tokens, w = inputs.tokens, inputs.weights
    size = sum(math.prod(shape) for shape in _shapes(inputs))  # may be symbolic
    allocate = torch.zeros if w.proj_weight is None or w.back_weight is None else torch.empty
    return Saved(allocate(size, dtype=accumulate_dtype(tokens), device=tokens.device))


def _shapes(inputs: FusionInputs) -> list[tuple[int, ...]]:
    (batch, _, channels), heads = inputs.tokens.shape, inputs.num_heads
    per_head = (heads, batch, channels)
    return [(batch, cls_dim(inputs)), *[(batch, channels)] * 6, per_head, per_head, (batch, heads)]


def empty_gradients(inputs: FusionInputs) -> Tensor:
    """Allocate the rows of gradients."""
    tokens, size = inputs.tokens, sum(_gradient_sizes(inputs))
    return tokens.new_empty(tokens.shape[0], size, dtype=accumulate_dtype(tokens))


def gradients(rows: Tensor, inputs: FusionInputs) -> Gradients:
    """Return views of rows of gradients."""
    return Gradients._make(rows.split_with_sizes(_gradient_sizes(inputs), dim=1))


def _gradient_sizes(inputs: FusionInputs) -> list[int]:
    own, channels = cls_dim(inputs), inputs.tokens.shape[2]
    return [own, own, *[channels] * 8, own]


def input_gradients(
    inputs: FusionInputs,
    wanted: FusionInputs,
    v: Vectors,
    g: Gradients,
    du: Tensor,
    dcls: Tensor,
    dtokens: Tensor | None,
    rows: Tensor | None = None,
) -> FusionInputs:
    """Return a backend's result of backward: gradients of the inputs, None if not wanted.

    Args:
        inputs: The inputs of forward.
        wanted: A bool for each tensor.
        v: The saved vectors.
        g: The gradients of all images.
        du: [h, B, C].
        dcls: [B, C_cls]; [B, C] without f.
        dtokens: [B, N, C], or None.
        rows: The tensor that g are views of, if they are of one.
    """
    weights = inputs.weights
    heads, _, channels = du.shape
    scale = (channels // heads) ** -0.5
    gamma, beta = weights.norm_weight.to(du.dtype), weights.norm_bias.to(du.dtype)

    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, channels // heads)).permute(1, 2, 0)

    @functools.cache
    def sums_of_rows(dtype: torch.dtype) -> Gradients:
        assert rows is not None
        sizes = _gradient_sizes(inputs)
        return Gradients._make(column_sums(rows, sizes, [dtype] * len(sizes)))

    def sum_of(field: str, dtype: torch.dtype) -> Tensor:
        """Sum over the images."""
        if rows is None:
            return cast(Tensor, getattr(g, field).sum(dim=0).to(dtype))
        return cast(Tensor, getattr(sums_of_rows(dtype), field))

    formulas: dict[str, Any] = {
        "proj_weight": lambda: g.y0.t() @ v.activated,
        "q_weight": lambda: g.q.t() @ v.normed,
        "k_weight": lambda: torch.bmm(heads_first(v.q), du).mul_(gamma * scale).flatten(0, 1),
        "k_bias": lambda: torch.zeros_like(gamma),  # softmax drops it
        "v_weight": lambda: torch.bmm(heads_first(g.o), torch.addcmul(beta, v.m, gamma)).flatten(
            0, 1
        ),
        "out_weight": lambda: g.update.t() @ v.o,
        "back_weight": lambda: g.new_cls.t() @ v.back_activated,
    }
    if inputs.tokens.shape[1] == 0:
        # The CLS attends to itself with weight 1, whatever q and k are. What rounding leaves of
        # their gradients must not move them: AdamW would make full steps of it.
        for name in ("q_weight", "q_bias", "k_weight"):
            formulas[name] = functools.partial(_zeros, getattr(weights, name), du.dtype)

    def gradient(name: str, w: Tensor) -> Tensor:
        if formula := formulas.get(name):
            return cast(Tensor, formula()).to(w.dtype)
        return sum_of(_SUMMED.get(name, name), w.dtype)

    pairs = zip(weights._asdict().items(), wanted.weights, strict=True)
    d_weights = FusionWeights._make(
        gradient(name, w) if want and w is not None else None for (name, w), want in pairs
    )
    return FusionInputs(dcls.to(inputs.cls.dtype), cast(Tensor, dtokens), d_weights, 0)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype)

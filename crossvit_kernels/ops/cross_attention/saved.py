"""What the GPU kernels of a fusion leave in memory, and the weights' gradients made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights


class Saved(NamedTuple):
    """What forward keeps for backward, in float32: O(h C) an image, whatever the number of tokens.

    One tensor, as memory in pieces takes the host longer than the kernel runs: gelu(LN_f(cls))
    [B, C_own]; y0, LN(y0), q, o, y and gelu(LN_g(y)), each [B, C]; kt and m, each [h, B, C]; lse
    [B, h].
    """

    vectors: Tensor


class Vectors(NamedTuple):
    """Views of Saved.vectors."""

    activated: Tensor
    y0: Tensor
    normed: Tensor
    q: Tensor
    o: Tensor
    y: Tensor
    back_activated: Tensor
    kt: Tensor
    m: Tensor
    lse: Tensor


def vectors(saved: Saved, batch: int, own: int, channels: int, heads: int) -> Vectors:
    vector, per_head = (batch, channels), (heads, batch, channels)
    shapes = [(batch, own), *[vector] * 6, per_head, per_head, (batch, heads)]
    sizes = [functools.reduce(lambda a, b: a * b, s) for s in shapes]
    parts = saved.vectors.split(sizes)
    return Vectors(*(part.view(s) for part, s in zip(parts, shapes, strict=True)))


def empty_saved(inputs: FusionInputs, keep: str) -> Saved:
    """Memory for what forward saves."""
    cls, tokens, _, num_heads, _ = inputs
    (batch, own), channels = cls.shape, tokens.shape[2]  # symbols, where a compiler traces
    size = batch * vector_size(own, channels, num_heads)
    return Saved(torch.empty(size, dtype=torch.float32, device=tokens.device))


def vector_size(own: int, channels: int, heads: int) -> int:
    """Floats an image that forward keeps."""
    return own + 6 * channels + 2 * heads * channels + heads


def gradient_sizes(own: int, channels: int) -> list[int]:
    """The parts of an image's row of gradients: f's LayerNorm (weight, bias), f's bias, LayerNorm
    (weight, bias), b_q, b_v, b_o, g's LayerNorm (weight, bias) and g's bias.
    """
    return [own, own, *[channels] * 8, own]


def weight_gradients(
    weights: FusionWeights, v: Vectors, gradients: Tensor, du: Tensor, wanted: Sequence[bool]
) -> FusionWeights:
    """From the rows of gradients (gradient_sizes) and du [h, B, C]; None where not wanted."""
    own, (heads, _, channels) = v.activated.shape[1], du.shape
    d, sizes = channels // heads, gradient_sizes(own, channels)
    _, _, dy0, _, _, dq, do, dupdate, _, _, dout = gradients.split(sizes, dim=1)
    sums: list[Any] = list(gradients.sum(dim=0).split(sizes))
    gamma, beta = weights.norm_weight.float(), weights.norm_bias.float()

    def of_heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, d)).permute(1, 2, 0)

    products: dict[str, Callable[[], Tensor]] = {
        "proj_weight": lambda: dy0.t() @ v.activated,
        "q_weight": lambda: dq.t() @ v.normed,
        "k_weight": lambda: torch.bmm(of_heads(v.q), du) * (gamma * d**-0.5),
        "k_bias": lambda: torch.zeros_like(gamma),  # softmax drops it
        "v_weight": lambda: torch.bmm(of_heads(do), torch.addcmul(beta, v.m, gamma)),
        "out_weight": lambda: dupdate.t() @ v.o,
        "back_weight": lambda: dout.t() @ v.back_activated,
    }
    sum_of = iter(sums)
    found: list[Any] = []
    for name, w, want in zip(weights._fields, weights, wanted, strict=True):
        of_vector = None if name in products else next(sum_of)
        if not want or w is None:
            found.append(None)
        else:
            gradient = products[name]() if of_vector is None else of_vector
            found.append(_own(gradient.view(w.shape), w))
    return FusionWeights._make(found)


def _own(gradient: Tensor, like: Tensor) -> Tensor:
    """In like's dtype and in memory of its own: an operator's results must not share any."""
    return gradient.to(like.dtype) if gradient.dtype != like.dtype else gradient.clone()

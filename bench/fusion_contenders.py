"""The fusion's shapes and inputs, and its contenders with the results they must give."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import inputs
import torch
import torch.nn.functional as F
from contender import Contender, compiled_contender, our_contender
from inputs import EPS, TRAINED, Call, Inputs, Normal
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.cross_attention import reference

Fusion = Callable[[Tensor, Tensor, ck.FusionWeights, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One measured point. ``tokens`` counts the rows attended to, including the CLS.

    With ``pair_tokens`` both fusions of a block are measured, also that of the other branch's CLS.
    """

    tokens: int
    batch: int
    dim: int
    own_dim: int
    heads: int
    dtype: torch.dtype
    pair_tokens: int = 0

    @property
    def other(self) -> Shape | None:
        """The other fusion of a block."""
        if not self.pair_tokens:
            return None
        widths = {"dim": self.own_dim, "own_dim": self.dim}
        return dataclasses.replace(self, tokens=self.pair_tokens, pair_tokens=0, **widths)

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        c, c_cls = self.dim, self.own_dim
        norm_and_projection = [(c_cls,), (c_cls,), (c, c_cls), (c,), (c,), (c,)]
        q_k_v_out = [(c, c), (c,)] * 4
        norm_and_back = [(c,), (c,), (c_cls, c), (c_cls,)]
        shapes = norm_and_projection + q_k_v_out + norm_and_back
        return dict(zip(ck.FusionWeights._fields, shapes, strict=True))

    @property
    def token_bytes(self) -> int:
        single = self.batch * (self.tokens - 1) * self.dim * self.dtype.itemsize
        return single + (self.other.token_bytes if self.other else 0)

    def floor_bytes(self, mode: str) -> int:
        """Minimum memory traffic: the patches once, three times with their gradient."""
        needs_dx, needs_dw = TRAINED[mode]
        if self.other:
            alone = dataclasses.replace(self, pair_tokens=0)
            return alone.floor_bytes(mode) + self.other.floor_bytes(mode)
        cls = self.batch * self.own_dim
        weights = sum(map(math.prod, self.weights().values()))
        if not needs_dx:
            return self.token_bytes + (2 * cls + weights) * self.dtype.itemsize
        # Patches: read twice, gradient written. CLS: in, out, and both gradients.
        weight_passes = 3 if needs_dw else 2
        return 3 * self.token_bytes + (4 * cls + weight_passes * weights) * self.dtype.itemsize

    def flops(self, mode: str) -> int:
        """FLOP of the absorbed algorithm: two products over the tokens, seven with backward."""
        pass_over_tokens = 2 * self.tokens * self.dim * self.heads
        projections = 8 * self.dim**2 + 4 * self.dim * self.own_dim
        needs_dx, needs_dw = TRAINED[mode]
        passes, paths = 7 if needs_dx else 2, 1 + needs_dx + needs_dw
        single = self.batch * (passes * pass_over_tokens + paths * projections)
        return single + (self.other.flops(mode) if self.other else 0)


def make_inputs(shape: Shape, mode: str, device: torch.device, num_sets: int) -> Inputs:
    """Sets of (cls, tokens), followed by those of the other fusion, if it is measured too."""
    fusions = [shape, shape.other] if shape.other else [shape]

    def one_set(normal: Normal) -> tuple[Tensor, ...]:
        tensors: list[Tensor] = []
        for s in fusions:
            branch = normal(s.batch, s.tokens, s.dim)
            # The patches are a view, as the model passes them.
            tensors += [normal(s.batch, s.own_dim), branch[:, 1:]]
        return tuple(tensors)

    weights = {
        prefix + name: size
        for prefix, s in zip(("", "other "), fusions, strict=False)
        for name, size in s.weights().items()
    }
    return inputs.make_inputs(
        (["output", "output of the other"][: len(fusions)], ["cls", "tokens"]),
        one_set,
        weights,
        (shape.batch, shape.own_dim),
        mode,
        device,
        shape.dtype,
        num_sets,
    )


# Contenders in PyTorch. They share f and g with the definition.


def _lift(cls: Tensor, w: ck.FusionWeights) -> Tensor:
    x = F.layer_norm(cls, cls.shape[-1:], w.proj_norm_weight, w.proj_norm_bias, EPS)
    return F.linear(F.gelu(x), w.proj_weight, w.proj_bias)


def _lower(y: Tensor, w: ck.FusionWeights) -> Tensor:
    x = F.layer_norm(y, y.shape[-1:], w.back_norm_weight, w.back_norm_bias, EPS)
    return F.linear(F.gelu(x), w.back_weight, w.back_bias)


def eager(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
    return reference.cross_attention_fusion(cls, tokens, w, heads, EPS)


def sdpa(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
    y0 = _lift(cls, w)
    x = torch.cat([y0.unsqueeze(1), tokens], dim=1)
    x = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)

    def split(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], heads, -1).transpose(1, 2)

    q = split(F.linear(x[:, :1], w.q_weight, w.q_bias))
    k = split(F.linear(x, w.k_weight, w.k_bias))
    v = split(F.linear(x, w.v_weight, w.v_bias))
    pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)  # [B, h, 1, d]
    return _lower(y0 + F.linear(pooled, w.out_weight, w.out_bias), w)


def _pool(u: Tensor, xhat: Tensor) -> Tensor:
    return (u @ xhat.transpose(1, 2)).softmax(dim=-1) @ xhat


def _pool_sdpa(u: Tensor, xhat: Tensor) -> Tensor:
    # One head whose queries are our heads: keys and values are read once for all.
    x = xhat.unsqueeze(1)
    return F.scaled_dot_product_attention(u.unsqueeze(1), x, x, scale=1.0).squeeze(1)


def absorbed(
    cls: Tensor,
    tokens: Tensor,
    w: ck.FusionWeights,
    heads: int,
    pool: Callable[[Tensor, Tensor], Tensor] = _pool,
) -> Tensor:
    """Applies W_k to the query and W_v to the pooled tokens, without forming K and V."""
    dim = tokens.shape[-1]
    y0 = _lift(cls, w)
    q = F.linear(F.layer_norm(y0, (dim,), w.norm_weight, w.norm_bias, EPS), w.q_weight, w.q_bias)
    q = (q * (dim // heads) ** -0.5).view(len(q), heads, -1).transpose(0, 1)  # [h, B, d]
    u = (q @ w.k_weight.view(heads, -1, dim)).transpose(0, 1) * w.norm_weight  # [B, h, C]
    xhat = F.layer_norm(torch.cat([y0.unsqueeze(1), tokens], dim=1), (dim,), eps=EPS)
    z = pool(u, xhat) * w.norm_weight + w.norm_bias  # [B, h, C]
    o = z.transpose(0, 1) @ w.v_weight.view(heads, -1, dim).transpose(1, 2)  # [h, B, d]
    o = o.transpose(0, 1).flatten(1)
    if w.v_bias is not None:
        o = o + w.v_bias
    return _lower(y0 + F.linear(o, w.out_weight, w.out_bias), w)


def absorbed_sdpa(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
    return absorbed(cls, tokens, w, heads, _pool_sdpa)


def our_backend(name: str) -> Fusion:
    """The fusion of crossvit_kernels on one backend."""

    def fusion(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
        return ck.cross_attention_fusion(cls, tokens, w, num_heads=heads, eps=EPS, backend=name)

    return fusion


def one_call(fusion: Fusion, heads: int) -> Call:
    return lambda cls, tokens, w: fusion(cls, tokens, ck.FusionWeights(*w), heads)


def two_calls(fusion: Fusion, heads: int) -> Call:
    def both(*arguments: Any) -> tuple[Tensor, Tensor]:
        a, b = split_pair(heads, *arguments)
        return fusion(*a[:4]), fusion(*b[:4])

    return both


def our_pair(backend: str, heads: int) -> Call:
    """Both fusions of a block in one call."""

    def pair(*arguments: Any) -> tuple[Tensor, Tensor]:
        a, b = split_pair(heads, *arguments)
        return ck.cross_attention_fusion_pair(a, b, eps=EPS, backend=backend)

    return pair


def split_pair(
    heads: int,
    cls: Tensor,
    tokens: Tensor,
    other_cls: Tensor,
    other_tokens: Tensor,
    w: list[Tensor],
) -> tuple[ck.FusionInputs, ck.FusionInputs]:
    half = len(ck.FusionWeights._fields)
    return (
        ck.FusionInputs(cls, tokens, ck.FusionWeights(*w[:half]), heads),
        ck.FusionInputs(other_cls, other_tokens, ck.FusionWeights(*w[half:]), heads),
    )


def definition(shape: Shape) -> Call:
    """Eager mode, the standard for the others."""
    return (two_calls if shape.other else one_call)(eager, shape.heads)


def contenders(options: argparse.Namespace, shape: Shape) -> list[Contender]:
    """All contenders, eager first. Their calls take a set's tensors and the weights."""
    torch._dynamo.reset()  # otherwise each shape counts as a recompilation, up to the limit
    calls, heads = two_calls if shape.other else one_call, shape.heads
    too_wide = "SDPA's fused kernels end at head dim 256" if shape.dim > 256 else None
    candidates = [
        Contender("eager", definition(shape)),
        compiled_contender("eager", definition(shape), options),
        Contender("SDPA", calls(sdpa, heads)),
        Contender("absorbed", calls(absorbed, heads)),
        compiled_contender("absorbed", calls(absorbed, heads), options),
        Contender("absorbed, SDPA", calls(absorbed_sdpa, heads), skip=too_wide),
    ]

    def ours(backend: str) -> Call:
        if shape.other:
            return our_pair(backend, heads)
        return one_call(our_backend(backend), heads)

    candidates += [our_contender(backend, ours(backend), options) for backend in options.backends]
    return candidates

"""The fusion on Triton: one kernel each way, or three with the token pass apart.

The weight matrices' gradients are products over the batch of vectors that the kernels leave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.gpu import configurations, device, launcher
from crossvit_kernels.gpu.candidates import Candidate, Candidates
from crossvit_kernels.gpu.device import ALIGN
from crossvit_kernels.graphs import side_by_side
from crossvit_kernels.ops.attention_core import shape as token_passes
from crossvit_kernels.ops.attention_core import triton as core
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.cross_attention.saved import (
    Saved,
    Vectors,
    empty_saved,
    gradient_sizes,
    vectors,
    weight_gradients,
)
from crossvit_kernels.ops.cross_attention.shape import FusionShape

__all__ = ["Saved", "backward", "empty_saved", "forward", "forward_pair", "why_not"]

# So many tokens of an image keep one program waiting for long: attention_core splits them.
_MANY_TOKENS = 4096


def why_not(
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    num_heads: int,
    cast_to: torch.dtype | None,
) -> str | None:
    return device.why_not(tokens)


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Those of forward and of backward, imported where first used: Triton is slow to import and
    not everywhere.
    """
    from crossvit_kernels.ops.cross_attention import triton_backward_kernels, triton_forward

    return triton_forward, triton_backward_kernels


def forward(
    cls: Tensor,
    tokens: Tensor,
    w: FusionWeights,
    residual_scale: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Saved]:
    call = _forward_call(cls, tokens, w, residual_scale, num_heads)
    _run(call, eps)
    *_, new_cls, kept = call.tensors
    return new_cls, Saved(kept)


def forward_pair(first: FusionInputs, second: FusionInputs, eps: float) -> tuple[Tensor, Tensor]:
    """The new CLS of two fusions, in one launch where that is possible and worthwhile."""
    a, b = (_forward_call(*x[:3], x.residual_scale, x.num_heads) for x in (first, second))
    if _in_one_launch(a, b):
        launcher.start(
            _kernels()[0].fusion_forward_pair,
            (a.groups + b.groups, 1, 1),
            (*a.tensors, *b.tensors),
            (a.batch, *a.sizes, *b.sizes),
            _of_both(a.candidates.whole, b.candidates.whole),
            weights=(a.w, b.w),
            eps=eps,
        )
    else:
        side_by_side(lambda: _run(a, eps), lambda: _run(b, eps), like=first.cls)
    return a.tensors[3], b.tensors[3]


class _FusionCandidates(NamedTuple):
    """The configurations of a fusion's kernels, by their constants."""

    whole: Candidates  # Shape, FusionShape: in one kernel, and the token pass of three
    aligned: Candidates  # ALIGN, FusionShape: those with rows of CLS
    vectors: Candidates  # FusionShape


class _Forward(NamedTuple):
    """A forward pass that is ready to run."""

    batch: int
    groups: int  # programs that share the images
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]  # cls, x, scale, new_cls, kept
    sizes: tuple[int, int, int, int]  # tokens; strides of cls, and of x between images and tokens
    w: FusionWeights
    shape: FusionShape
    config: configurations.Fusion
    candidates: _FusionCandidates


def _forward_call(
    cls: Tensor,
    tokens: Tensor,
    w: FusionWeights,
    residual_scale: Tensor | None,
    num_heads: int,
) -> _Forward:
    dtype, contiguous = w.back_weight.dtype, torch.contiguous_format
    new_cls = torch.empty_like(cls, dtype=dtype, memory_format=contiguous)
    kept = empty_saved(cls, tokens, num_heads).vectors
    cls, x, w, scale = _prepared(cls, tokens, w, residual_scale)
    shape, config, candidates = _candidates("fusion forward", cls, x, w, num_heads)
    batch, num_tokens, _ = x.shape
    return _Forward(
        batch,
        -(-batch // shape.images),
        (cls, x, scale, new_cls, kept),
        (num_tokens, cls.stride(0), x.stride(0), x.stride(1)),
        w,
        shape,
        config,
        candidates,
    )


def _in_one_launch(a: _Forward, b: _Forward) -> bool:
    batch = a.batch
    return (
        0 < batch == b.batch
        and a.tensors[0].device == b.tensors[0].device
        and a.candidates.whole.options == b.candidates.whole.options
        and max(a.sizes[0], b.sizes[0]) <= _MANY_TOKENS
        and a.config.in_one_launch(batch)
        and b.config.in_one_launch(batch)
    )


def _run(call: _Forward, eps: float) -> None:
    kernels, _ = _kernels()
    batch, groups, tensors, sizes, w, shape, config, candidates = call
    if not batch:
        return
    grid, many_tokens = (groups, 1, 1), sizes[0] > _MANY_TOKENS
    rest: dict[str, Any] = {"weights": (w,), "eps": eps}
    if config.in_one_kernel(batch) and not many_tokens:
        all_sizes = batch, *sizes
        launcher.start(kernels.fusion_forward, grid, tensors, all_sizes, candidates.whole, **rest)
        return
    cls, x, scale, new_cls, kept = tensors
    num_tokens, cls_stride, *x_strides = sizes
    of_cls = batch, cls_stride
    launcher.start(kernels.fusion_before, grid, (cls, kept), of_cls, candidates.aligned, **rest)
    if many_tokens:
        v = vectors(Saved(kept), batch, shape.own, shape.channels, shape.heads)
        u = (v.kt * w.norm_weight.float()).transpose(0, 1)
        m, lse = core.forward(u, x, None, v.y0, eps)
        v.m.copy_(m.transpose(0, 1))
        v.lse.copy_(lse)
    else:
        of_tokens = batch, num_tokens, *x_strides
        launcher.start(
            kernels.fusion_tokens, (batch, 1, 1), (x, kept), of_tokens, candidates.whole, **rest
        )
    written = kept, new_cls, scale
    launcher.start(kernels.fusion_after, grid, written, (batch,), candidates.vectors, **rest)


def backward(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    residual_scale: Tensor | None,
    saved: Saved,
    num_heads: int,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, FusionWeights]:
    """(dcls, dtokens, gradients of the weights); None for what is not wanted, but for dcls."""
    batch, _, channels = tokens.shape
    own = cls.shape[1]
    dcls = cls.new_empty(cls.shape)
    dx = tokens.new_empty(tokens.shape) if wanted[1] else None
    gradients = tokens.new_empty(batch, sum(gradient_sizes(own, channels)), dtype=torch.float32)
    dz_du = tokens.new_empty(2, num_heads, batch, channels, dtype=torch.float32)
    if batch:
        _launch_backward(
            d_new_cls,
            cls,
            tokens,
            weights,
            residual_scale,
            saved,
            num_heads,
            eps,
            (dcls, dx, gradients, dz_du[0], dz_du[1]),
        )
    v = vectors(saved, batch, own, channels, num_heads)
    return dcls, dx, weight_gradients(weights, v, gradients, dz_du[1], wanted[2:])


def _launch_backward(
    d_new_cls: Tensor,
    cls: Tensor,
    tokens: Tensor,
    weights: FusionWeights,
    residual_scale: Tensor | None,
    saved: Saved,
    num_heads: int,
    eps: float,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
) -> None:
    _, kernels = _kernels()
    batch, num_tokens, _ = tokens.shape
    cls, x, w, scale = _prepared(cls, tokens, weights, residual_scale)
    dout, kept = device.aligned_rows(d_new_cls), saved.vectors
    dcls, dx, gradients, dz, du = out
    shape, config, candidates = _candidates("fusion backward", cls, x, w, num_heads)
    groups = (-(-batch // shape.images), 1, 1)
    rest: dict[str, Any] = {"weights": (w,), "eps": eps}
    if config.in_one_kernel(batch) and num_tokens <= _MANY_TOKENS:
        launcher.start(
            kernels.fusion_backward,
            groups,
            (dout, cls, x, scale, kept, *out),
            (batch, num_tokens, dout.stride(0), cls.stride(0), x.stride(0), x.stride(1)),
            candidates.whole,
            **rest,
        )
        return
    launcher.start(
        kernels.fusion_backward_before,
        groups,
        (dout, scale, kept, gradients, dz),
        (batch, dout.stride(0)),
        candidates.aligned,
        **rest,
    )
    if num_tokens > _MANY_TOKENS:
        v = vectors(saved, batch, cls.shape[1], x.shape[2], num_heads)
        _backward_of_many_tokens(v, x, w, eps, out)
    else:
        launcher.start(
            kernels.fusion_backward_tokens,
            (batch, 1, 1),
            (x, kept, dx, gradients, dz, du),
            (batch, num_tokens, x.stride(0), x.stride(1)),
            candidates.whole,
            **rest,
        )
    launcher.start(
        kernels.fusion_backward_after,
        groups,
        (cls, kept, dcls, gradients, dz, du),
        (batch, cls.stride(0)),
        candidates.aligned,
        **rest,
    )


def _backward_of_many_tokens(
    v: Vectors,
    x: Tensor,
    w: FusionWeights,
    eps: float,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
) -> None:
    """The token pass on attention_core: writes dx, du and y0's gradient as a token."""
    _, dx, gradients, dz, du = out
    gamma = w.norm_weight.float()
    u, dm = ((t * gamma).transpose(0, 1) for t in (v.kt, dz))
    m = v.m.transpose(0, 1)
    du_found, _, dy0 = core.backward(
        dm, None, u, x, None, v.y0, m, v.lse, eps, wants_dx=dx is not None, dx_out=dx
    )
    assert dy0 is not None
    du.copy_(du_found.transpose(0, 1))
    own, channels = v.activated.shape[1], v.y0.shape[1]
    gradients.split(gradient_sizes(own, channels), dim=1)[3].copy_(dy0)


def _prepared(
    cls: Tensor, tokens: Tensor, w: FusionWeights, residual_scale: Tensor | None
) -> tuple[Tensor, Tensor, FusionWeights, Tensor | None]:
    """The inputs as kernels read them: rows aligned, parameters contiguous."""
    scale = None if residual_scale is None else residual_scale.contiguous()
    return device.aligned_rows(cls), device.aligned_rows(tokens), device.contiguous(w), scale


def _candidates(
    kernel: str, cls: Tensor, x: Tensor, w: FusionWeights, num_heads: int
) -> tuple[FusionShape, configurations.Fusion, _FusionCandidates]:
    """Of "fusion forward" or "fusion backward"; all have the shape's sizes but for block_n."""
    batch, _, channels = x.shape
    passes = token_passes.candidates(kernel, x, num_heads, normalize=True)
    config = configurations.fusion(kernel, device.chip(x.device), channels)
    precision = device.precision(w.q_weight.dtype)
    blocks = config.images(batch), config.block_k, config.block_n
    shape, found = _with_passes(passes, cls.shape[1], channels, num_heads, *blocks, precision)
    return shape, config, found


@functools.cache
def _with_passes(
    passes: Candidates,
    own: int,
    channels: int,
    num_heads: int,
    images: int,
    block_k: int,
    block_n: int,
    precision: str,
) -> tuple[FusionShape, _FusionCandidates]:
    """One object a shape: it is part of the key under which Triton finds a compiled kernel.

    Weight matrices are read in narrower blocks where no token pass fits. The bits of a result stay.
    """
    shapes = [
        FusionShape(own, channels, num_heads, images, block_k, n, precision)
        for n in (block_n, 32)
        if n <= block_n
    ]
    pairs = [(shape, of_pass) for shape in shapes for of_pass in passes]

    def candidates(constants: Callable[[FusionShape, Candidate], tuple[Any, ...]]) -> Candidates:
        items = (Candidate(constants(f, s), s.options) for f, s in pairs)
        return Candidates(tuple(items), passes.measured)

    return shapes[0], _FusionCandidates(
        whole=candidates(lambda f, s: (*s.constants, f)),
        aligned=candidates(lambda f, s: (ALIGN, f)),
        vectors=candidates(lambda f, s: (f,)),
    )


@functools.cache
def _of_both(a: Candidates, b: Candidates) -> Candidates:
    """Of two fusions in one launch: those that are launched alike."""
    items = (
        Candidate((*x.constants, *y.constants), x.options)
        for x in a
        for y in b
        if x.options == y.options
    )
    return Candidates(tuple(items), a.measured or b.measured)

"""The fusion on Triton: one kernel each way, or its CLS path around attention_core's pass.

The weight matrices' gradients are products over the batch of vectors that the kernels store.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.gpu import launcher, tables
from crossvit_kernels.gpu.tables import ALIGN, Candidate, Candidates
from crossvit_kernels.ops.attention_core import configs as token_passes
from crossvit_kernels.ops.attention_core import triton as core
from crossvit_kernels.ops.cross_attention import configs, layout
from crossvit_kernels.ops.cross_attention.configs import FusionShape
from crossvit_kernels.ops.cross_attention.layout import Saved, empty_saved
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights, gradients

__all__ = ["Saved", "backward", "empty_saved", "forward", "why_not"]


def why_not(inputs: FusionInputs) -> str | None:
    return launcher.why_not(inputs.tokens)


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    """Those of forward and of backward, imported where first used: Triton is slow to import and
    not everywhere.
    """
    from crossvit_kernels.ops.cross_attention import triton_backward_kernels, triton_forward

    return triton_forward, triton_backward_kernels


def forward(inputs: FusionInputs, eps: float, keep: str) -> tuple[Tensor, Saved]:
    call = _prepared(inputs, "forward")
    cls, x, w, scale, (shape, in_one_kernel, candidates) = call
    kernels, (batch, num_tokens, _) = _kernels()[0], x.shape
    contiguous = torch.contiguous_format
    new_cls = torch.empty_like(inputs.cls, dtype=w.back_weight.dtype, memory_format=contiguous)
    saved = empty_saved(inputs, keep)
    if not batch:
        return new_cls, saved
    kept, groups = saved.vectors, (-(-batch // shape.images), 1, 1)
    rest: dict[str, Any] = {"weights": (w,), "eps": eps}
    if in_one_kernel:
        launcher.start(
            kernels.fusion_forward,
            groups,
            (cls, x, scale, new_cls, kept),
            (batch, num_tokens, cls.stride(0), x.stride(0), x.stride(1)),
            candidates.whole,
            **rest,
        )
        return new_cls, saved
    sizes = batch, cls.stride(0)
    launcher.start(kernels.fusion_before, groups, (cls, kept), sizes, candidates.aligned, **rest)
    v = layout.vectors(saved, inputs)
    core.forward_pass(
        v.kt.transpose(0, 1),
        x,
        None,
        v.y0,
        eps,
        gain=w.norm_weight,
        **_pass_between("forward", num_tokens),
        out=(v.m.transpose(0, 1), v.lse),
    )
    written = kept, new_cls, scale
    launcher.start(kernels.fusion_after, groups, written, (batch,), candidates.vectors, **rest)
    return new_cls, saved


def backward(
    douts: Sequence[Tensor], inputs: FusionInputs, saved: Saved, eps: float, wanted: Any
) -> FusionInputs:
    (d_new_cls,), (cls, tokens, _, num_heads, _) = douts, inputs
    batch, _, channels = tokens.shape
    dcls = cls.new_empty(cls.shape)
    dx = tokens.new_empty(tokens.shape) if wanted.tokens else None
    rows = layout.empty_gradients(inputs)
    dz, du = tokens.new_empty(2, num_heads, batch, channels, dtype=torch.float32)
    if batch:
        out = dcls, dx, rows, dz, du
        _launch_backward(d_new_cls, inputs, saved, eps, out)
    v, g = layout.vectors(saved, inputs), layout.gradients(rows, inputs)
    d_weights = layout.weight_gradients(inputs.weights, v, g, du, wanted.weights)
    return gradients(dcls, dx, d_weights)


def _launch_backward(
    d_new_cls: Tensor,
    inputs: FusionInputs,
    saved: Saved,
    eps: float,
    out: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
) -> None:
    cls, x, w, scale, (shape, in_one_kernel, candidates) = _prepared(inputs, "backward")
    kernels, (batch, num_tokens, _) = _kernels()[1], x.shape
    dout, kept = launcher.aligned_rows(d_new_cls), saved.vectors
    dcls, dx, rows, dz, du = out
    groups = (-(-batch // shape.images), 1, 1)
    rest: dict[str, Any] = {"weights": (w,), "eps": eps}
    if in_one_kernel:
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
        (dout, scale, kept, rows, dz),
        (batch, dout.stride(0)),
        candidates.aligned,
        **rest,
    )
    v = layout.vectors(saved, inputs)
    core.backward_pass(
        dz.transpose(0, 1),
        None,
        v.kt.transpose(0, 1),
        x,
        None,
        v.y0,
        v.m.transpose(0, 1),
        v.lse,
        eps,
        gain=w.norm_weight,
        **_pass_between("backward", num_tokens),
        out=(du.transpose(0, 1), dx, layout.gradients(rows, inputs).norm_weight),
    )
    launcher.start(
        kernels.fusion_backward_after,
        groups,
        (cls, kept, dcls, rows, dz, du),
        (batch, cls.stride(0)),
        candidates.aligned,
        **rest,
    )


class _FusionCandidates(NamedTuple):
    """The configurations of a fusion's kernels, by their constants."""

    whole: Candidates  # Shape, FusionShape: all in one kernel
    aligned: Candidates  # ALIGN, FusionShape: those with rows of CLS
    vectors: Candidates  # FusionShape


class _Call(NamedTuple):
    """The inputs as kernels read them: rows aligned, parameters contiguous."""

    cls: Tensor
    x: Tensor
    w: FusionWeights
    scale: Tensor | None
    variant: tuple[FusionShape, bool, _FusionCandidates]  # the bool: all in one kernel


def _prepared(inputs: FusionInputs, way: str) -> _Call:
    """Of a "forward" or "backward" pass."""
    cls, x = launcher.aligned_rows(inputs.cls), launcher.aligned_rows(inputs.tokens)
    w = launcher.contiguous(inputs.weights)
    scale = None if inputs.residual_scale is None else inputs.residual_scale.contiguous()
    batch, num_tokens, channels = x.shape
    table = _TABLES[way]
    passes = token_passes.candidates(table, x, inputs.num_heads, True, configs.MANY_TOKENS)
    config = configs.fusion(table, tables.sm(x.device), channels)
    precision = tables.precision(w.q_weight.dtype)
    blocks = config.images(batch), config.block_k, config.block_n
    sizes = cls.shape[1], channels, inputs.num_heads
    shape, candidates = _with_passes(passes, *sizes, *blocks, precision)
    in_one_kernel = num_tokens <= configs.MANY_TOKENS and config.in_one_kernel(batch)
    return _Call(cls, x, w, scale, (shape, in_one_kernel, candidates))


_TABLES = {"forward": configs.FORWARD, "backward": configs.BACKWARD}


def _pass_between(way: str, num_tokens: int) -> dict[str, Any]:
    """Options of the pass between two kernels; up to MANY_TOKENS it has the bits of all in one."""
    if num_tokens > configs.MANY_TOKENS:
        return {}
    return {"table": _TABLES[way], "part": configs.MANY_TOKENS}


@functools.cache
def _with_passes(
    passes: Candidates,
    cls_dim: int,
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
        FusionShape(cls_dim, channels, num_heads, images, block_k, n, precision)
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

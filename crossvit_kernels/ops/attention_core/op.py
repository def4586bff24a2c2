"""attention_core: operators, autograd and dispatch."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.extension import accumulate_dtype
from crossvit_kernels.ops import autograd, library
from crossvit_kernels.ops.attention_core import cpu, cuda, reference, triton

#: Modules with why_not, forward and backward.
BACKENDS: dict[str, Any] = {"cuda": cuda, "cpu": cpu, "triton": triton}
register_operation("attention_core", tuple(BACKENDS))


def attention_core(
    u: Tensor,
    x: Tensor,
    norm_eps: float | None,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(m, lse) on the chosen backend; see functional.attention_core."""
    not_fused = library.why_not_fused(u, x, key_mask, extra_token)
    name = choose(
        "attention_core",
        backend,
        BACKENDS,
        x.device,
        lambda module: not_fused or module.why_not(x),
    )
    if name == "reference":
        return reference.attention_core(u, x, norm_eps, key_mask, extra_token)
    m, lse = run(u.to(accumulate_dtype(x)), x, key_mask, extra_token, norm_eps, name)
    return m.to(library.autocast_dtype(x) or u.dtype), lse


def run(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if library.needs_grad(u, x, extra_token):
        return _AttentionCore.apply(u, x, key_mask, extra_token, norm_eps, backend)
    return _forward(u, x, key_mask, extra_token, norm_eps, backend)


class _AttentionCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        x: Tensor,
        key_mask: Tensor | None,
        extra_token: Tensor | None,
        norm_eps: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        results = list(_forward(u, x, key_mask, extra_token, norm_eps, backend))
        ctx.norm_eps, ctx.backend = norm_eps, backend
        return autograd.outputs(ctx, (u, x, key_mask, extra_token), results, count=2)

    @staticmethod
    def backward(ctx: Any, dm: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (m, lse) = autograd.saved(ctx, 4)
        wants_u, wants_x, _, wants_extra, _, _ = ctx.needs_input_grad
        if autograd.needs_reference((dm, dlse)):
            reference_of = functools.partial(_reference, ctx.norm_eps)
            of_inputs = wants_u, wants_x, False, wants_extra
            du, dx, _, dextra = autograd.by_reference(
                ctx, reference_of, inputs, of_inputs, (dm, dlse)
            )
        else:
            wanted = wants_u, wants_x, wants_extra
            found = _backward(dm, dlse, *inputs, m, lse, wanted, ctx.norm_eps, ctx.backend)
            du, dx, dextra = autograd.given(found, wanted)
        return du, dx, None, dextra, None, None


def _reference(
    norm_eps: float | None,
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return reference.attention_core(u, x, norm_eps, key_mask, extra_token)


def _forward_kernel(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return BACKENDS[backend].forward(u, x, key_mask, extra_token, norm_eps)


def _forward_fake(
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    norm_eps: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], u.shape[1], x.shape[2])
    return u.new_empty(shape), u.new_empty(shape[:2])


def _backward_kernel(
    dm: Tensor,
    dlse: Tensor | None,
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    m: Tensor,
    lse: Tensor,
    wanted: list[bool],
    norm_eps: float | None,
    backend: str,
) -> list[Tensor]:
    if not m.numel():  # without a score row tokens reach nothing
        gradients = autograd.empty_gradients((u, x, extra_token), wanted, x)
        return [t.zero_() for t in gradients]
    du, dx, dextra = BACKENDS[backend].backward(
        dm, dlse, u, x, key_mask, extra_token, m, lse, norm_eps, wanted[1]
    )
    if u.shape[0] == 1 and du.shape[0] != 1:
        du = du.sum(dim=0, keepdim=True)
    found = [g if want else None for g, want in zip((du, dx, dextra), wanted, strict=True)]
    return autograd.filled(found, x)


def _backward_fake(
    dm: Tensor,
    dlse: Tensor | None,
    u: Tensor,
    x: Tensor,
    key_mask: Tensor | None,
    extra_token: Tensor | None,
    m: Tensor,
    lse: Tensor,
    wanted: list[bool],
    norm_eps: float | None,
    backend: str,
) -> list[Tensor]:
    return autograd.empty_gradients((u, x, extra_token), wanted, x)


_forward = library.define(
    "attention_core_forward(Tensor u, Tensor x, Tensor? key_mask, Tensor? extra_token, "
    "float? norm_eps, str backend) -> (Tensor m, Tensor lse)",
    _forward_kernel,
    _forward_fake,
)
_backward = library.define(
    "attention_core_backward(Tensor dm, Tensor? dlse, Tensor u, Tensor x, Tensor? key_mask, "
    "Tensor? extra_token, Tensor m, Tensor lse, bool[] wanted, float? norm_eps, "
    "str backend) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
)

"""Inputs of attention_core, and checks of a backend by the accuracy rule."""

from __future__ import annotations

import torch
from accuracy import assert_within_rule, eager_dtype, outputs_and_gradients, representable
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.attention_core import reference


def make(
    batch: int,
    num_tokens: int,
    num_rows: int,
    channels: int,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
    shared: bool = False,
    extra: bool = False,
    masked: bool = False,
) -> tuple[list[Tensor | None], Tensor | None]:
    """Make ([u, x, extra_token] in float64 but representable in dtype, key_mask)."""
    u = torch.randn(1 if shared else batch, num_rows, channels, dtype=torch.float64)
    u = u * channels**-0.5
    x = mean + torch.randn(batch, num_tokens, channels, dtype=torch.float64)
    extra_token = torch.randn(batch, channels, dtype=torch.float64) if extra else None
    mask = None
    if masked:
        mask = torch.rand(batch, num_tokens) > 0.4
        mask[:, 0] = True
    inputs = [None if t is None else representable(t, dtype) for t in (u, x, extra_token)]
    return inputs, mask


def check_rule(
    inputs: list[Tensor | None],
    mask: Tensor | None,
    dtype: torch.dtype,
    norm_eps: float | None = 1e-6,
    backend: str = "cpu",
    device: str = "cpu",
) -> None:
    """Check output, lse and all gradients in dtype against float64 and eager in dtype."""
    inputs = [None if t is None else t.to(device) for t in inputs]
    mask = None if mask is None else mask.to(device)
    u, x, _ = inputs
    assert u is not None and x is not None
    batch, num_tokens, channels = x.shape
    shape = (batch, u.shape[1], channels)
    upstream = [
        representable(torch.randn(shape, dtype=torch.float64), dtype).to(device),
        representable(torch.randn(shape[:2], dtype=torch.float64), dtype).to(device),
    ]

    def eager(u: Tensor, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return reference.attention_core(u, x, norm_eps, mask, extra)

    def kernel(u: Tensor, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, ...]:
        return ck.attention_core(u, x, norm_eps, mask, extra, backend=backend)

    # ds = p (dp - delta) with dp = dm . x of size sqrt(C): with few tokens the difference cancels,
    # to zero for one, and the rounding of its terms is all that is left: a few eps of their size,
    # more with narrow vectors, whose lanes hold longer sums.
    terms = 4 * channels**0.5 if num_tokens <= 4 else 0.0
    floor = terms * torch.finfo(dtype).eps
    exact = outputs_and_gradients(eager, inputs, upstream, torch.float64)
    in_dtype = outputs_and_gradients(eager, inputs, upstream, eager_dtype(dtype))
    actual = outputs_and_gradients(kernel, inputs, upstream, dtype)
    names = ("m", "lse", "du", "dx", "dextra")
    for name, a, e, x64 in zip(names, actual, in_dtype, exact, strict=False):
        assert_within_rule(a, e, x64, name, dtype, absolute_floor=floor)


def check_expanded_gradients(backend: str, device: str = "cpu") -> None:
    """Check that expanded upstream gradients, as from sum(), give the results of dense ones."""
    (u, x, _), _ = make(2, 20, 9, 48)
    leaves = [t.float().to(device).requires_grad_() for t in (u, x)]
    outputs = ck.attention_core(*leaves, backend=backend)
    actual = torch.autograd.grad(sum(t.sum() for t in outputs), leaves, retain_graph=True)
    expected = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

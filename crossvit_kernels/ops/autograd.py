"""What autograd and autocast ask of every operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.ops import refusals

Tensors = Sequence[Tensor | None]


def outputs(ctx: Any, inputs: Tensors, results: list[Tensor], count: int = 1) -> Any:
    """Save inputs and results for backward and return the first ``count`` results.

    Args:
        ctx: The Function's context.
        inputs: Of the operation, in the order of its reference.
        results: What the forward operator gave: outputs, then what backward needs; where that is
            nothing, it needs the outputs.
        count: Outputs.
    """
    found = [_owned(t) for t in results[:count]]
    kept = results[count:] or found
    ctx.save_for_backward(*inputs, *kept)
    ctx.strides = [t.stride() for t in kept]
    ctx.autocast = autocast_dtype(found[0])
    return found[0] if count == 1 else tuple(found)


def _owned(t: Tensor) -> Tensor:
    """t, not as a view of what a kernel computed: users may write to an output in place."""
    return t if t._base is None else torch.ops.aten._unsafe_view.default(t, t.shape)


def saved(ctx: Any, num_inputs: int) -> tuple[Tensors, list[Tensor]]:
    """The inputs, and what forward kept, with the strides that it had: a hook on saved tensors may
    have laid it out anew, and kernels take its layout for granted.
    """
    tensors = ctx.saved_tensors
    kept = [
        t if t.stride() == stride else t.new_empty_strided(t.shape, stride).copy_(t)
        for t, stride in zip(tensors[num_inputs:], ctx.strides, strict=True)
    ]
    return tensors[:num_inputs], kept


def needs_reference(douts: Tensors) -> bool:
    """Whether backward must be made of torch's operators.

    So that it can be differentiated again (``create_graph=True``), or because the gradients are no
    plain tensors: batched ones (``is_grads_batched=True``) or wrappers.
    """
    if torch.compiler.is_compiling():  # compiled backward passes have no second derivatives
        return False
    return torch.is_grad_enabled() or refusals.why_no_kernel(douts) is not None


def by_reference(
    ctx: Any, reference: Callable[..., Any], inputs: Tensors, wanted: Sequence[bool], douts: Tensors
) -> list[Tensor | None]:
    """The gradients of a reference's inputs; differentiable where grad mode is on.

    Args:
        ctx: The Function's context.
        reference: Takes the inputs and gives one output, or several.
        inputs: As saved.
        wanted: Whether the gradient of each input is.
        douts: The gradients of the outputs.
    """
    create_graph = torch.is_grad_enabled()
    device = next(t.device.type for t in inputs if t is not None)
    autocast: Any = contextlib.nullcontext()
    if ctx.autocast is not None:
        autocast = torch.autocast(device, dtype=ctx.autocast, cache_enabled=False)
    with torch.enable_grad(), autocast:
        # An alias each: one input may have been computed from another.
        aliases = [
            t if t is None or not want else t.view_as(t) if create_graph else t.detach()
            for t, want in zip(inputs, wanted, strict=True)
        ]
        roots = [t for t, want in zip(aliases, wanted, strict=True) if t is not None and want]
        for t in roots:
            t.requires_grad_()
        found = reference(*aliases)
        pairs = [
            (out, dout.to(out.dtype))
            for out, dout in zip(
                found if isinstance(found, tuple) else (found,), douts, strict=True
            )
            if dout is not None and out.requires_grad
        ]
    outs, grads = zip(*pairs, strict=True)
    gradients = iter(
        torch.autograd.grad(outs, roots, grads, create_graph=create_graph, materialize_grads=True)
    )
    return [
        next(gradients) if t is not None and want else None
        for t, want in zip(aliases, wanted, strict=True)
    ]


def empty_gradients(inputs: Tensors, wanted: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Memory for the gradients of inputs, of no element for those that are not wanted."""
    return [
        t.new_empty(t.shape) if want and t is not None else like.new_empty(0)
        for t, want in zip(inputs, wanted, strict=True)
    ]


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on t's device; None where it is off."""
    device_type = t.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_linears(weights: Any, like: Tensor, norms: tuple[str, ...]) -> Any:
    """The weights of a NamedTuple, those of its linear layers in autocast's dtype.

    Like autocast itself, it leaves float64 alone.

    Args:
        weights: NamedTuple whose fields are ``<layer>_weight`` and ``<layer>_bias``.
        like: A tensor on the device whose autocast counts.
        norms: The layers that are LayerNorms, which autocast leaves alone.
    """
    dtype = autocast_dtype(like)
    if dtype is None:
        return weights
    return [
        w
        if w is None or w.dtype == torch.float64 or name.rsplit("_", 1)[0] in norms
        else w.to(dtype)
        for name, w in zip(weights._fields, weights, strict=True)
    ]

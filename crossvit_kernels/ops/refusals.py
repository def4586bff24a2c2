"""Who else may want to see a call, and what therefore only the reference does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def is_plain_eager(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether the dispatcher can be bypassed: the kernel alone has to see the call."""
    return not (
        torch.compiler.is_compiling()
        or _num_dispatch_modes()
        or _num_function_modes()
        or _transform() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or not _PLAIN.issuperset(map(type, tensors))
        or any(torch.is_autocast_enabled(t) for t in ("cpu", "cuda"))
    )


# Modes such as FakeTensorMode or a default device, and transforms such as vmap; a torch that does
# not say whether one is on is taken to have it on.
_num_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_num_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: "unknown")
# The vmap that torch.autograd.grad has of its own.
_BATCHED_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def why_not_fused(
    *tensors: torch.Tensor | None,
    dropout_p: float = 0.0,
    residual_scale: torch.Tensor | None = None,
) -> str | None:
    """What only the reference does, on every backend.

    Args:
        *tensors: All tensors of the call; residual_scale may be among them.
        dropout_p: Attention dropout.
        residual_scale: As the operations take it.
    """
    if dropout_p > 0:
        return f"attention dropout is not fused (dropout_p={dropout_p})"
    if needs_grad(residual_scale):
        return "no kernel has a gradient for residual_scale"
    return why_no_kernel(tensors)


def why_no_kernel(tensors: Sequence[torch.Tensor | None]) -> str | None:
    """Why the memory of these tensors is not all that a call must see; None where it is.

    A kernel reads addresses. What torch attaches to its own operators (a trace, a tangent, a
    batch dimension of vmap, the shards of a DTensor, a negation that is still to be done) it
    neither reads nor passes on, but the reference does, as it is made of torch's operators.
    """
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators alone"
    if _transform() is not None:
        return "kernels take no part in the transforms of torch.func"
    if torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS):
        return "kernels take no batched gradients (is_grads_batched=True)"
    if not _PLAIN.issuperset(map(type, tensors)):
        for kind in set(map(type, tensors)) - _PLAIN:
            if _is_wrapper(kind):
                return f"a {kind.__name__} has no memory of its own"
    given = [t for t in tensors if t is not None]
    if any(map(torch.Tensor.is_neg, given)):
        return "a tensor is a negative view: call .resolve_neg() on it"
    if any(map(torch.Tensor._is_zerotensor, given)):
        return "a tensor of zeros has no memory"
    if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in given):
        return "kernels have no forward-mode derivatives"
    return None


def overrides_functions(kind: type) -> bool:
    """Whether a type of tensors says itself what torch's functions do with them."""
    function: Any = getattr(kind, "__torch_function__", None)
    usual: Any = torch.Tensor.__torch_function__
    return (
        function is not torch._C._disabled_torch_function_impl
        and getattr(function, "__func__", None) is not usual.__func__
    )


def _is_wrapper(kind: type) -> bool:
    """Whether tensors of a type run torch's operators in Python, in place of memory; those that
    torch itself traces with take custom operators as they are.
    """
    dispatches = getattr(kind, "__torch_dispatch__", None)
    if dispatches is torch._C._disabled_torch_dispatch_impl:
        return overrides_functions(kind)
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not issubclass(kind, (FakeTensor, FunctionalTensor))


def _has_tangent(t: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None

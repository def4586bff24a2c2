"""Whether layers are plainly what their types say, so that a kernel may read their parameters.

A fused operation takes weights and calls no layer. That is the same function only where nobody has
put something between a layer's parameters and its answer: another class (an adapter, a quantised
layer, a wrapper), a hook (pruning and the older weight_norm are hooks), a forward on the instance,
a weight that is a tensor subclass. Parametrizations are fine: reading the weight computes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crossvit_kernels.backends import overrides_functions

_LOG = logging.getLogger("crossvit_kernels")

_PLAIN_TENSORS = {Tensor, nn.Parameter}
#: Fields of weights that an operation takes as None.
_OPTIONAL = {"q_bias", "k_bias", "v_bias", "qkv_bias"}

# Transforms such as vmap and grad; None where there is none.
_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


class Layer(NamedTuple):
    """Where a layer is, from what owns it, and the type that it plainly is."""

    path: str
    parent: int  # position of its parent among the layers before it; -1: it is the owner's child
    name: str
    kind: type[nn.Module]
    children: int  # of a Sequential, which runs whatever it holds


def layers(kinds: dict[str, type[nn.Module]]) -> tuple[Layer, ...]:
    """Layers by their paths from an owner; a parent comes before its children."""
    parents = [path.rpartition(".")[0] for path in kinds]
    return tuple(
        Layer(
            path,
            list(kinds).index(parent) if parent else -1,
            path.rpartition(".")[2],
            kind,
            parents.count(path),
        )
        for parent, (path, kind) in zip(parents, kinds.items(), strict=True)
    )


def find(
    children: Mapping[str, nn.Module | None], expected: tuple[Layer, ...]
) -> tuple[list[Any], str | None]:
    """The expected layers, and why their parameters alone do not say what they compute.

    Args:
        children: What is looked through, ``module._modules`` for example.
        expected: From ``layers``.

    Returns:
        All layers and None, or those before the first that is not plain and what is the matter.
    """
    found: list[Any] = []
    for path, parent, name, kind, size in expected:
        among: Any = children if parent < 0 else found[parent]._modules
        layer = among.get(name)
        if (
            type(layer) is not kind
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
            or layer.__dict__.get("scale") != layer.__dict__.get("_scale")
            or (kind is nn.GELU and layer.approximate != "none")
            or (kind is nn.Sequential and len(layer._modules) != size)
        ):
            reason = why_not_plain(layer, kind, size)
            if reason is not None:
                return found, f"{path} {reason}"
        found.append(layer)
    return found, "there are global module hooks" if _has_any_global_hook() else None


def parameters(*owners: nn.Module) -> list[Any]:
    """Weight and bias of each layer, one after another; a bias may be None."""
    return [p for layer in owners for p in (layer.weight, layer.bias)]


def why_not_weights(weights: Any) -> str | None:
    """What of a NamedTuple of weights no operation can be given."""
    if (
        not torch.compiler.is_compiling()
        and _PLAIN_TENSORS.issuperset(map(type, weights))
        and {w.layout for w in weights} == {torch.strided}
        and len({w.dtype for w in weights}) == 1
    ):
        return None
    for name, w in zip(weights._fields, weights, strict=True):
        if w is None and name not in _OPTIONAL:
            return f"there is no {name}"
    dtypes = {w.dtype for w in weights if w is not None}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(weights[0].device.type):
        return f"its parameters are in {' and '.join(sorted(map(str, dtypes)))}"
    return why_not_tensors(weights)


def why_not_tensors(tensors: Iterable[Tensor | None]) -> str | None:
    """Why kernels cannot read some of the tensors: it is more than rows in memory."""
    for t in tensors:
        if t is None:
            continue
        kind = type(t)
        if kind not in _PLAIN_TENSORS and (
            is_traceable_wrapper_subclass(t)
            or (not torch.compiler.is_compiling() and overrides_functions(kind))
        ):
            return f"a parameter is a {kind.__name__}"
        if t.layout != torch.strided:
            return f"a parameter is {t.layout}"
    return None


def is_transformed() -> bool:
    """Whether the call is transformed or written down by what knows torch's own operators alone.

    Those are torch.func's transforms, torch.jit.trace and the ONNX exporters.
    """
    if torch.compiler.is_compiling():
        return bool(torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
    return _transform() is not None or torch._C._get_tracing_state() is not None


def report(owner: nn.Module, reason: str) -> None:
    """Say once for an owner and a reason that its layers are called one by one."""
    message = f"{type(owner).__name__}: {reason}; its layers run one by one, not fused"
    if torch.compiler.is_compiling():
        _report_while_tracing(message)
        return
    said: set[str] = owner.__dict__.setdefault("_reported", set())
    if message not in said:
        said.add(message)
        _LOG.warning(message)


_reported_while_tracing: set[str] = set()


@torch.compiler.assume_constant_result
def _report_while_tracing(message: str) -> bool:
    """Runs while a graph is made, and leaves nothing in it."""
    if message not in _reported_while_tracing:
        _reported_while_tracing.add(message)
        _LOG.warning(message)
    return True


def why_not_plain(layer: nn.Module | None, kind: type[nn.Module], size: int = 0) -> str | None:
    """What is between a layer and what a ``kind`` computes; size: children of a Sequential."""
    if layer is None:
        return "is missing"
    found: type[Any] = type(layer)
    if parametrize.is_parametrized(layer):
        found = found.__bases__[0]
    if found is not kind:
        return f"is a {found.__module__}.{found.__qualname__}"
    if reason := why_not_called_plainly(layer):
        return reason
    if layer.__dict__.get("scale") != layer.__dict__.get("_scale"):
        return f"has scale={layer.scale}"
    if isinstance(layer, nn.GELU) and layer.approximate != "none":
        return f"is a {layer}"
    if isinstance(layer, nn.Sequential) and len(layer) != size:
        return f"has {len(layer)} layers instead of {size}"
    return None


def why_not_called_plainly(module: nn.Module) -> str | None:
    """What else than its class's forward runs when a module is called."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    return "has a forward of its own" if "forward" in module.__dict__ else None

"""Whether layers are plain, so that a kernel may read their parameters instead of calling them.

A fused operation takes weights and calls no layer. This is equivalent only if nothing intervenes
between a layer's parameters and its output: another class (an adapter, a quantised layer, a
wrapper), a hook (pruning and the older weight_norm are hooks), a forward on the instance, a weight
that is a tensor subclass. Parametrizations are fine: reading the weight computes them.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crossvit_kernels.backends import overrides_functions

_LOG = logging.getLogger("crossvit_kernels")

_PLAIN_TENSORS = {Tensor, nn.Parameter}
#: Classes without attributes "weight" and "bias" of their own.
_LAYERS = {nn.Linear, nn.LayerNorm}
#: Fields of weights that may be None.
_OPTIONAL = {"q_bias", "k_bias", "v_bias", "qkv_bias"}

_layout, _dtype = operator.attrgetter("layout"), operator.attrgetter("dtype")

# Returns the active transforms such as vmap and grad, or None.
_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


class Layer(NamedTuple):
    """The path of a layer from its owner, and its expected type."""

    path: str
    parent: int  # index of its parent among the preceding layers; -1: a child of the owner
    name: str
    kind: type[nn.Module]
    children: int  # expected number in a Sequential, which runs all of them


def layers(kinds: dict[str, type[nn.Module]]) -> tuple[Layer, ...]:
    """Return layers by their paths from an owner; parents precede their children."""
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
    """Find the expected layers, and why their parameters alone do not determine what they compute.

    Args:
        children: The modules to search, ``module._modules`` for example.
        expected: From ``layers``.

    Returns:
        All layers and None, or the layers before the first that is not plain and the reason.
    """
    plain: list[Any] = []
    for path, parent, name, kind, size in expected:
        siblings: Any = children if parent < 0 else plain[parent]._modules
        layer = siblings.get(name)
        if (
            type(layer) is not kind
            or (values := layer.__dict__)["_forward_hooks"]  # faster than nn.Module's look-up
            or values["_forward_pre_hooks"]
            or values["_backward_hooks"]
            or values["_backward_pre_hooks"]
            or "forward" in values
            or values.get("scale") != values.get("_scale")
            or (kind is nn.GELU and layer.approximate != "none")
            or (kind is nn.Sequential and len(layer._modules) != size)
        ):
            reason = why_not_plain(layer, kind, size)
            if reason is not None:
                return plain, f"{path} {reason}"
        plain.append(layer)
    return plain, "there are global module hooks" if _has_any_global_hook() else None


def parameters(*owners: nn.Module) -> list[Any]:
    """Return weight and bias of each layer in turn; a bias may be None."""
    found: list[Any] = []
    for layer in owners:
        # nn.Module's look-up runs in Python, which takes longer than a launch for all of a block.
        values = layer.__dict__
        own = values["_parameters"] if type(layer) in _LAYERS else {}
        for name in ("weight", "bias"):
            is_own = name in own and name not in values
            found.append(own[name] if is_own else getattr(layer, name))
    return found


def why_not_weights(weights: Any, absent: Collection[str] = ()) -> str | None:
    """Return why operations cannot take a NamedTuple of weights, or None; absent ones are None."""
    if (
        not torch.compiler.is_compiling()
        and _PLAIN_TENSORS.issuperset(map(type, weights))
        and set(map(_layout, weights)) == {torch.strided}
        and len(set(map(_dtype, weights))) == 1
    ):
        return None
    for name, w in zip(weights._fields, weights, strict=True):
        if w is None and name not in _OPTIONAL and name not in absent:
            return f"there is no {name}"
    dtypes = {w.dtype for w in weights if w is not None}
    if len(dtypes) > 1 and not _is_autocast_on(weights):
        return f"its parameters are in {' and '.join(sorted(map(str, dtypes)))}"
    return why_not_tensors(weights)


def _is_autocast_on(weights: Any) -> bool:
    device = next(w.device.type for w in weights if w is not None)
    return bool(torch.is_autocast_enabled(device))


def why_not_scale(scale: Any, weights: Any) -> str | None:
    """Return why operations cannot take a vector beside a NamedTuple of weights, or None."""
    if scale.dtype != weights[0].dtype and not _is_autocast_on(weights):
        return f"its parameters are in {weights[0].dtype} and {scale.dtype}"
    if scale.shape != weights[0].shape:
        return f"LayerScale has the shape {list(scale.shape)} and not {list(weights[0].shape)}"
    return why_not_tensors((scale,))


def why_not_tensors(tensors: Iterable[Tensor | None]) -> str | None:
    """Return why kernels cannot read one of the tensors from its memory, or None."""
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
    """Whether the call is transformed or traced by something that supports only torch's operators.

    These are torch.func's transforms, torch.jit.trace and the ONNX exporters.
    """
    if torch.compiler.is_compiling():
        return bool(torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
    return _transform() is not None or torch._C._get_tracing_state() is not None


def report(
    owner: nn.Module,
    reason: str,
    instead: str = "its layers run one by one, not fused",
    memory: dict[str, Any] | None = None,
) -> None:
    """Log, once per owner and reason, what runs instead of fused operations.

    Args:
        owner: The module.
        reason: Why.
        instead: What runs.
        memory: Where to keep what was reported; by default the owner's attributes.
    """
    message = f"{type(owner).__name__}: {reason}; {instead}"
    if torch.compiler.is_compiling():
        _report_while_tracing(message)
        return
    memory = owner.__dict__ if memory is None else memory
    reported: set[str] = memory.setdefault("_reported", set())
    if message not in reported:
        reported.add(message)
        _LOG.warning(message)


_reported_while_tracing: set[str] = set()


@torch.compiler.assume_constant_result
def _report_while_tracing(message: str) -> bool:
    """Log while a graph is traced, without adding to it."""
    if message not in _reported_while_tracing:
        _reported_while_tracing.add(message)
        _LOG.warning(message)
    return True


def why_not_plain(layer: nn.Module | None, kind: type[nn.Module], size: int = 0) -> str | None:
    """Return why a layer is not a plain ``kind``, or None; size: children of a Sequential."""
    if layer is None:
        return "is missing"
    actual: type[Any] = type(layer)
    if parametrize.is_parametrized(layer):
        actual = actual.__bases__[0]
    if actual is not kind:
        return f"is a {actual.__module__}.{actual.__qualname__}"
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
    """Return what runs besides its class's forward when a module is called, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    return "has a forward of its own" if "forward" in module.__dict__ else None

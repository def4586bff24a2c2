"""Whether the layers whose parameters are read are still those that were inspected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from crossvit_kernels.modules.plain_layers import why_not_called_plainly


class Watched(NamedTuple):
    """A layer below a served module, as it was inspected."""

    path: str
    parent: int  # index of its parent among the preceding layers; -1: a child of the module
    name: str
    kind: type[Any]  # NoneType for a child that is None
    children: int
    drops: bool  # whether it is dropout
    approximate: Any  # nn.GELU's


def watch(owner: nn.Module, names: Iterable[str]) -> tuple[Watched, ...]:
    """Return the children of these names and all that is below them, parents first."""
    found: list[Watched] = []

    def visit(siblings: dict[str, Any], name: str, parent: int, path: str) -> None:
        layer = siblings.get(name)
        children = {} if layer is None else layer._modules
        drops = isinstance(layer, (nn.Dropout, nn.AlphaDropout))
        approximate = None if layer is None else layer.__dict__.get("approximate")
        facts = type(layer), len(children), drops, approximate
        found.append(Watched(path, parent, name, *facts))
        index = len(found) - 1
        for child in children:
            visit(children, child, index, f"{path}.{child}")

    for name in names:
        visit(owner._modules, name, -1, name)
    return tuple(found)


def why_not_as_watched(owner: nn.Module, watched: tuple[Watched, ...]) -> str | None:
    """Return what has changed since, or which dropout is active, or None."""
    found: list[Any] = []
    for path, parent, name, kind, children, drops, approximate in watched:
        siblings: Any = owner._modules if parent < 0 else found[parent]._modules
        layer = siblings.get(name)
        if type(layer) is not kind:
            return f"{path} is now a {type(layer).__name__}"
        if layer is not None:
            if (
                layer._forward_hooks
                or layer._forward_pre_hooks
                or layer._backward_hooks
                or layer._backward_pre_hooks
                or "forward" in layer.__dict__
            ):
                return f"{path} {why_not_called_plainly(layer)}"
            if len(layer._modules) != children:
                return f"{path} has {len(layer._modules)} layers instead of {children}"
            if layer.__dict__.get("approximate") != approximate:
                return f"{path} is now a {layer}"
            if drops and layer.training and layer.p > 0:
                return f"{path} is dropout of {layer.p} in training"
        found.append(layer)
    return "there are global module hooks" if _has_any_global_hook() else None

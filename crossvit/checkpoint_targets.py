"""Loading into and saving from models, including wrapped ones."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossvit.backbone import Backbone
from crossvit.checkpoint_layouts import WRAPPERS, unwrapped_name


def unwrap(model: Any) -> Backbone:
    """Return the model inside torch.compile, DataParallel, DistributedDataParallel, FSDP, ...

    Raises:
        TypeError: There is none.
    """
    inner = unwrap_any(model)
    if not isinstance(inner, Backbone):
        raise TypeError(f"model: expected a CrossViT or VisionTransformer, {_found(model)}")
    return inner


def unwrap_any(module: Any) -> Any:
    """The module inside all wrappers, or the argument itself."""
    while isinstance(module, nn.Module) and not isinstance(module, Backbone):
        inner = next((module._modules[name] for name in WRAPPERS if name in module._modules), None)
        if inner is None:
            break
        module = inner
    return module


def _found(model: Any) -> str:
    kind = f"found {type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, nn.Module):
        names = [name for name, module in model.named_modules() if isinstance(module, Backbone)]
        if names:
            return f"{kind}, which has one at .{names[0]}"
    if isinstance(model, type) and issubclass(model, Backbone):
        return "found the class; pass a model"
    return kind


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded parameters and buffers of a model by its own names, without wrappers'.

    All ranks of a sharded model must call it.

    Raises:
        ValueError: They are on ``meta``.
    """
    core = unwrap(model)
    if _is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        state: Mapping[str, Any] = get_model_state_dict(model, options=options)
    else:
        state = core.state_dict()
    for key, t in state.items():
        if t.is_meta:
            raise ValueError(f"model: {key} is on meta: model.to_empty(device=...) first")
    return {unwrapped_name(key): t for key, t in state.items()}


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model by its own names."""
    core = unwrap(model)
    if _is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True)
        device = next(core.parameters()).device
        whole: dict[str, Any] = {name: t.to(device) for name, t in state.items()}
        set_model_state_dict(model, whole, options=options)
        return
    keys = {unwrapped_name(key): key for key in core.state_dict()}
    core.load_state_dict({keys[name]: t for name, t in state.items()})


def writes(model: nn.Module) -> bool:
    """Whether this process writes the file; only one rank of a sharded model does."""
    return not _is_sharded(model) or torch.distributed.get_rank() == 0


def _is_sharded(model: nn.Module) -> bool:
    # If they are not imported yet, no model uses them, and importing takes a second.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    wrapped = fsdp is not None and any(isinstance(module, fsdp) for module in model.modules())
    return wrapped or (
        dtensor is not None and any(isinstance(p, dtensor) for p in model.parameters())
    )

"""Measures served modules against their own forward, on the inputs of an example."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels.calibration.measure import MARGIN, measure
from crossvit_kernels.calibration.whole_model import backward, unchanged
from crossvit_kernels.plug_in.report import Row
from crossvit_kernels.plug_in.served import Served

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def keep_what_is_faster(
    model: nn.Module,
    example: Any,
    training: bool,
    budget_s: float,
    fitted: dict[str, tuple[nn.Module, Served]],
    rows: dict[str, Row],
) -> None:
    """Measure all served modules, remove the ``forward`` of those that are no gain, fill in rows.

    Modules of one class with inputs and parameters of the same shapes are measured once. Inner
    modules come first, so that an outer one is measured with what is left of them.
    """
    with unchanged(model, training):
        calls = _recorded(model, example, training, fitted)
        end = time.monotonic() + budget_s
        gains: dict[Any, float] = {}
        alike = {path: _alike(fitted[path], call) for path, call in calls.items()}
        left = len(set(alike.values()))
        for path in reversed(list(fitted)):
            module, served = fitted[path]
            if path not in calls:
                rows[path] = _declined(rows[path], "the example does not call it", None)
                del module.__dict__["forward"]
                continue
            key = alike[path]
            if key not in gains:
                share = max(0.0, end - time.monotonic()) / max(1, left)
                gains[key] = _gain(module, served, calls[path], training, share)
                left -= 1
            gain = gains[key]
            if gain >= 1 + MARGIN:
                rows[path] = dataclasses.replace(rows[path], speedup=gain)
            else:
                rows[path] = _declined(rows[path], f"no faster: {gain:.2f}x", gain)
                del module.__dict__["forward"]


def _declined(row: Row, reason: str, gain: float | None) -> Row:
    return dataclasses.replace(row, serves=(), reasons=(*row.reasons, reason), speedup=gain)


def _recorded(
    model: nn.Module,
    example: Any,
    training: bool,
    fitted: dict[str, tuple[nn.Module, Served]],
) -> dict[str, _Arguments]:
    """Return the arguments of the first call of every served module."""
    calls: dict[str, _Arguments] = {}

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(path, (_detached(args), _detached(kwargs)))

        return record

    handles = [
        module.register_forward_pre_hook(hook(path), with_kwargs=True)
        for path, (module, _) in fitted.items()
    ]
    try:
        with torch.set_grad_enabled(training):
            model(**example) if isinstance(example, dict) else model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _detached(value: Any) -> Any:
    """Return arguments whose tensors are leaves, with gradients where they had some."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    if type(value) is dict:
        return {key: _detached(v) for key, v in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Return all tensors of arguments."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, (tuple, list, dict))
    return [t for v in values for t in _tensors(v)] if nested else []


def _alike(fitted: tuple[nn.Module, Served], call: _Arguments) -> Any:
    """Return what modules have in common that take the same time."""
    module, served = fitted

    def shapes(tensors: Any) -> tuple[Any, ...]:
        return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)

    given = _tensors(call)
    return type(module), tuple(served.serves()), shapes(module.parameters()), shapes(given)


def _gain(
    module: nn.Module, served: Served, call: _Arguments, training: bool, budget_s: float
) -> float:
    """Return the time of a module's own forward over that of the served one."""
    args, kwargs = call
    leaves = [*_tensors(call), *module.parameters()]

    def run(forward: Callable[..., Any]) -> None:
        with torch.set_grad_enabled(training):
            output = forward(*args, **kwargs)
            if training:
                backward(output, leaves)

    own: Any = type(module).forward
    runs = {"own": lambda: run(lambda *a, **k: own(module, *a, **k)), "served": lambda: run(served)}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    seconds = measure(runs, device, budget_s)
    return seconds["own"] / seconds["served"]

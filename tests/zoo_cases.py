"""Models before and after ``accelerate``: outputs and gradients under the accuracy rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accuracy import assert_within_rule
from torch import Tensor, nn

import crossvit_kernels as ck
from crossvit_kernels.plug_in import Report


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move all parameters from values at which layers do nothing, such as LayerScale's 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            scale = 0.2 if parameter.dim() < 2 else 0.5 * parameter.std().clamp(max=0.05).item()
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return model.eval()


def first_tensor(output: Any) -> Tensor:
    """Return the tensor that a model's output stands for."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output", "logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    return first_tensor(output[0])


def outcome(
    model: nn.Module, inputs: dict[str, Tensor], call: Callable[..., Any] | None = None
) -> dict[str, Tensor]:
    """Return the output, and the gradients of all floating-point inputs and parameters."""
    inputs = {
        k: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for k, t in inputs.items()
    }
    output = first_tensor((call or _call)(model, inputs))
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    leaves = {f"input {k}": t for k, t in inputs.items() if t.requires_grad}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        output, list(leaves.values()), direction.to(output.dtype), allow_unused=True
    )
    found = {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"output": output.detach(), **found}


def _call(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return model(*inputs.values()) if "x" in inputs else model(**inputs)


def assert_served_equals_own(
    model: nn.Module,
    inputs: dict[str, Tensor],
    call: Callable[..., Any] | None = None,
    **options: Any,
) -> Report:
    """Assert the accuracy rule, then that restoring is exact; returns the report.

    A backend is named, so that blocks are served whether that is a gain or not.
    """
    exact_model = copy.deepcopy(model).double()
    exact_inputs = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    exact = outcome(exact_model, exact_inputs, call)
    del exact_model
    eager = outcome(model, inputs, call)
    names = list(model.state_dict())
    report = ck.accelerate(model, **{"backend": "cpu", **options})
    actual = outcome(model, inputs, call)
    assert list(model.state_dict()) == names
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        # Gradients that cancel to zero are compared at the scale of the others.
        floor = 1e-9 * max(t.abs().max().item() for t in exact.values())
        assert_within_rule(actual[name], eager[name], expected, name, absolute_floor=floor)
    ck.restore(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    again = outcome(model, inputs, call)
    assert all(torch.equal(again[name], eager[name]) for name in ("output",))
    return report

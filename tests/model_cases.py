"""Fused models against eager mode: logits and every gradient under the rule of accuracy.py."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accuracy import assert_within_rule
from torch import Tensor

from crossvit import Config
from crossvit.backbone import Backbone

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=2, img_size=48
)

#: What changes TINY into each fusion scheme and each other form of cross-attention.
SCHEMES: dict[str, dict[str, Any]] = {
    "none": {"fusion": "none"},
    "class": {"fusion": "class"},
    "pairwise": {"fusion": "pairwise"},
    "all": {"fusion": "all"},
    "no projections": {"dims": (64, 64), "projections": False},
    "l2": {"cross_depth": 2},
    "l2 reread": {"cross_depth": 2, "reread_patches": True},
    "no cls": {"cls_token": False},
    "none, no cls": {"fusion": "none", "cls_token": False},
}


def randomised(model: Any) -> Any:
    """Move biases and norms away from 0 and 1, so that a missing term shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p) if p.dim() == 1 else 0)
    return model


def run(
    model: Backbone,
    x: Tensor,
    dtype: torch.dtype,
    fused: bool,
    autocast: bool,
    **choice: str | None,
) -> dict[str, Tensor]:
    """Return logits and gradients by name; every run draws the same drop path."""
    model = copy.deepcopy(model).to(x.device, dtype).set_fused(fused, **choice)
    torch.manual_seed(7)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(x.to(dtype))
    upstream = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64, device=x.device)
    upstream = upstream.view_as(logits)
    gradients = torch.autograd.grad(logits, list(model.parameters()), upstream.to(logits.dtype))
    names = [name for name, _ in model.named_parameters()]
    return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True))}


def without_zeros(name: str, gradient: Tensor) -> Tensor | None:
    """The entries of a gradient that are not exactly zero: softmax cancels key biases."""
    if name.endswith("wk.bias"):
        return None
    if name.endswith("qkv.bias"):
        q, _, v = gradient.chunk(3)
        return torch.cat([q, v])
    return gradient


def compare(
    model: Backbone,
    size: int,
    batch: int = 2,
    autocast: bool = False,
    device: str = "cpu",
    **choice: str | None,
) -> None:
    """Compare with eager; choice: backend and keep of the fused run."""
    x = torch.randn(batch, 3, size, size).to(device)
    dtype = torch.bfloat16 if autocast else torch.float32
    exact = run(model, x, torch.float64, fused=False, autocast=False)
    eager = run(model, x, torch.float32, fused=False, autocast=autocast)
    fused = run(model, x, torch.float32, fused=True, autocast=autocast, **choice)
    for name in exact:
        kept = [without_zeros(name, result[name]) for result in (fused, eager, exact)]
        if kept[0] is not None:
            assert_within_rule(*kept, name, dtype)
        else:
            scale = exact[name.replace("wk", "wq")].abs().max().item()
            assert fused[name].abs().max().item() <= torch.finfo(dtype).eps * scale

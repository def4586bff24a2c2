"""Each module with an eager replica of what it replaces, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from eager_modules import (
    C_CLS,
    HEADS,
    C,
    EagerAttentionPool2d,
    EagerBlock,
    EagerClassAttention,
    EagerFusion,
    EagerMapHead,
    EagerProbe,
)
from torch import Tensor, nn

from crossvit_kernels import modules

B, N = 3, 11
X = (B, N, C)


class Case(NamedTuple):
    fused: Callable[[], nn.Module]
    eager: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]  # of the inputs


CASES = {
    "fusion": Case(
        lambda: modules.CrossAttentionFusion(C_CLS, C, HEADS),
        EagerFusion,
        ((B, C_CLS), X),
    ),
    "fusion without qkv bias": Case(
        lambda: modules.CrossAttentionFusion(C_CLS, C, HEADS, qkv_bias=False),
        lambda: EagerFusion(bias=False),
        ((B, C_CLS), X),
    ),
    "fusion without projections": Case(
        lambda: modules.CrossAttentionFusion(C, C, HEADS, projections=False),
        lambda: EagerFusion(projections=False),
        ((B, C), X),
    ),
    "block": Case(
        lambda: modules.TransformerBlock(C, HEADS, mlp_ratio=2.0),
        EagerBlock,
        (X,),
    ),
    "block with cls, without qkv bias": Case(
        lambda: modules.TransformerBlock(C, HEADS, mlp_ratio=2.0, qkv_bias=False),
        lambda: EagerBlock(bias=False),
        (X, (B, C)),
    ),
    "MAP head": Case(lambda: modules.MAPHead(C, HEADS, hidden_dim=50), EagerMapHead, (X,)),
    "class attention": Case(
        lambda: modules.ClassAttention(C, HEADS),
        lambda: EagerClassAttention(bias=False),
        ((B, 1 + N, C),),
    ),
    "class attention with qkv bias": Case(
        lambda: modules.ClassAttention(C, HEADS, qkv_bias=True),
        lambda: EagerClassAttention(bias=True),
        ((B, 1 + N, C),),
    ),
    "class attention of one row": Case(
        lambda: modules.ClassAttention(C, HEADS),
        lambda: EagerClassAttention(bias=False),
        ((B, 1, C),),
    ),
    "pool 2d": Case(
        lambda: modules.AttentionPool2d((3, 5), C, HEADS, output_dim=17),
        lambda: EagerAttentionPool2d(15, 17),
        ((B, C, 3, 5),),
    ),
    "pool 2d, square": Case(
        lambda: modules.AttentionPool2d(4, C, HEADS),
        lambda: EagerAttentionPool2d(16, C),
        ((B, C, 4, 4),),
    ),
    "probe": Case(
        lambda: modules.AttentiveProbe(C, HEADS, mlp_ratio=3.0),
        EagerProbe,
        (X,),
    ),
    "probe of three queries, without projection and bias": Case(
        lambda: modules.AttentiveProbe(
            C, HEADS, num_queries=3, mlp_ratio=3.0, qkv_bias=False, out_proj=False
        ),
        lambda: EagerProbe(3, bias=False, out_proj=False),
        (X,),
    ),
}


def pair(case: Case, backend: str | None) -> tuple[nn.Module, nn.Module]:
    """Make (fused, eager) in float64 with the same random parameters, LayerNorms included."""
    fused, eager = case.fused().double(), case.eager().double()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    fused.load_state_dict(eager.state_dict(), strict=True)
    fused.backend = backend
    return fused, eager


def random_inputs(case: Case, batch: int = B) -> list[Tensor]:
    shapes = [(batch, *shape[1:]) for shape in case.shapes]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def outcome(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return output and gradients of all inputs and parameters, by name."""
    out = module(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    leaves = {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
    leaves |= dict(module.named_parameters())
    grads = torch.autograd.grad(out, list(leaves.values()), direction)
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )

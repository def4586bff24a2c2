"""Hooked or replaced blocks and layers of a model: the results of plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossvit import CrossViT
from crossvit_kernels.modules import MAPHead, TransformerBlock


def small_model(fused: bool, cross_depth: int = 1) -> CrossViT:
    torch.manual_seed(1)
    model = CrossViT(
        img_size=(48, 64), dims=(32, 64), depths=(1, 2), cross_depth=cross_depth, num_heads=(2, 2),
        num_blocks=2, use_fused=fused,
    )  # fmt: skip
    return model.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 48, 64)


class OnlyTokens(nn.Module):
    """Replaces a block by a module that takes only tokens."""

    def __init__(self, block: TransformerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_a_hook_sees_the_new_cls(fused: bool) -> None:
    model, x = small_model(fused), image()
    with torch.no_grad():
        expected = model(x)
        seen: list[Tensor] = []
        made: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            assert len(args) == 1
            seen.append(args[0].clone())
            return args[0] * 1.0

        def keep_cls(module: nn.Module, args: object, branches: tuple[Any, Any]) -> None:
            made.append(branches[0].cls)

        model.blocks[0].register_forward_hook(keep_cls)
        model.blocks[1].blocks[0][0].register_forward_pre_hook(hook)
        torch.testing.assert_close(model(x), expected)
    (cls,), (tokens,) = made, seen
    torch.testing.assert_close(tokens[:, 0], cls)


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("wrap", [nn.Sequential, OnlyTokens])
def test_another_module_in_a_blocks_place(fused: bool, wrap: type[nn.Module]) -> None:
    model, x = small_model(fused), image()
    with torch.no_grad():
        expected = model(x)
        blocks = model.blocks[1].blocks[0]
        blocks[0] = wrap(blocks[0])
        torch.testing.assert_close(model(x), expected)
        blocks[0] = nn.Identity()
        assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_a_hook_on_several_cross_attentions(fused: bool) -> None:
    model, x = small_model(fused, cross_depth=2), image()
    with torch.no_grad():
        expected, calls = model(x), []
        hooked = model.blocks[0].fusion[0]
        handle = hooked.register_forward_hook(lambda module, args, out: calls.append(1))
        torch.testing.assert_close(model(x), expected)
        assert calls == [1]
        handle.remove()
        hooked.register_forward_hook(lambda module, args, out: 2 * out)
        assert not torch.allclose(model(x), expected)


def test_an_overlapping_patch_embedding() -> None:
    embed = small_model(True).patch_embed[0]
    size = embed.patch_size
    embed.proj = nn.Conv2d(3, 32, size, stride=size // 2)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(embed(x), embed.proj(x).flatten(2).transpose(1, 2))


def test_another_scale_or_number_of_heads() -> None:
    x = torch.randn(2, 5, 32)
    block = TransformerBlock(32, 4).eval()
    block.attn.scale = 1.0
    head = MAPHead(32, 4).eval()
    head.attention = nn.MultiheadAttention(32, 8, batch_first=True)
    for module in (block, head):
        with torch.no_grad():
            fused = module(x)
            module.backend = "reference"
            torch.testing.assert_close(fused, module(x))


def test_channels_apart() -> None:
    tokens = torch.randn(2, 32, 3, 3).flatten(2).transpose(1, 2)
    for module in (TransformerBlock(32, 4).eval(), MAPHead(32, 4).eval()):
        with torch.no_grad():
            torch.testing.assert_close(module(tokens), module(tokens.contiguous()))

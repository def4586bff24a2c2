"""Modules that almost compute what fused functions compute, and calls that almost can be served."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from zoo_cases import randomised

import crossvit_kernels as ck

pytestmark = pytest.mark.usefixtures("cpu_backend")
C = 48
MSA, FFN = "layernorm_msa", "layernorm_ffn"


def timm_block(**options: Any) -> Any:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return randomised(vision_transformer.Block(C, 3, qkv_bias=True, **options))


def siglip_layer(activation: str = "gelu") -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": C, "num_attention_heads": 3, "intermediate_size": 64}
    config = transformers.SiglipVisionConfig(**sizes, hidden_act=activation)
    config._attn_implementation = "sdpa"
    return randomised(transformers.models.siglip.modeling_siglip.SiglipEncoderLayer(config))


def tokens(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 9, C, generator=generator, dtype=torch.float32)


def test_a_clipped_activation() -> None:
    layer, x = siglip_layer("gelu_10"), tokens()
    nn.init.constant_(layer.mlp.fc1.bias, 15.0)
    expected = layer(x, None)
    report = ck.accelerate(layer, backend="cpu")
    assert report.rows[0].serves == (MSA,)
    assert "activation ClippedGELUActivation" in report.rows[0].reasons[0]
    torch.testing.assert_close(layer(x, None), expected, rtol=1e-4, atol=1e-4)


class Swish(nn.Module):
    """SiLU while beta is 1."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        beta = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        if trained:
            self.beta = nn.Parameter(beta)
        else:
            self.register_buffer("beta", beta, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize("trained", [True, False])
def test_an_activation_with_numbers_of_its_own(trained: bool) -> None:
    block, x = timm_block(), tokens()
    block.mlp.act = Swish(trained)
    report = ck.accelerate(block, backend="cpu", training=trained)
    assert report.rows[0].serves == (MSA,)
    assert report.rows[0].reasons == (f"{FFN}: activation Swish (mlp.act)",)
    with torch.no_grad():
        block.mlp.act.beta.fill_(3.0)
    y = block(x)
    torch.testing.assert_close(y, type(block).forward(block, x), rtol=1e-4, atol=1e-4)
    if trained:
        y.sum().backward()
        assert block.mlp.act.beta.grad is not None


def doubled(layer: nn.Module) -> None:
    """Make a layer one of a subclass of its class, which computes something else."""
    kind: Any = type(layer)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.forward(self, *args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y

    layer.__class__ = type("Doubled", (kind,), {"forward": forward})


def torchvision_block() -> Any:
    vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")
    return randomised(vision_transformer.EncoderBlock(3, C, 96, 0.0, 0.0))


def open_clip_block() -> Any:
    transformer = pytest.importorskip("open_clip.transformer")
    return randomised(transformer.ResidualAttentionBlock(C, 3))


#: A block, the name of its attention or MLP, and what is still served.
INSIDE = {
    "timm's attention": (timm_block, "attn", FFN),
    "timm's MLP": (timm_block, "mlp", MSA),
    "SigLIP's attention": (siglip_layer, "self_attn", FFN),
    "SigLIP's MLP": (siglip_layer, "mlp", MSA),
    "torchvision's attention": (torchvision_block, "self_attention", FFN),
    "torchvision's MLP": (torchvision_block, "mlp", MSA),
    "open_clip's attention": (open_clip_block, "attn", FFN),
    "open_clip's MLP": (open_clip_block, "mlp", MSA),
}


@pytest.mark.parametrize("name", INSIDE)
def test_subclasses_inside_blocks(name: str) -> None:
    make, child, serves = INSIDE[name]
    block, x = make(), tokens()
    doubled(getattr(block, child))
    more = (None,) if "SigLIP" in name else ()
    expected = block(x, *more)
    report = ck.accelerate(block, backend="cpu")
    assert report.rows[0].serves == (serves,)
    assert f"{child} is a Doubled" in str(report)
    torch.testing.assert_close(block(x, *more), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fusion", "projs", "revert_projs"])
def test_subclasses_inside_fusions(name: str) -> None:
    crossvit = pytest.importorskip("timm.models.crossvit")
    sizes = {"dim": (32, 48), "num_heads": (2, 3), "mlp_ratio": (1.0, 1.0, 1.0)}
    block = crossvit.MultiScaleBlock(**sizes, patches=(4, 4), depth=(1, 1, 0), drop_path=(0.0,))
    assert ck.accelerate(block, backend="cpu").rows[0].serves == ("cross_attention_fusion",)
    doubled(getattr(block, name)[1])
    report = ck.accelerate(block, backend="cpu")
    assert report.rows[0].serves == () and "is a Doubled" in report.rows[0].reasons[0]


def test_layer_scale_of_another_shape(caplog: pytest.LogCaptureFixture) -> None:
    block, x = timm_block(init_values=0.5), tokens()
    assert ck.accelerate(block, backend="cpu").rows[0].serves == (MSA, FFN)
    before = block.ls1.gamma
    block.ls1.gamma = nn.Parameter(torch.tensor(0.3, dtype=torch.float32, device="cpu"))
    with caplog.at_level(logging.WARNING, "crossvit_kernels"):
        torch.testing.assert_close(block(x), type(block).forward(block, x))
    reason = f"LayerScale has the shape [] and not [{C}]"
    warning = f"Block: {reason}; its own forward runs, not fused"
    assert [r.getMessage() for r in caplog.records] == [warning]
    block.ls1.gamma = before
    own = type(block).forward(block, x)
    torch.testing.assert_close(block(x), own, rtol=1e-4, atol=1e-4)
    assert len(caplog.records) == 1


def mask_of_keys() -> Tensor:
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device="cpu")
    mask[1, :, :, 5:] = False
    return mask


def test_masks_of_fake_tensors() -> None:
    """Their values cannot be compared."""
    block = timm_block().requires_grad_(False)
    ck.accelerate(block, backend="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        mask = torch.ones(2, 1, 9, 9, dtype=torch.bool, device="cpu")
        assert block(tokens(), attn_mask=mask).shape == (2, 9, C)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_masks_while_a_graph_is_made(mode: str) -> None:
    block, x, mask = timm_block().requires_grad_(False), tokens(), mask_of_keys()
    expected = block(x, attn_mask=mask)
    ck.accelerate(block, backend="cpu")
    options: Any = {"tracing_mode": mode, "_allow_non_fake_inputs": True}
    graph = make_fx(lambda x, mask: block(x, attn_mask=mask), **options)(x, mask)
    torch.testing.assert_close(graph(x, mask), expected, rtol=1e-4, atol=1e-4)
    other = mask.clone()
    other[0, 0, 1, 2:] = False  # the graph does not depend on the mask's values
    torch.testing.assert_close(
        graph(x, other), type(block).forward(block, x, attn_mask=other), rtol=1e-4, atol=1e-4
    )


def without_bias(layer: Any) -> None:
    layer.bias = None


#: The block's options, its change, and why CUDA's kernels do not take a half of it.
LACKS: dict[str, tuple[dict[str, Any], Any, tuple[str, ...]]] = {
    "odd hidden units": (
        {"mlp_ratio": 52 / 48},
        None,
        (f"{FFN}: no kernels: cuda: 52 hidden units are no multiple of 8",),
    ),
    "LayerScale": ({"init_values": 0.5}, None, ()),
    "an activation": ({"act_layer": nn.SiLU}, None, ()),
    "no bias of attention": ({}, lambda block: without_bias(block.attn.proj), ()),
    "no bias of the MLP": ({}, lambda block: without_bias(block.mlp.fc1), ()),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_a_backend_of_another_device_lacks(what: str) -> None:
    """The model may still be moved, to where its other halves are served."""
    options, change, reasons = LACKS[what]
    block = timm_block(**options)
    if change is not None:
        change(block)
    assert ck.accelerate(block, backend="cuda").rows[0].reasons == reasons
    assert ck.accelerate(block, backend="triton").rows[0].serves == (MSA, FFN)

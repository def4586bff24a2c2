"""``accelerate`` where tensors have no values: fake models, models on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import crossvit_kernels as ck

pytestmark = pytest.mark.usefixtures("cpu_backend")
BLOCK = ("layernorm_msa", "layernorm_ffn")
POOL = ("attention_pool",)


def siglip() -> Any:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_base_patch16_siglip_224", **sizes).eval()


def images(device: str = "cpu") -> Tensor:
    return torch.ones(2, 3, 32, 32, dtype=torch.float32, device=device)


@contextmanager
def fake(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Replace a model's parameters by fake ones, and enter their mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
    with mode:
        yield mode


def test_a_fake_model_is_served() -> None:
    model = siglip()
    with fake(model):
        report = ck.accelerate(model, backend="cpu", training=True)
        assert [row.serves for row in report.rows] == [BLOCK, BLOCK, POOL], str(report)
        y = model(images())
        assert type(y) is FakeTensor and y.shape == (2, 5)
        y.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_model_is_found_the_same_under_a_fake_mode() -> None:
    model, x = siglip(), images()
    expected = ck.accelerate(model, backend="cpu")
    with torch.no_grad():
        y = model(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert ck.accelerate(model, backend="cpu") == expected
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_a_model_on_the_meta_device_is_declined() -> None:
    with torch.device("meta"):
        model = siglip()
        report = ck.accelerate(model, backend="cpu")
    assert report.served == []
    assert set(report.declined.values()) == {"there are no kernels for meta"}
    assert model(images("meta")).shape == (2, 5)


class InFloat32(nn.Module):
    """GELU that rounds its result."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x).float()


def test_an_activation_of_another_dtype() -> None:
    model = siglip()
    for block in model.blocks:
        block.mlp.act = InFloat32()
    report = ck.accelerate(model, backend="cpu")
    reasons = {reason for row in report.rows for reason in row.reasons}
    assert reasons == {"layernorm_ffn: activation InFloat32 (mlp.act)"}

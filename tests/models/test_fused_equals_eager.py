"""The fused model against eager mode: logits and every gradient under the rule of accuracy.py."""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_within_rule
from torch import Tensor

from crossvit import CrossViT, create_model, list_models
from crossvit_kernels.ops.common import configs

WIDTHS = ["tiny", "small", "base", "9", "15", "18", "9_dagger", "15_dagger", "18_dagger"]


def randomised(model: CrossViT) -> CrossViT:
    """Move biases and norms away from 0 and 1, so that a missing term shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p) if p.dim() == 1 else 0)
    return model


def run(
    model: CrossViT,
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
    model: CrossViT,
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


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", WIDTHS)
def test_every_width(name: str, autocast: bool) -> None:
    model = create_model(
        f"crossvit_{name}", img_size=48, num_blocks=2, depths=(1, 1), num_classes=10
    )
    compare(randomised(model), 48, autocast=autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["crossvit_9", "crossvit_15"])
def test_whole_models(name: str, autocast: bool) -> None:
    compare(randomised(create_model(name)).eval(), 240, batch=1, autocast=autocast)


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_whole_model_on_triton(autocast: bool, triton_device: str) -> None:
    """All of CrossViT-9 on a small image; in the interpreter if there is no GPU."""
    drop_path_rate, batch, keep = (0.2, 2, "lean") if autocast else (0.0, 1, "fast")
    model = create_model("crossvit_9", img_size=48, num_classes=10, drop_path_rate=drop_path_rate)
    choice = {"autocast": autocast, "device": triton_device, "backend": "triton", "keep": keep}
    with configs.VARIANTS.choose("auto" if autocast else "fused"):
        compare(randomised(model).train(), 48, batch=batch, **choice)


def test_drop_path_draws_the_same_masks() -> None:
    """Same seed, same dropped images: outputs differ only by rounding."""
    model = create_model(
        "crossvit_9", img_size=48, num_blocks=2, depths=(1, 2), drop_path_rate=0.5, num_classes=10
    )
    compare(randomised(model.train()), 48, batch=8)
    torch.manual_seed(7)
    first = model(torch.ones(8, 3, 48, 48))
    assert not torch.allclose(first[0], first[1])  # equal images, unequal masks


def test_switching_leaves_no_trace() -> None:
    model = create_model("crossvit_9", img_size=48, num_classes=10).eval()
    x = torch.randn(2, 3, 48, 48)
    eager = model(x)
    fused = model.set_fused()(x)
    assert not torch.equal(eager, fused)  # different code ran
    assert torch.equal(model.set_fused(False)(x), eager)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = create_model("crossvit_9", img_size=48, num_classes=10, use_fused=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_names_cover_every_width() -> None:
    assert {f"crossvit_{name}_240" for name in WIDTHS} == set(list_models("*_240"))

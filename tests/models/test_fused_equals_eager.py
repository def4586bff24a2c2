"""The fused model against eager mode: logits and every gradient under the rule of accuracy.py."""

from __future__ import annotations

import pytest
import torch
from model_cases import compare, randomised

from crossvit import create_model, list_models
from crossvit.configs import named_config
from crossvit_kernels.ops.common import configs

WIDTHS = ["tiny", "small", "base", "9", "15", "18", "9_dagger", "15_dagger", "18_dagger"]


@pytest.mark.parametrize(
    "autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "autocast"]
)
@pytest.mark.parametrize("name", WIDTHS)
def test_every_width(name: str, autocast: bool) -> None:
    model = create_model(
        f"crossvit_{name}", img_size=48, num_blocks=2, depths=(1, 1), num_classes=10
    )
    compare(randomised(model), 48, autocast=autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "name", ["crossvit_9", pytest.param("crossvit_15", marks=pytest.mark.slow)]
)
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


@pytest.mark.slow_on_cpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_whole_model_on_cuda(autocast: bool, cuda_device: str) -> None:
    """All of CrossViT-9 on a small image by CUDA's kernels; on the CPU if there is no GPU."""
    drop_path_rate, keep = (0.2, "lean") if autocast else (0.0, "fast")
    model = create_model("crossvit_9", img_size=48, num_classes=10, drop_path_rate=drop_path_rate)
    choice = {"autocast": autocast, "device": cuda_device, "backend": "cuda", "keep": keep}
    compare(randomised(model).train(), 48, batch=2, **choice)


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
    options = {"img_size": 48, "num_classes": 10, "num_blocks": 1}
    model = create_model("crossvit_9", use_fused=True, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_names_cover_every_width() -> None:
    def widths(name: str) -> tuple[tuple[int, int], str]:
        config = named_config(name)
        return config.dims, config.embed

    others = ("crossvit_small_width384_240", "crossvit_18_t2t_240", "crossvit_18_t2t_performer_240")
    assert {widths(f"crossvit_{name}") for name in WIDTHS} == {
        widths(name) for name in list_models("*_240") if name not in others
    }

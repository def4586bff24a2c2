"""The command that draws what the CLS tokens read."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from crossvit import Config, CrossViT, attention, attention_maps, save_checkpoint

TINY = Config(
    dims=(32, 64), num_heads=(2, 4), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=2, img_size=48
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An image, and a model whose CLS tokens read some patches more than others."""
    for package in ("matplotlib", "torchvision", "safetensors"):
        pytest.importorskip(package)
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").resize((100, 80)).save("image.png")
    model = CrossViT(TINY, num_classes=3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    save_checkpoint(model, "model.safetensors")
    torch.save(model.state_dict(), "model.pth")
    return ["image.png", "--checkpoint", "model.safetensors"]


@pytest.mark.parametrize("heads", ["mean", "all"])
@pytest.mark.parametrize("fused", [False, True])
def test_maps_are_the_attention(heads, fused):
    model = CrossViT(TINY, use_fused=fused, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 60, 48)
    maps = attention.fusion_maps(model, x, heads)
    number = {0: 4, 1: 2}  # at the other branch's heads
    expected = [
        (b, k, 0, head)
        for k in (0, 1)
        for b in (0, 1)
        for head in (range(number[b]) if heads == "all" else [None])
    ]
    assert [m[:4] for m in maps] == expected
    every = attention_maps(model, x)
    for m in maps:
        weights = every[m.block].fusion[m.branch][0][0]
        row = weights.mean(0) if m.head is None else weights[m.head]
        assert m.weights.shape == [(4, 3), (5, 4)][m.branch]
        assert m.own_share == pytest.approx(row[0].item())
        torch.testing.assert_close(m.weights.flatten(), row[1:])


def test_later_layers_that_see_no_patches_are_left_out():
    x = torch.randn(1, 3, 48, 48)
    for reread, layers in ((False, {0}), (True, {0, 1})):
        model = CrossViT(TINY, cross_depth=2, reread_patches=reread).eval()
        assert {m.layer for m in attention.fusion_maps(model, x)} == layers


@pytest.mark.parametrize(
    ("heads", "size", "message"),
    [("max", (1, 3, 48, 48), "'mean' or 'all'"), ("all", (2, 3, 48, 48), "one image")],
)
def test_bad_arguments_are_refused(heads, size, message):
    with pytest.raises(ValueError, match=message):
        attention.fusion_maps(CrossViT(TINY), torch.randn(size), heads)


def test_it_draws_a_map_for_each_fusion(files, capsys, monkeypatch):
    figures = []
    draw = attention.draw
    monkeypatch.setattr(attention, "draw", lambda *a: figures.append(draw(*a)) or figures[-1])
    assert attention.main([*files, "--out", "maps.png", "--dpi", "40"]) == 0
    assert capsys.readouterr().out == "maps.png\n"
    with open("maps.png", "rb") as file:
        assert file.read().startswith(b"\x89PNG")
    (figure,) = figures
    assert len(figure.axes) == 2 * 3
    titles = [ax.get_title().split(",")[0] for ax in figure.axes]
    assert titles == ["", "fusion 1", "fusion 2"] * 2
    shapes = [ax.images[-1].get_array().shape for ax in figure.axes]
    assert shapes == [(48, 48, 3), (3, 3), (3, 3), (48, 48, 3), (4, 4), (4, 4)]
    assert figure.axes[0].get_ylabel() == "S reads large patches"
    assert attention.main([*files, "--heads", "all", "--img-size", "72", "--dpi", "40"]) == 0
    assert len(figures[1].axes) == (4 + 2) * 3
    assert figures[1].axes[-1].images[-1].get_array().shape == (6, 6)


def test_models_without_cross_attention_are_refused(files, capsys):
    for fusion in ("none", "all", "class", "pairwise"):
        model = CrossViT(TINY, fusion=fusion)
        with pytest.raises(ValueError, match=f"fusion='{fusion}': no cross-attention"):
            attention.fusion_maps(model, torch.randn(1, 3, 48, 48))
    save_checkpoint(model, "pairwise.safetensors")
    for arguments, message in (
        (["pairwise.safetensors"], "fusion='pairwise': no cross-attention"),
        (["model.pth", "--model", "crossvit_small_all_240"], "fusion='all': no cross-attention"),
        (["model.pth", "--model", "deit_tiny_patch16_224"], "the model has one branch"),
    ):
        assert attention.main([files[0], "--checkpoint", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_without_cls_tokens_the_queries_are_drawn(files):
    save_checkpoint(CrossViT(TINY, cls_token=False), "nocls.safetensors")
    assert attention.main([files[0], "--checkpoint", "nocls.safetensors", "--dpi", "40"]) == 0


def test_it_draws_grey_models(files):
    save_checkpoint(CrossViT(TINY, in_chans=1), "grey.safetensors")
    assert attention.main([files[0], "--checkpoint", "grey.safetensors", "--dpi", "40"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "--checkpoint", "model.safetensors"], "missing.png: no such file"),
        (["model.pth", "--checkpoint", "model.safetensors"], "model.pth: cannot identify"),
        (["image.png", "--checkpoint", "missing.pth"], "missing.pth: no such file"),
        (["image.png", "--checkpoint", "image.png"], "image.png: truncated, or no checkpoint"),
        (["image.png", "--checkpoint", "model.pth"], "does not describe its model"),
        (["image.png", "--checkpoint", "official"], "official: needs --model"),
        (
            ["image.png", "--checkpoint", "model.pth", "--model", "crossvit_9"],
            "does not fit the model",
        ),
        (["image.png", "--checkpoint", "model.pth", "--model", "resnet"], "unknown model 'resnet'"),
        (
            ["image.png", "--checkpoint", "model.safetensors", "--out", "maps.xyz"],
            "xyz.* is not supported",
        ),
    ],
)
def test_it_says_what_is_wrong(files, arguments, message, capsys):
    assert attention.main(arguments) == 1
    line = capsys.readouterr().err
    assert line.startswith("crossvit.attention: ") and line.count("\n") == 1
    assert re.search(message, line)


def test_the_folder_of_the_picture_must_exist(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        attention.main([*files, "--out", "no/maps.png"])
    assert stopped.value.code == 2
    assert "--out: no/maps.png is in a folder that does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["matplotlib.figure", "torchvision"])
def test_it_says_what_to_install(files, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert attention.main(files) == 1
    assert f"pip install {package.split('.')[0]}" in capsys.readouterr().err

"""The example programs, on small inputs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def pyramid(monkeypatch) -> Iterator[ModuleType]:
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("feature_pyramid")
    sys.modules.pop("feature_pyramid", None)


def test_pyramid_merges_the_branches(pyramid):
    model = pyramid.CrossViT(pyramid.SMALL, use_fused=True, dynamic_img_size=True)
    backbone = pyramid.FeaturePyramid(model, out_channels=16, indices=[0, 1, 3]).eval()
    assert [tuple(m.shape) for m in backbone(torch.randn(2, 3, 120, 144)).values()] == [
        (2, 16, 20, 24),  # 120 / 6; both features of the S branch
        (2, 16, 20, 24),
        (2, 16, 14, 17),  # ceil(14/15 * 120 / 8)
        (2, 16, 7, 9),
    ]


def test_pyramid_is_a_backbone_of_detectors(pyramid):
    detection = pytest.importorskip("torchvision.models.detection")
    anchors = pytest.importorskip("torchvision.models.detection.anchor_utils")
    model = pyramid.CrossViT(pyramid.SMALL, use_fused=True, dynamic_img_size=True)
    backbone = pyramid.FeaturePyramid(model, out_channels=16)
    sizes = anchors.AnchorGenerator(((12,), (24,), (48,)), ((1.0,),) * 3)
    detector = detection.RetinaNet(
        backbone, num_classes=3, anchor_generator=sizes, min_size=96, max_size=128
    )
    boxes = torch.tensor([[10.0, 20.0, 60.0, 70.0]])
    losses = detector([torch.rand(3, 96, 120)], [{"boxes": boxes, "labels": torch.tensor([1])}])
    sum(losses.values()).backward()
    assert backbone.body.patch_embed[1].proj.weight.grad.abs().sum() > 0
    (found,) = detector.eval()([torch.rand(3, 96, 120)])
    assert set(found) == {"boxes", "scores", "labels"}


@pytest.mark.slow
def test_pyramid_learns_to_segment(pyramid, capsys):
    arguments = ["--steps", "80", "--batch", "8"]  # nothing but background is an IoU of 0.3
    assert pyramid.main([*arguments, "--min-iou", "0.37"]) == 0
    assert capsys.readouterr().out.count("mean IoU") == 2
    assert pyramid.main(["--steps", "1", "--batch", "1"]) == 1


def test_accelerate(monkeypatch, capsys):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def create_small(name: str, **options):
        small = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}
        model = create(name, **small, **options)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
        return model

    monkeypatch.setattr(timm, "create_model", create_small)
    # Its name is also that of a package.
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "accelerate.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--batch", "2"])
    out = capsys.readouterr().out
    assert "AttentionPoolLatent" in out and "ms before" in out and "Self CPU" in out

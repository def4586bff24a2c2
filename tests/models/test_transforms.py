"""The evaluation transform."""

from __future__ import annotations

import pytest
import torch

from crossvit.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform


@pytest.mark.parametrize(
    ("size", "options", "resized", "crop"),
    [
        (240, {}, 274, (240, 240)),
        (408, {}, 466, (408, 408)),
        ((240, 480), {}, [274, 548], (240, 480)),
        (240, {"protocol": "paper"}, 256, (224, 224)),
        (408, {"protocol": "paper"}, 438, (384, 384)),
        (504, {"protocol": "paper"}, 548, (480, 480)),
        ((240, 480), {"protocol": "paper"}, [256, 512], (224, 448)),
        (408, {"crop_pct": 1.0}, 408, (408, 408)),
    ],
)
def test_resize_crop_and_normalise(size, options, resized, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    noise = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise)
    transform = eval_transform(size, **options)
    steps = transform.transforms
    assert steps[0].size == resized
    assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC
    x = transform(image)
    assert x.shape == (3, *crop)
    back = x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert back.min() >= -1e-5 and back.max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "timm"}, "expected 'released' or 'paper', found 'timm'"),
        ({"crop_pct": 0}, "crop_pct: expected more than 0 and at most 1, found 0"),
        ({"crop_pct": 1.5}, "found 1.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        eval_transform(240, **options)


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        eval_transform(240)

"""The evaluation transform."""

from __future__ import annotations

import pytest
import torch

from crossvit.transforms import IMAGENET_MEAN, IMAGENET_STD, eval_transform


@pytest.mark.parametrize(("size", "resized"), [(240, 274), (408, 466), ((240, 480), (274, 548))])
def test_resize_crop_and_normalise(size, resized):
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    noise = torch.randint(0, 256, (300, 400, 3), dtype=torch.uint8).numpy()
    image = Image.fromarray(noise)
    steps = eval_transform(size).transforms
    assert steps[0].size in (resized, list(resized) if isinstance(resized, tuple) else None)
    assert steps[0].interpolation == transforms.InterpolationMode.BICUBIC
    x = eval_transform(size)(image)
    assert x.shape == (3, *((size, size) if isinstance(size, int) else size))
    back = x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert back.min() >= -1e-5 and back.max() <= 1 + 1e-5


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        eval_transform(240)

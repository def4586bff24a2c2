"""The image transform of the paper's evaluation, with torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossvit.configs import Size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Ratio of the centre crop to the resized image.
CROP_PCT = 224 / 256


def eval_transform(
    size: int | Size,
    crop_pct: float = CROP_PCT,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Any:
    """Resize to a little more than the size (bicubic), crop the centre, normalise.

    Args:
        size: Side of the S branch's image, e.g. 240, which resizes the shorter side to
            int(240 / crop_pct) = 274; or (height, width), both resized like this.
        crop_pct: Share of the resized side that is kept: 224 / 256 in the paper, 1.0 for timm's
            models of 408 pixels.
        mean: Of each channel, ImageNet's by default; as many as an image has.
        std: Of each channel.

    Returns:
        A torchvision transform from a PIL image to a float32 tensor [len(mean), height, width].

    Raises:
        ImportError: torchvision is not installed.
        ValueError: crop_pct is not in (0, 1].
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: expected more than 0 and at most 1, found {crop_pct}")
    try:
        from torchvision import transforms
    except ImportError as error:
        raise ImportError(
            "image transforms need torchvision: pip install torchvision, of the same release as "
            "torch (https://pytorch.org)"
        ) from error

    def larger(side: int) -> int:
        return int(side / crop_pct)

    resized = larger(size) if isinstance(size, int) else tuple(map(larger, size))
    return transforms.Compose(
        [
            transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

"""The image transforms of the paper's evaluation, with torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossvit.configs import Size, branch_sizes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Ratio of the centre crop to the resized image: 224 / 256.
CROP_PCT = 0.875


def eval_transform(
    size: int | Size,
    crop_pct: float = CROP_PCT,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    protocol: str = "released",
) -> Any:
    """Resize an image (bicubic), crop the centre, normalise as for ImageNet.

    The released code and the paper's text (section 4.1) differ in the crop, of which the S branch
    sees 240 pixels and the L branch 224:

    - "released": resize to 274, crop 240. The L branch resizes the crop to 224. The published
      accuracies of the released weights are of this one.
    - "paper": resize to 256, crop 224. The S branch resizes the crop to 240.

    Args:
        size: Side of the S branch's image, e.g. 240; the shorter side of an image is resized. Or
            (height, width), both resized.
        crop_pct: Ratio of the crop to the resized image, whose side is rounded down. Both say
            224 / 256; timm takes 1 at 408 pixels.
        mean: Of each channel, subtracted.
        std: Of each channel, divided by.
        protocol: "released" or "paper", which crops the L branch's size of ``branch_sizes``: 224
            for 240, 384 for 408, 480 for 504.

    Returns:
        A torchvision transform from a PIL image to a float32 tensor [3, height, width].

    Raises:
        ValueError: The protocol is unknown, or crop_pct is not in (0, 1].
        ImportError: torchvision is not installed.
    """
    if protocol not in ("released", "paper"):
        raise ValueError(f"protocol: expected 'released' or 'paper', found {protocol!r}")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: expected more than 0 and at most 1, found {crop_pct}")
    try:
        from torchvision import transforms
    except ImportError as error:
        raise ImportError(
            "image transforms need torchvision: pip install torchvision, of the same release as "
            "torch (https://pytorch.org)"
        ) from error

    crop = size
    if protocol == "paper":
        crop = branch_sizes(size, (12, 16))[1]
        crop = crop[0] if isinstance(size, int) else crop
    resized = (
        int(crop / crop_pct) if isinstance(crop, int) else [int(side / crop_pct) for side in crop]
    )
    return transforms.Compose(
        [
            transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

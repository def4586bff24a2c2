"""The image transform of the paper's evaluation, with torchvision."""

from __future__ import annotations

from typing import Any

from crossvit.configs import Size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Ratio of the resized image to its centre crop.
_RESIZE = (256, 224)


def eval_transform(size: int | Size) -> Any:
    """Resize to 256/224 of the size (bicubic), crop the centre, normalise as for ImageNet.

    Args:
        size: Side of the S branch's image, e.g. 240, which resizes the shorter side to
            int(256 / 224 * 240) = 274; or (height, width), both resized like this.

    Returns:
        A torchvision transform from a PIL image to a float32 tensor [3, height, width].

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision import transforms
    except ImportError as error:
        raise ImportError(
            "image transforms need torchvision: pip install torchvision, of the same release as "
            "torch (https://pytorch.org)"
        ) from error

    def larger(side: int) -> int:
        return _RESIZE[0] * side // _RESIZE[1]

    resized = larger(size) if isinstance(size, int) else tuple(map(larger, size))
    return transforms.Compose(
        [
            transforms.Resize(resized, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

"""The paper's named models (Table 1), and sizes derived from a configuration."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

Size = tuple[int, int]  # height, width, in pixels
ImageSize = int | Size | tuple[Size, Size]
Ratio = tuple[int, int]  # numerator, denominator


@dataclass(frozen=True)
class Config:
    """Architecture of a CrossViT; pairs are (S branch, L branch).

    Attributes:
        dims: Widths C of the branches.
        num_heads: Attention heads of the branches.
        depths: Transformer blocks of each branch in one multi-scale block: N and M.
        mlp_ratios: Hidden units of the feed-forward networks per channel: r.
        num_blocks: Number of multi-scale blocks: K.
        cross_depth: Cross-attention blocks per fusion: L.
        patch_sizes: P_s and P_l, in pixels.
        conv_stem: Whether patches are embedded by three convolutions (dagger) instead of one.
        img_size: See ``branch_sizes``.
    """

    dims: tuple[int, int]
    num_heads: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratios: tuple[float, float]
    num_blocks: int = 3
    cross_depth: int = 1
    patch_sizes: tuple[int, int] = (12, 16)
    conv_stem: bool = False
    img_size: ImageSize = 240


#: Ratio of the L branch's image side to the S branch's: 224 for 240.
_L_SCALE = (14, 15)
SAME_SCALE = ((1, 1), (1, 1))

# Name -> width of S (L is twice as wide), heads, M, mlp ratio.
_TABLE_1 = {
    "tiny": (96, 3, 4, 4.0),
    "small": (192, 6, 4, 4.0),
    "base": (384, 12, 4, 4.0),
    "9": (128, 4, 3, 3.0),
    "15": (192, 6, 5, 3.0),
    "18": (224, 7, 6, 3.0),
}
_DAGGERS = ("9", "15", "18")
_IMG_SIZES = (240, 408, 504)

#: Side of the L branch's image, in the authors' names, to that of the S branch, in ours and timm's.
_LARGE_SIZES = {"224": 240, "384": 408, "480": 504}
_LARGE_SIZE = re.compile(r"_(224|384|480)$")
_TIMM_PREFIX = re.compile(r"^(?:hf[-_]hub:)?timm/")


def _named() -> dict[str, Config]:
    configs = {}
    for name, (dim, heads, depth, ratio) in _TABLE_1.items():
        for stem in ("", "_dagger") if name in _DAGGERS else ("",):
            for size in _IMG_SIZES:
                configs[f"crossvit_{name}{stem}_{size}"] = Config(
                    dims=(dim, 2 * dim),
                    num_heads=(heads, heads),
                    depths=(1, depth),
                    mlp_ratios=(ratio, ratio),
                    conv_stem=bool(stem),
                    img_size=size,
                )
    return configs


_CONFIGS = _named()


def list_models(pattern: str = "*") -> list[str]:
    """List the names of the models, e.g. ``crossvit_15_dagger_408``.

    The number at the end is the side of the S branch's image: 240, 408 (the paper's @384, after
    its L branch) or 504 (@480).

    Args:
        pattern: Shell-style pattern that names must match.
    """
    from fnmatch import fnmatchcase

    return [name for name in _CONFIGS if fnmatchcase(name, pattern)]


def canonical_name(name: str) -> str:
    """Return the name in ``list_models`` that a model's other names stand for.

    These are names without a size (240 pixels), the authors' names, after the image of the L branch
    (``crossvit_15_224``, ``crossvit_15_dagger_384``), timm's, with the tag of its weights
    (``crossvit_15_240.in1k``), and the ids of timm's models on the Hugging Face hub.

    Raises:
        ValueError: The name is unknown; the message has the nearest known ones.
        TypeError: It is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, found {type(name).__name__}")
    base = _TIMM_PREFIX.sub("", name).removesuffix(".in1k")
    by_large_size = _LARGE_SIZE.sub(lambda match: f"_{_LARGE_SIZES[match[1]]}", base)
    for candidate in (base, f"{base}_240", by_large_size):
        if candidate in _CONFIGS:
            return candidate
    close = difflib.get_close_matches(by_large_size.lower(), _CONFIGS, n=3)
    meant = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(
        f"unknown model {name!r}: {meant}crossvit.list_models() has all {len(_CONFIGS)} names"
    )


def named_config(name: str) -> Config:
    """Return the configuration of a named model; ``canonical_name`` lists the accepted names.

    Raises:
        ValueError: The name is unknown.
    """
    return _CONFIGS[canonical_name(name)]


def branch_sizes(
    img_size: Any,
    patch_sizes: tuple[int, int],
    l_scale: tuple[Ratio, Ratio] = (_L_SCALE, _L_SCALE),
) -> tuple[Size, Size]:
    """Return (height, width) of each branch's image, in whole patches.

    Args:
        img_size: Side of a square image, or its (height, width): the S branch then sees this size
            and the L branch 14/15 of it (224 for 240), both rounded up to whole patches. Or
            ((height, width), (height, width)), one for each branch, exact.
        patch_sizes: P_s and P_l.
        l_scale: Another ratio than 14/15, of heights and of widths.

    Raises:
        ValueError: A size is not positive, or a branch's size is not a multiple of its patch.
        TypeError: img_size is not one of these three.
    """
    if isinstance(img_size, int):
        img_size = (img_size, img_size)
    if not isinstance(img_size, (tuple, list)) or len(img_size) != 2:
        raise TypeError(
            f"img_size: expected an int, (h, w) or ((h, w), (h, w)), found {img_size!r}"
        )
    if all(isinstance(side, int) for side in img_size):
        sizes = [
            whole_patches((img_size[0], img_size[1]), patch, scale)
            for patch, scale in zip(patch_sizes, (SAME_SCALE, l_scale), strict=True)
        ]
    else:
        sizes = [tuple(branch) if isinstance(branch, (tuple, list)) else () for branch in img_size]
        for size, patch in zip(sizes, patch_sizes, strict=True):
            if len(size) != 2 or not all(isinstance(side, int) for side in size):
                raise TypeError(f"img_size: expected ((h, w), (h, w)), found {img_size!r}")
            if any(side % patch for side in size):
                raise ValueError(f"img_size: {size} is no multiple of the patch size {patch}")
    if min(min(size) for size in sizes) <= 0:
        raise ValueError(f"img_size: expected positive sizes, found {img_size!r}")
    return sizes[0], sizes[1]


def whole_patches(size: Size, patch: int, scale: tuple[Ratio, Ratio] = SAME_SCALE) -> Size:
    """Scale (height, width), rounded up to whole patches."""
    # In integers: torch.compile's may be symbolic.
    height, width = (
        -(-side * numerator // (denominator * patch)) * patch
        for side, (numerator, denominator) in zip(size, scale, strict=True)
    )
    return height, width


def scale_of_l_branch(img_size: ImageSize) -> tuple[Ratio, Ratio]:
    """Return the L branch's height over the S branch's as (numerator, denominator), and widths.

    Args:
        img_size: As in ``branch_sizes``; sizes of both branches give their own ratio.
    """
    if isinstance(img_size, int) or isinstance(img_size[0], int):
        return _L_SCALE, _L_SCALE
    (small_h, small_w), (large_h, large_w) = img_size
    return (large_h, small_h), (large_w, small_w)

"""The paper's named models, and sizes derived from a configuration."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

Size = tuple[int, int]  # height, width, in pixels
ImageSize = int | Size | tuple[Size, Size]
Ratio = tuple[int, int]  # numerator, denominator


#: The paper's fusion schemes (section 3.3).
FUSIONS = ("cross", "none", "all", "class", "pairwise")
EMBEDDINGS = ("patch", "conv", "t2t")
T2T_LAYERS = ("transformer", "performer")


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
        embed: How patches are embedded: "patch" by one convolution, "conv" by three (the dagger
            models), "t2t" by a tokens-to-token module.
        img_size: See ``branch_sizes``.
        fusion: How branches are fused: "cross" by cross-attention (Eq. 5-7), "all" by attention of
            all tokens (Eq. 2), "class" by adding CLS tokens (Eq. 3), "pairwise" by adding all
            tokens (Eq. 4), "none" not at all.
        reread_patches: With ``cross_depth`` > 1, whether every cross-attention block reads the
            other branch's patches. In the released code only the first does.
        projections: Whether cross-attention has f and g; without them they are the identity, which
            needs equal widths.
        cls_token: Whether there are CLS tokens; without them branches are averaged (section 4.3).
        t2t_layers: Attention of the tokens-to-token modules, "transformer" or "performer".

    Raises:
        ValueError: A value is unknown or not positive, or two fields do not fit each other.
        TypeError: A field is of another type.
    """

    dims: tuple[int, int]
    num_heads: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratios: tuple[float, float]
    num_blocks: int = 3
    cross_depth: int = 1
    patch_sizes: tuple[int, int] = (12, 16)
    embed: str = "patch"
    img_size: ImageSize = 240
    fusion: str = "cross"
    reread_patches: bool = False
    projections: bool = True
    cls_token: bool = True
    t2t_layers: str = "transformer"

    def __post_init__(self) -> None:
        _one_of("fusion", self.fusion, FUSIONS)
        _one_of("embed", self.embed, EMBEDDINGS)
        _one_of("t2t_layers", self.t2t_layers, T2T_LAYERS)
        for name in ("dims", "num_heads", "depths", "mlp_ratios", "patch_sizes"):
            _pair(name, getattr(self, name))
        for name in ("dims", "num_heads", "patch_sizes"):
            _positive(name, *getattr(self, name))
        _positive("mlp_ratios", *self.mlp_ratios, kind=Real)
        _positive("num_blocks", self.num_blocks)
        _positive("cross_depth", self.cross_depth)
        if not all(isinstance(depth, Integral) for depth in self.depths):
            raise TypeError(f"depths: expected integers, found {self.depths!r}")
        if min(self.depths) < 0 or max(self.depths) == 0:
            raise ValueError(f"depths: expected 0 or more, and not twice 0, found {self.depths}")
        cross = {
            "cross_depth": self.cross_depth != 1,
            "reread_patches": self.reread_patches,
            "projections": not self.projections,
        }
        for name, changed in cross.items():
            if changed and self.fusion != "cross":
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected fusion='cross', "
                    f"found fusion={self.fusion!r}"
                )
        if self.reread_patches and self.cross_depth == 1:
            raise ValueError(
                "reread_patches=True: expected cross_depth of more than 1, found cross_depth=1"
            )
        if not self.projections and self.dims[0] != self.dims[1]:
            raise ValueError(f"projections=False: expected equal widths, found dims={self.dims}")
        if not self.cls_token and self.fusion not in ("cross", "none"):
            raise ValueError(
                f"cls_token=False: expected fusion='cross' or 'none', found fusion={self.fusion!r}"
            )
        if self.t2t_layers != "transformer" and self.embed != "t2t":
            raise ValueError(
                f"t2t_layers={self.t2t_layers!r}: expected embed='t2t', found embed={self.embed!r}"
            )
        for patch_size, dim in zip(self.patch_sizes, self.dims, strict=True):
            if self.embed != "patch" and stem_strides(patch_size) is None:
                raise ValueError(
                    f"embed={self.embed!r}: expected patch_sizes that are products of three "
                    f"strides, up to 7, 4 and 4, found patch_sizes={self.patch_sizes}"
                )
            if self.embed == "conv" and dim % 4:
                raise ValueError(
                    f"embed='conv': expected widths that 4 divides, found dims={self.dims}"
                )


@dataclass(frozen=True)
class VitConfig:
    """Architecture of a plain vision transformer.

    Attributes:
        dim: Width C.
        num_heads: Attention heads.
        depth: Transformer blocks.
        mlp_ratio: Hidden units of the feed-forward networks per channel.
        patch_size: In pixels.
        img_size: Side of a square image, or its (height, width); rounded up to whole patches.

    Raises:
        ValueError: A number is not positive.
        TypeError: A field is of another type.
    """

    dim: int
    num_heads: int
    depth: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    img_size: int | Size = 224

    def __post_init__(self) -> None:
        for name in ("dim", "num_heads", "depth", "patch_size"):
            _positive(name, getattr(self, name))
        _positive("mlp_ratio", self.mlp_ratio, kind=Real)
        if isinstance(self.img_size, (tuple, list)) and any(
            isinstance(side, (tuple, list)) for side in self.img_size
        ):
            raise TypeError(f"img_size: expected an int or (h, w), found {self.img_size!r}")


def stem_strides(patch_size: int) -> tuple[int, int, int] | None:
    """Return the strides of three overlapping steps from pixels to patches, or None.

    The dagger models' and T2T-ViT's: (4, 3, 1) for 12 pixels and (4, 2, 2) for 16. Others are
    chosen likewise: the first nearest to 4, at most 7, the others at most 4 and of equal size if
    possible, so that no step skips pixels.
    """
    strides = [
        (first, second, third)
        for first in range(1, 8)
        for second in range(1, 5)
        for third in range(1, second + 1)
        if first * second * third == patch_size
    ]
    return min(strides, key=lambda s: (abs(s[0] - 4), s[1]), default=None)


def _one_of(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: expected one of {', '.join(expected)}, found {value!r}")


def _pair(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair, found {value!r}")


def _positive(name: str, *values: Any, kind: type = Integral) -> None:
    found = values[0] if len(values) == 1 else values
    if not all(isinstance(value, kind) for value in values):
        expected = "integers" if kind is Integral else "numbers"
        raise TypeError(f"{name}: expected {expected}, found {found!r}")
    if min(values) <= 0:
        raise ValueError(f"{name}: expected more than 0, found {found}")


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

# Variants of models of Table 1: fusion schemes (Table 6), other parameters (Table 7, A to E), and
# those of section 4.3: no CLS, T2T.
_VARIANTS: dict[str, dict[str, Any]] = {
    "small_none_240": {"fusion": "none"},
    "small_class_240": {"fusion": "class"},
    "small_pairwise_240": {"fusion": "pairwise"},
    "small_all_240": {"fusion": "all"},
    "small_patch8_224": {"patch_sizes": (8, 16), "img_size": ((224, 224), (224, 224))},
    "small_width384_240": {"dims": (384, 384), "projections": False},
    "small_n2_240": {"depths": (2, 4)},
    "small_l2_240": {"cross_depth": 2},
    "small_l2_reread_240": {"cross_depth": 2, "reread_patches": True},
    "small_k6m2_240": {"num_blocks": 6, "depths": (1, 2)},
    "small_nocls_240": {"cls_token": False},
    "18_t2t_240": {"embed": "t2t"},
    "18_t2t_performer_240": {"embed": "t2t", "t2t_layers": "performer"},
}

# Name -> width, heads (Table 2).
_DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def _named() -> dict[str, Config | VitConfig]:
    configs: dict[str, Config | VitConfig] = {}
    for name, (dim, heads, depth, ratio) in _TABLE_1.items():
        for stem in ("", "_dagger") if name in _DAGGERS else ("",):
            for size in _IMG_SIZES:
                configs[f"crossvit_{name}{stem}_{size}"] = Config(
                    dims=(dim, 2 * dim),
                    num_heads=(heads, heads),
                    depths=(1, depth),
                    mlp_ratios=(ratio, ratio),
                    embed="conv" if stem else "patch",
                    img_size=size,
                )
    for name, changes in _VARIANTS.items():
        base = configs[f"crossvit_{name.partition('_')[0]}_240"]
        configs[f"crossvit_{name}"] = replace(base, **changes)
    for name, (dim, heads) in _DEIT.items():
        configs[f"deit_{name}_patch16_224"] = VitConfig(dim, heads)
    return configs


_CONFIGS = _named()


def list_models(pattern: str = "*") -> list[str]:
    """List the names of the models, e.g. ``crossvit_15_dagger_408``.

    The number at the end is the side of the S branch's image: 240, 408 (the paper's @384, after
    its L branch) or 504 (@480). Names of the paper's variants say what they change, in its letters:
    ``crossvit_small_class_240``, ``crossvit_small_k6m2_240``. DeiT's are timm's names.

    Args:
        pattern: Shell-style pattern that names must match.
    """
    from fnmatch import fnmatchcase

    return [name for name in _CONFIGS if fnmatchcase(name, pattern)]


def canonical_name(name: str) -> str:
    """Return the name in ``list_models`` that a model's other names stand for.

    These are names without a size (240 pixels; 224 for ``crossvit_small_patch8`` and DeiT), the
    authors' names, after the image of the L branch (``crossvit_15_224``,
    ``crossvit_15_dagger_384``), timm's, with the tag of its weights (``crossvit_15_240.in1k``), and
    the ids of timm's models on the Hugging Face hub.

    Raises:
        ValueError: The name is unknown; the message has the nearest known ones.
        TypeError: It is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a string, found {type(name).__name__}")
    base = _TIMM_PREFIX.sub("", name).removesuffix(".in1k").removesuffix(".fb_in1k")
    by_large_size = _LARGE_SIZE.sub(lambda match: f"_{_LARGE_SIZES[match[1]]}", base)
    for candidate in (base, f"{base}_240", f"{base}_224", by_large_size):
        if candidate in _CONFIGS:
            return candidate
    close = difflib.get_close_matches(by_large_size.lower(), _CONFIGS, n=3)
    meant = f"did you mean {', '.join(close)}? " if close else ""
    raise ValueError(
        f"unknown model {name!r}: {meant}crossvit.list_models() has all {len(_CONFIGS)} names"
    )


def named_config(name: str) -> Config | VitConfig:
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


def config_grids(config: Config | VitConfig) -> list[Size]:
    """Return (height, width) in patches of each branch, or of the only one."""
    if isinstance(config, Config):
        sizes: tuple[Size, ...] = branch_sizes(config.img_size, config.patch_sizes)
        patches: tuple[int, ...] = config.patch_sizes
    else:
        # The S branch's image has the given size.
        patches = (config.patch_size,)
        sizes = branch_sizes(config.img_size, (config.patch_size, 1))[:1]
    return [
        (height // patch, width // patch)
        for (height, width), patch in zip(sizes, patches, strict=True)
    ]

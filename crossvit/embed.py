"""The tokens of one branch from an image (the paper's Eq. 1, first line)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit.configs import Config, Size, stem_strides
from crossvit.t2t import TokensToToken
from crossvit_kernels.modules import plain_layers

_ONE_CONVOLUTION = plain_layers.layers({"proj": nn.Conv2d})


class PatchEmbed(nn.Module):
    """Embeds an image as patch tokens with one convolution, or the dagger models' three.

    Args:
        img_size: (H, W) of the image, multiples of patch_size. Only records the size: other
            multiples work as well.
        patch_size: P.
        in_chans: Channels of the image.
        dim: C.
        conv_stem: Use three convolutions with ReLU between them; see ``stem_strides``.

    Raises:
        ValueError: conv_stem with a patch size without such strides, or a dim not divisible by 4.
    """

    def __init__(
        self, img_size: Size, patch_size: int, in_chans: int, dim: int, conv_stem: bool = False
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.proj: nn.Module
        if conv_stem:
            self.proj = _conv_stem(patch_size, in_chans, dim)
        else:
            self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, in_chans, H, W] -> patch tokens [B, N, C]."""
        layers, reason = plain_layers.find(self._modules, _ONE_CONVOLUTION)
        if (
            reason is None
            and self._is_patchwise(layers[0])
            and plain_layers.why_not_tensors(layers[0]._parameters.values()) is None
        ):
            return self._project_patches(x, layers[0])
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)

    def _is_patchwise(self, proj: nn.Conv2d) -> bool:
        """Whether a convolution sees each patch once, separately."""
        size = (self.patch_size,) * 2
        apart = proj.kernel_size == proj.stride == size and proj.padding == (0, 0)
        return apart and proj.dilation == (1, 1) and proj.groups == 1

    def _project_patches(self, x: Tensor, proj: nn.Conv2d) -> Tensor:
        """Apply the convolution as one matrix product, which gives tokens in rows."""
        p = self.patch_size
        patches = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), proj.weight.flatten(1), proj.bias)


def make_embedding(config: Config, b: int, img_size: Size, in_chans: int) -> nn.Module:
    """Make the patch embedding of branch b, of ``config.embed``."""
    patch_size, dim = config.patch_sizes[b], config.dims[b]
    if config.embed == "t2t":
        return TokensToToken(img_size, patch_size, in_chans, dim, config.t2t_layers)
    return PatchEmbed(img_size, patch_size, in_chans, dim, config.embed == "conv")


def _conv_stem(patch_size: int, in_chans: int, dim: int) -> nn.Sequential:
    strides = stem_strides(patch_size)
    if strides is None:
        raise ValueError(f"conv_stem: no three strides multiply to a patch of {patch_size}")
    if dim % 4:
        raise ValueError(f"conv_stem: needs a width that 4 divides, found {dim}")

    def convolution(dim_in: int, dim_out: int, stride: int) -> nn.Conv2d:
        kernel_size = max(3, stride)
        padding = 0 if stride == kernel_size else 1
        return nn.Conv2d(dim_in, dim_out, kernel_size, stride, padding)

    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 4, kernel_size=7, stride=strides[0], padding=3),
        nn.ReLU(inplace=True),
        convolution(dim // 4, dim // 2, strides[1]),
        nn.ReLU(inplace=True),
        convolution(dim // 2, dim, strides[2]),
    )


def resize_image(x: Tensor, size: Size) -> Tensor:
    """Resize x [B, C, H, W] bicubically, as the released models do; x itself if it fits."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def resize_position_embedding(embedding: Tensor, old_grid: Size, new_grid: Size) -> Tensor:
    """Resize a branch's position embedding to another grid of patches, bicubically.

    Computed in float32, or in float64 for a float64 embedding.

    Args:
        embedding: [1, 1 + old height * old width, C], CLS first; or without the CLS.
        old_grid: (height, width) in patches.
        new_grid: (height, width) in patches.

    Returns:
        [1, 1 + new height * new width, C] in the same dtype; without the CLS if there was none.
    """
    if old_grid == new_grid:
        return embedding
    prefix = embedding.shape[1] - old_grid[0] * old_grid[1]
    cls, patches = embedding[:, :prefix], embedding[:, prefix:]
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    image = patches.unflatten(1, old_grid).permute(0, 3, 1, 2).to(dtype)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([cls, patches], dim=1)

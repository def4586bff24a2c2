"""The tokens of one branch from an image (the paper's Eq. 1, first line)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossvit.configs import Size
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
        conv_stem: Use three convolutions with ReLU between them, for patches of 12 or 16 pixels
            only.

    Raises:
        ValueError: conv_stem with another patch size, or with a dim not divisible by 4.
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


def _conv_stem(patch_size: int, in_chans: int, dim: int) -> nn.Sequential:
    if patch_size not in (12, 16):
        raise ValueError(f"conv_stem: its strides make patches of 12 or 16, not of {patch_size}")
    if dim % 4:
        raise ValueError(f"conv_stem: needs a width that 4 divides, found {dim}")
    # The first has stride 4; the others multiply to 3 or 4.
    (stride_2, padding_2), (stride_3, padding_3) = (
        ((3, 0), (1, 1)) if patch_size == 12 else ((2, 1), (2, 1))
    )
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 4, kernel_size=7, stride=4, padding=3),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim // 4, dim // 2, kernel_size=3, stride=stride_2, padding=padding_2),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim // 2, dim, kernel_size=3, stride=stride_3, padding=padding_3),
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
        embedding: [1, 1 + old height * old width, C], CLS first.
        old_grid: (height, width) in patches.
        new_grid: (height, width) in patches.

    Returns:
        [1, 1 + new height * new width, C] in the same dtype.
    """
    if old_grid == new_grid:
        return embedding
    cls, patches = embedding[:, :1], embedding[:, 1:]
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    image = patches.unflatten(1, old_grid).permute(0, 3, 1, 2).to(dtype)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    patches = image.flatten(2).transpose(1, 2).to(embedding.dtype)
    return torch.cat([cls, patches], dim=1)

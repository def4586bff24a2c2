"""Pairwise fusion (Eq. 4): tokens at the same place of the image are summed, and so are the CLS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit.configs import Size
from crossvit.fusion.branch import Branch
from crossvit.fusion.class_token import ClassTokenBlock


class PairwiseBlock(ClassTokenBlock):
    """A multi-scale block with pairwise fusion; f and g are those of class token fusion.

    The paper interpolates patch tokens "to align the spatial size" and does not say how. Here each
    branch's, after f, are resized to the other's grid with bilinear interpolation.
    """

    def fuse_branches(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        y = [self.projs[b](branch.tokens()) for b, branch in enumerate((small, large))]
        totals = (
            y[0] + resize_tokens(y[1], large.grid, small.grid),
            y[1] + resize_tokens(y[0], small.grid, large.grid),
        )
        return (
            small.with_tokens(self.revert_projs[0](totals[0])),
            large.with_tokens(self.revert_projs[1](totals[1])),
        )


def resize_tokens(tokens: Tensor, old_grid: Size, new_grid: Size) -> Tensor:
    """Resize patch tokens to another grid, bilinearly; the CLS stays.

    Args:
        tokens: [B, 1 + old height * old width, C], CLS first.
        old_grid: (height, width) in patches.
        new_grid: (height, width) in patches.

    Returns:
        [B, 1 + new height * new width, C].
    """
    if old_grid == new_grid:
        return tokens
    patches = tokens[:, 1:].unflatten(1, old_grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([tokens[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

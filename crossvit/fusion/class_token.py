"""Class token fusion (Eq. 3): the sum of the CLS tokens replaces both."""

from __future__ import annotations

from typing import Any

from torch import nn

from crossvit.backbone import EPS
from crossvit.configs import Config
from crossvit.fusion.block import MultiScaleBlock
from crossvit.fusion.branch import Branch
from crossvit_kernels.modules.layers import lift


class ClassTokenBlock(MultiScaleBlock):
    """A multi-scale block with class token fusion, at the width of the L branch.

    f and g of the L branch are the identity, with which the paper's parameters come out (Table 6).
    Those of the S branch work on one row per image, in PyTorch's layers: next to the transformer
    blocks they take no time. The arguments are those of ``MultiScaleBlock``.
    """

    def __init__(self, config: Config, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        small, large = config.dims
        self.projs = nn.ModuleList([lift(small, large, EPS), nn.Identity()])
        self.revert_projs = nn.ModuleList([lift(large, small, EPS), nn.Identity()])

    def fuse_branches(self, small: Branch, large: Branch) -> tuple[Branch, Branch]:
        total = self.projs[0](small.cls) + self.projs[1](large.cls)
        return (
            small.with_cls(self.revert_projs[0](total)),
            large.with_cls(self.revert_projs[1](total)),
        )

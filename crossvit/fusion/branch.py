"""The tokens of one branch between the parts of a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from crossvit.configs import Size


class Branch(NamedTuple):
    """The tokens of a branch; ``new_cls``, if any, stands in for row 0, which saves a copy of x."""

    x: Tensor  # [B, 1 + N, C]; [B, N, C] without a CLS
    new_cls: Tensor | None = None  # [B, C]
    grid: Size = (0, 0)  # (height, width) of the N patches
    has_cls: bool = True

    @property
    def cls(self) -> Tensor:
        """The CLS [B, C]; in a branch without one the mean of its patches (section 4.3)."""
        if not self.has_cls:
            return self.x.mean(dim=1)
        return self.x[:, 0] if self.new_cls is None else self.new_cls

    @property
    def prefix_tokens(self) -> Tensor:
        """The CLS, [B, 1, C]; [B, 0, C] without one."""
        return self.cls.unsqueeze(1) if self.has_cls else self.x[:, :0]

    @property
    def patches(self) -> Tensor:
        """[B, N, C], a view."""
        return self.x[:, 1:] if self.has_cls else self.x

    def tokens(self) -> Tensor:
        """[B, 1 + N, C] in one tensor; a copy if there is a new CLS."""
        if self.new_cls is None:
            return self.x
        return torch.cat([self.new_cls.unsqueeze(1), self.patches], dim=1)

    def with_tokens(self, x: Tensor, new_cls: Tensor | None = None) -> Branch:
        """The branch with other tokens."""
        return Branch(x, new_cls, self.grid, self.has_cls)

    def with_cls(self, cls: Tensor) -> Branch:
        """The branch with another CLS [B, C]; without one it is added to every patch.

        The paper does not say where the result of a fusion goes if there is no CLS.
        """
        if self.has_cls:
            return self.with_tokens(self.x, cls)
        return self.with_tokens(self.x + cls.unsqueeze(1))

"""Sums over what programs stored of the gradients of vectors: biases, norms, scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def column_sums(
    shares: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Return the sums of shares [R, C] over R, in parts of ``sizes``, each in its dtype.

    On a GPU a sum of many columns takes as long as one of few, and so does a copy: launches count.
    """
    total = shares.sum(dim=0)
    parts = {dtype: _parts(total.to(dtype), sizes) for dtype in {*dtypes}}
    return [parts[dtype][index] for index, dtype in enumerate(dtypes)]


def _parts(total: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Copy parts of a vector, so that none of them keeps the memory of all."""
    parts = [total.new_empty(size) for size in sizes]
    torch.ops.aten.split_with_sizes_copy.out(total, sizes, out=parts)
    return parts

"""Graphs and two streams, without a GPU."""

from __future__ import annotations

import pytest
import torch

from crossvit_kernels import graphs


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="expected a CUDA tensor, found one on cpu"):
        graphs.make_graphed(torch.nn.Identity(), torch.zeros(1))
    with pytest.raises(TypeError, match="expected a tensor, found int"):
        graphs.make_graphed(torch.nn.Identity(), [3])
    with pytest.raises(ValueError, match="at least one tensor"):
        graphs.make_graphed(torch.nn.Identity(), [])


def test_side_by_side_without_a_graph() -> None:
    x = torch.zeros(2)
    results = graphs.side_by_side(lambda: x + 1, lambda: x + 2, like=x)
    assert torch.equal(torch.stack(results), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))

"""Every way in which layernorm_ffn launches its kernels, for ``crossvit_kernels.inspect``."""

from __future__ import annotations

from crossvit_kernels.gpu import row_tiles
from crossvit_kernels.gpu.ahead_of_time import Dtypes, empty, empty_weights
from crossvit_kernels.ops.layernorm_ffn import triton
from crossvit_kernels.ops.layernorm_ffn.weights import SHAPES, FfnWeights

_EPS = 1e-6


def run(dtypes: Dtypes, channels: int, hidden: int) -> None:
    """Inference, and training with drop path and without; of tensors on the meta device."""
    w = FfnWeights(*empty_weights(SHAPES, {"C": channels, "F": hidden}, dtypes))
    for num_rows in (16, row_tiles.FEW_ROWS + 1):
        x = empty((1, num_rows, channels), dtypes.tokens)
        triton.forward(x, w, None, _EPS, save=False)
        for scale in (None, x.new_empty(1)):
            y, saved = triton.forward(x, w, scale, _EPS, save=True)
            assert saved is not None
            triton.backward(y, x, w, scale, saved, _EPS, [True] * (1 + len(w)))

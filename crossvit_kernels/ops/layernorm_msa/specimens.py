"""Every way in which layernorm_msa launches its kernels, for ``crossvit_kernels.inspect``."""

from __future__ import annotations

from crossvit_kernels.gpu import row_tiles
from crossvit_kernels.gpu.ahead_of_time import Dtypes, empty, empty_weights
from crossvit_kernels.ops.layernorm_msa import triton
from crossvit_kernels.ops.layernorm_msa.weights import SHAPES, MsaWeights

_EPS = 1e-6


def run(dtypes: Dtypes, channels: int, heads: int) -> None:
    """Inference, and training with drop path and without; of tensors on the meta device."""
    w = MsaWeights(*empty_weights(SHAPES, {"C": channels}, dtypes))
    for num_rows in (16, row_tiles.FEW_ROWS + 1):
        x = empty((1, num_rows, channels), dtypes.tokens)
        for cls in (None, x[:, 0]):
            triton.forward(x, w, None, cls, heads, _EPS, keep="")
            for keep in ("fast", "lean"):
                for scale in (None, x.new_empty(1)):
                    y, saved = triton.forward(x, w, scale, cls, heads, _EPS, keep)
                    assert saved is not None
                    triton.backward(y, x, w, scale, cls, saved, heads, _EPS, [True] * (2 + len(w)))

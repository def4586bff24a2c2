"""Every way in which a fusion launches its kernels, for ``crossvit_kernels.inspect``."""

from __future__ import annotations

from crossvit_kernels.gpu.ahead_of_time import Dtypes, empty, empty_weights
from crossvit_kernels.ops.cross_attention import triton
from crossvit_kernels.ops.cross_attention.weights import SHAPES, FusionInputs, FusionWeights

_EPS = 1e-6
#: Images that one kernel does; that three do, with as few and as many to a program as there are.
_BATCHES = (1, 65, 1024)


def run(dtypes: Dtypes, own: int, channels: int, heads: int) -> None:
    """Forward and backward of tensors on the meta device, with drop path and without; backward also
    without the tokens' gradient.
    """
    for batch in _BATCHES:
        cls, x, w, *_ = _inputs(batch, dtypes, own, channels, heads)
        for scale in (None, cls.new_empty(batch)):
            new_cls, saved = triton.forward(cls, x, w, scale, heads, _EPS)
            for wants_tokens in (True, False) if scale is None else (True,):
                wanted = [True, wants_tokens, *[True] * len(w)]
                triton.backward(new_cls, cls, x, w, scale, saved, heads, _EPS, wanted)


def run_pair(dtypes: Dtypes, own: int, channels: int, heads: int) -> None:
    """Both fusions of a block, which inference does in one launch."""
    widths = (own, channels), (channels, own)
    a, b = (_inputs(1, dtypes, *of_one, heads) for of_one in widths)
    triton.forward_pair(a, b, _EPS)


def _inputs(batch: int, dtypes: Dtypes, own: int, channels: int, heads: int) -> FusionInputs:
    weights = empty_weights(SHAPES, {"C_own": own, "C": channels}, dtypes)
    cls, x = empty((batch, own), dtypes.tokens), empty((batch, 16, channels), dtypes.tokens)
    return FusionInputs(cls, x, FusionWeights(*weights), heads)

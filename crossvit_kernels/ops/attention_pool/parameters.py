"""The parameters of an attention-pooling head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: (weight, bias) of a LayerNorm; either may be None.
Norm = tuple[Tensor | None, Tensor | None]


class PoolParameters(NamedTuple):
    """Projections and norms of ``attention_pool``. Linear weights are [out, in]."""

    w_q: Tensor | None  # [D, C_q]; None: the query is already projected, D = C_q
    b_q: Tensor | None
    w_k: Tensor  # [D, C]
    b_k: Tensor | None
    w_v: Tensor  # [D_v, C]
    b_v: Tensor | None
    w_o: Tensor | None  # [C_out, D_v]; None: no output projection
    b_o: Tensor | None
    query_norm: Norm | None
    token_norm: Norm | None
    norm_eps: float

    def tensors(self) -> list[Tensor | None]:
        """Return all tensors."""
        norms = [t for norm in (self.query_norm, self.token_norm) if norm for t in norm]
        return [*self[:8], *norms]


class PoolCall(NamedTuple):
    """The remaining options of a call."""

    num_heads: int
    scale: float
    include_query: bool
    dropout_p: float
    return_weights: bool

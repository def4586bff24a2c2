"""A transformer block and its halves: sizes, contenders, and the results they must give."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import inputs
import measure
import torch
import torch.nn.functional as F
from contender import Contender, compiled_contender, our_contender
from inputs import EPS, TRAINED
from torch import Tensor

import crossvit_kernels as ck

PARTS = ("msa", "ffn", "block")
_MSA, _FFN = ck.MsaWeights._fields, ck.FfnWeights._fields

#: Called with x and the weights of the part.
BlockCall = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class BlockSize:
    """A width at a batch size; ``name`` is the model and branch."""

    name: str
    batch: int
    tokens: int
    channels: int
    heads: int
    hidden: int

    def weights(self, part: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape; in a block the names are prefixed with the half."""
        c, f = self.channels, self.hidden
        msa = dict(zip(_MSA, [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,)], strict=True))
        ffn = dict(zip(_FFN, [(c,), (c,), (f, c), (f,), (c, f), (c,)], strict=True))
        if part != "block":
            return msa if part == "msa" else ffn
        return {f"msa.{k}": v for k, v in msa.items()} | {f"ffn.{k}": v for k, v in ffn.items()}

    def flop(self, part: str, mode: str) -> float:
        """FLOP of the matrix products."""
        rows, c = self.batch * self.tokens, self.channels
        linears, attention = 0.0, 0.0
        if part != "ffn":
            linears, attention = 8.0 * rows * c * c, 4.0 * rows * self.tokens * c
        if part != "msa":
            linears += 4.0 * rows * c * self.hidden
        # Backward adds as many for the gradient of x, and as many for those of the weights.
        needs_dx, needs_dw = TRAINED[mode]
        return linears * (1 + needs_dx + needs_dw) + attention * (3 if needs_dx else 1)

    def floor_seconds(self, part: str, mode: str, itemsize: int, limits: measure.Ceilings) -> float:
        """Time of the products, or of x in and y out (with backward also x and dy in, dx out)."""
        x_bytes = self.batch * self.tokens * self.channels * itemsize
        needs_dx, _ = TRAINED[mode]
        by_bytes = (5 if needs_dx else 2) * x_bytes / limits.copy_bytes_per_second
        return max(by_bytes, self.flop(part, mode) / limits.matmul_flops_per_second)


def make_inputs(
    part: str, size: BlockSize, mode: str, device: torch.device, dtype: torch.dtype
) -> inputs.Inputs:
    x_shape = size.batch, size.tokens, size.channels
    return inputs.make_inputs(
        (["y"], ["x"]),
        lambda normal: (normal(*x_shape),),
        size.weights(part),
        x_shape,
        mode,
        device,
        dtype,
    )


# Contenders.


def timm_msa(x: Tensor, weights: Sequence[Tensor], heads: int) -> Tensor:
    w = ck.MsaWeights(*weights)
    normed = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + F.linear(attended, w.out_weight, w.out_bias)


def timm_ffn(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    w = ck.FfnWeights(*weights)
    normed = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    return x + F.linear(
        F.gelu(F.linear(normed, w.fc1_weight, w.fc1_bias)), w.fc2_weight, w.fc2_bias
    )


def timm_like(part: str, size: BlockSize) -> BlockCall:
    """The operators that timm's Block calls, including SDPA."""

    def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if part != "ffn":
            x = timm_msa(x, weights[: len(_MSA)], size.heads)
        return x if part == "msa" else timm_ffn(x, weights[-len(_FFN) :])

    return call


def ours(part: str, size: BlockSize, backend: str, keep: str = "fast") -> BlockCall:
    """The operations of crossvit_kernels on one backend; "auto" lets them choose."""

    def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if part != "ffn":
            msa = ck.MsaWeights(*weights[: len(_MSA)])
            x = ck.layernorm_msa(x, msa, size.heads, EPS, keep=keep, backend=backend)
        if part == "msa":
            return x
        return ck.layernorm_ffn(x, ck.FfnWeights(*weights[-len(_FFN) :]), EPS, backend=backend)

    return call


def contenders(part: str, size: BlockSize, options: argparse.Namespace) -> list[Contender]:
    """All contenders, eager first."""
    baselines = {"eager": ours(part, size, "reference"), "timm-like": timm_like(part, size)}
    candidates = [Contender(name, call) for name, call in baselines.items()]
    candidates += [compiled_contender(name, call, options) for name, call in baselines.items()]
    for backend in options.backends:
        call = ours(part, size, backend)
        candidates.append(our_contender(backend, call, options))
        if backend in ("triton", "cuda") and part != "ffn":
            lean = ours(part, size, backend, keep="lean")
            candidates.append(our_contender(backend, lean, options, "lean"))
    return candidates

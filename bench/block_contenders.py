"""A transformer block and its halves: sizes, what computes them, and what they must compute."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence

import inputs
import measure
import torch
import torch.nn.functional as F
from contender import Contender, compiled_contender, our_contender
from inputs import EPS, TRAINED
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.ops.common import configs

PARTS = ("msa", "ffn", "block")
_MSA, _FFN = ck.MsaWeights._fields, ck.FfnWeights._fields

#: x and the part's weights.
BlockCall = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class BlockSize:
    """One width at one batch; ``name`` says whose."""

    name: str
    batch: int
    tokens: int
    channels: int
    heads: int
    hidden: int

    def weights(self, part: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape; in a block the names of the halves' weights tell which half."""
        c, f = self.channels, self.hidden
        msa = dict(zip(_MSA, [(c,), (c,), (3 * c, c), (3 * c,), (c, c), (c,)], strict=True))
        ffn = dict(zip(_FFN, [(c,), (c,), (f, c), (f,), (c, f), (c,)], strict=True))
        if part != "block":
            return msa if part == "msa" else ffn
        return {f"msa.{k}": v for k, v in msa.items()} | {f"ffn.{k}": v for k, v in ffn.items()}

    def flop(self, part: str, mode: str) -> float:
        """Of the matrix products."""
        rows, c = self.batch * self.tokens, self.channels
        linears, attention = 0.0, 0.0
        if part != "ffn":
            linears, attention = 8.0 * rows * c * c, 4.0 * rows * self.tokens * c
        if part != "msa":
            linears += 4.0 * rows * c * self.hidden
        # Backward needs as many again for the gradient of x, and for those of the weights.
        of_x, of_weights = TRAINED[mode]
        return linears * (1 + of_x + of_weights) + attention * (3 if of_x else 1)

    def floor_seconds(self, part: str, mode: str, itemsize: int, limits: measure.Ceilings) -> float:
        """Of the products, or of reading x and writing y; backward reads x and dy, writes dx."""
        x_bytes = self.batch * self.tokens * self.channels * itemsize
        of_x, _ = TRAINED[mode]
        by_bytes = (5 if of_x else 2) * x_bytes / limits.copy_bytes_per_second
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


# What computes them.


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
    """The operators that timm's Block calls, SDPA among them."""

    def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if part != "ffn":
            x = timm_msa(x, weights[: len(_MSA)], size.heads)
        return x if part == "msa" else timm_ffn(x, weights[-len(_FFN) :])

    return call


def ours(part: str, size: BlockSize, backend: str, keep: str = "fast") -> BlockCall:
    """The operations of crossvit_kernels on one backend, "auto" for that which they choose."""

    def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if part != "ffn":
            msa = ck.MsaWeights(*weights[: len(_MSA)])
            x = ck.layernorm_msa(x, msa, size.heads, EPS, keep=keep, backend=backend)
        if part == "msa":
            return x
        return ck.layernorm_ffn(x, ck.FfnWeights(*weights[-len(_FFN) :]), EPS, backend=backend)

    return call


def contenders(part: str, size: BlockSize, options: argparse.Namespace) -> list[Contender]:
    """Eager first."""
    baselines = {"eager": ours(part, size, "reference"), "timm-like": timm_like(part, size)}
    found = [Contender(name, call) for name, call in baselines.items()]
    found += [compiled_contender(name, call, options) for name, call in baselines.items()]
    for backend in options.backends:
        call = ours(part, size, backend)
        variants = ("fused", "split", "library") if backend == "triton" else ("auto",)
        for variant in variants:
            within = functools.partial(configs.VARIANTS.choose, variant)
            shown = "" if variant == "auto" else variant
            found.append(our_contender(backend, call, options, shown, within=within))
        if backend == "triton" and part != "ffn":
            lean = ours(part, size, backend, keep="lean")
            found.append(our_contender(backend, lean, options, "lean"))
    return found

"""A transformer block and its halves: sizes, what computes them, and what they must compute."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import contest
import measure
import torch
import torch.nn.functional as F
from contest import Contender
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.gpu import row_tiles

EPS = 1e-6
PARTS = ("msa", "ffn", "block")
_MSA, _FFN = ck.MsaWeights._fields, ck.FfnWeights._fields

Call = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
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
        return linears * (1 + sum(measure.TRAINED[mode])) + attention * (
            3 if measure.TRAINED[mode][0] else 1
        )

    def floor_seconds(self, part: str, mode: str, size: int, limits: measure.Ceilings) -> float:
        """Of the products, or of reading x and writing y; backward reads x and dy, writes dx."""
        token_matrix = self.batch * self.tokens * self.channels * size
        by_bytes = (
            (5 if measure.TRAINED[mode][0] else 2) * token_matrix / limits.copy_bytes_per_second
        )
        return max(by_bytes, self.flop(part, mode) / limits.matmul_flops_per_second)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Leaves, of which those that a mode trains require a gradient."""

    x: Tensor
    weights: list[Tensor]
    head: Tensor
    dy: Tensor
    mode: str

    def converted(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad)

        weights = [leaf(w) for w in self.weights]
        return Inputs(leaf(self.x), weights, leaf(self.head), leaf(self.dy), self.mode)


def make_inputs(
    part: str, sizes: Sizes, mode: str, device: torch.device, dtype: torch.dtype
) -> Inputs:
    torch.manual_seed(0)
    of_x, of_weights = measure.TRAINED[mode]

    def random(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale + mean).to(dtype)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        mean = 1.0 if name.endswith("norm_weight") else 0.0
        return random(*shape, scale=scale, mean=mean).requires_grad_(of_weights)

    x = random(sizes.batch, sizes.tokens, sizes.channels)
    head = random(measure.CLASSES, sizes.channels, scale=sizes.channels**-0.5)
    trains_head = mode == "heads"
    return Inputs(
        x.requires_grad_(of_x),
        [weight(*named) for named in sizes.weights(part).items()],
        head.requires_grad_(trains_head),
        random(sizes.batch, measure.CLASSES) if trains_head else random(*x.shape),
        mode,
    )


def results_of(call: Call, inputs: Inputs, form: str = "auto") -> list[Tensor]:
    """Output, then the gradients that the mode asks for."""
    with row_tiles.FORMS.choose(form), torch.set_grad_enabled(inputs.mode != "forward"):
        y = call(inputs.x, inputs.weights)
        leaves = [t for t in (inputs.x, *inputs.weights, inputs.head) if t.requires_grad]
        if not leaves:
            return [y]
        trained = F.linear(y.mean(dim=1), inputs.head) if inputs.mode == "heads" else y
        return [y.detach(), *torch.autograd.grad(trained, leaves, inputs.dy)]


def result_names(part: str, sizes: Sizes, mode: str) -> list[str]:
    of_x, of_weights = measure.TRAINED[mode]
    names = ["y", *(["grad x"] if of_x else [])]
    names += [f"grad {name}" for name in sizes.weights(part)] if of_weights else []
    return names + (["grad head"] if mode == "heads" else [])


def tolerances(part: str, sizes: Sizes, inputs: Inputs) -> dict[str, measure.Tolerance]:
    """For each result its float64 value, and the error that eager makes in the run's dtype."""
    definition = ours(part, sizes, "reference")
    exact = results_of(definition, inputs.converted(torch.float64))
    eager = results_of(definition, inputs)
    names = result_names(part, sizes, inputs.mode)
    return measure.tolerances(names, exact, eager, inputs.x.dtype)


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


def timm_like(part: str, sizes: Sizes) -> Call:
    """The operators that timm's Block calls, SDPA among them."""

    def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if part != "ffn":
            x = timm_msa(x, weights[: len(_MSA)], sizes.heads)
        return x if part == "msa" else timm_ffn(x, weights[-len(_FFN) :])

    return call


def ours(part: str, sizes: Sizes, backend: str, keep: str = "fast") -> Call:
    """The operations of crossvit_kernels on one backend, "auto" for that which they choose."""

    def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if part != "ffn":
            msa = ck.MsaWeights(*weights[: len(_MSA)])
            x = ck.layernorm_msa(x, msa, sizes.heads, EPS, keep=keep, backend=backend)
        if part == "msa":
            return x
        return ck.layernorm_ffn(x, ck.FfnWeights(*weights[-len(_FFN) :]), EPS, backend=backend)

    return call


def contenders(
    part: str, sizes: Sizes, inputs: Inputs, options: argparse.Namespace
) -> list[Contender]:
    """Eager first."""

    def contender(name: str, call: Call, form: str = "auto", **facts: Any) -> Contender:
        return Contender(name, lambda _: results_of(call, inputs, form), **facts)

    baselines = {"eager": ours(part, sizes, "reference"), "timm-like": timm_like(part, sizes)}
    found = [contender(name, call) for name, call in baselines.items()]
    skip = "--no-compile" if options.no_compile else None
    for name, call in baselines.items():
        compiled = contest.compiled(call, options)
        found.append(contender(f"{name}, compiled", compiled, compiled=True, skip=skip))
    for backend in options.backends:
        facts = {"ours": True, "may_decline": backend not in options.named}
        call = ours(part, sizes, backend)
        if backend != "triton":
            found.append(contender(contest.our_name(backend), call, **facts))
            continue
        for form in ("fused", "split", "library"):
            found.append(contender(contest.our_name(f"triton, {form}"), call, form, **facts))
        if part != "ffn":
            lean = ours(part, sizes, backend, keep="lean")
            found.append(contender(contest.our_name("triton, lean"), lean, **facts))
    return found

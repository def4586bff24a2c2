"""The fusion's shapes and inputs, and its contenders: what they are, and what they must compute."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import contest
import environment
import measure
import torch
import torch.nn.functional as F
from measure import Tolerance
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.gpu import configurations
from crossvit_kernels.ops.cross_attention import reference

EPS = 1e-6

Fusion = Callable[[Tensor, Tensor, ck.FusionWeights, int], Tensor]
Pair = Callable[[ck.FusionInputs, ck.FusionInputs], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One point of measurement. ``tokens`` counts the rows attended to, the CLS included.

    With ``pair_tokens`` both fusions of a block are measured: that of the other branch's CLS too.
    """

    tokens: int
    batch: int
    dim: int
    own_dim: int
    heads: int
    dtype: torch.dtype
    pair_tokens: int = 0

    @property
    def other(self) -> Shape | None:
        """The other fusion of a block."""
        if not self.pair_tokens:
            return None
        widths = {"dim": self.own_dim, "own_dim": self.dim}
        return dataclasses.replace(self, tokens=self.pair_tokens, pair_tokens=0, **widths)

    @property
    def token_bytes(self) -> int:
        own = self.batch * (self.tokens - 1) * self.dim * self.dtype.itemsize
        return own + (self.other.token_bytes if self.other else 0)

    def floor_bytes(self, mode: str) -> int:
        """What must cross the memory interface: the patches once, thrice with their gradient."""
        of_x, of_weights = measure.TRAINED[mode]
        if self.other:
            alone = dataclasses.replace(self, pair_tokens=0)
            return alone.floor_bytes(mode) + self.other.floor_bytes(mode)
        cls = self.batch * self.own_dim
        weights = 4 * self.dim**2 + 2 * self.dim * self.own_dim + 9 * self.dim + 3 * self.own_dim
        if not of_x:
            return self.token_bytes + (2 * cls + weights) * self.dtype.itemsize
        # Read, read again, gradient written; of the CLS: in, out, and both gradients.
        of_weights = 3 if of_weights else 2
        return 3 * self.token_bytes + (4 * cls + of_weights * weights) * self.dtype.itemsize

    def flops(self, mode: str) -> int:
        """Of the absorbed algorithm: two products a head over the tokens, seven with backward."""
        pass_over_tokens = 2 * self.tokens * self.dim * self.heads
        projections = 8 * self.dim**2 + 4 * self.dim * self.own_dim
        of_x, of_weights = measure.TRAINED[mode]
        passes, paths = 7 if of_x else 2, 1 + of_x + of_weights
        own = self.batch * (passes * pass_over_tokens + paths * projections)
        return own + (self.other.flops(mode) if self.other else 0)


@dataclasses.dataclass
class Inputs:
    """Weights, the upstream gradient, and (cls, tokens) pairs to rotate through."""

    weights: ck.FusionWeights
    upstream: Tensor
    sets: list[tuple[Tensor, Tensor]]
    head: Tensor  # of a classifier on the CLS
    other: Inputs | None = None  # of the other fusion of a block

    def tensors(self, index: int) -> list[Tensor]:
        """All of one pair."""
        return [*self.sets[index], *(w for w in self.weights if w is not None), self.head]

    def leaves(self, index: int) -> list[Tensor]:
        """What gradients are taken of, for one pair."""
        return [t for t in self.tensors(index) if t.requires_grad]

    def prepare(self, mode: str) -> None:
        """Require the gradients that the mode asks for, and no others."""
        of_x, of_weights = measure.TRAINED[mode]
        for pair in self.sets:
            for t in pair:
                t.requires_grad_(of_x)
        for w in self.weights:
            if w is not None:
                w.requires_grad_(of_weights)
        self.head.requires_grad_(mode == "heads")


def make_inputs(shape: Shape, device: torch.device, sets: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(*size, generator=generator, device=device) * scale + mean
        return x.to(shape.dtype).requires_grad_()

    def norm(width: int) -> list[Tensor]:
        return [normal(width, scale=0.1, mean=1.0), normal(width, scale=0.1)]

    def linear(fan_in: int, fan_out: int) -> list[Tensor]:
        return [normal(fan_out, fan_in, scale=fan_in**-0.5), normal(fan_out, scale=0.1)]

    def cls_and_tokens() -> tuple[Tensor, Tensor]:
        branch = normal(shape.batch, shape.tokens, shape.dim)
        patches = branch.detach()[:, 1:].requires_grad_()  # a view, as the model passes them
        return normal(shape.batch, shape.own_dim), patches

    dim, own_dim = shape.dim, shape.own_dim
    tensors = norm(own_dim) + linear(own_dim, dim) + norm(dim)
    for _ in range(4):  # q, k, v, out
        tensors += linear(dim, dim)
    tensors += norm(dim) + linear(dim, own_dim)
    return Inputs(
        # Parameters, so that CUDA graphs of compiled baselines need not copy them.
        weights=ck.FusionWeights(*map(torch.nn.Parameter, tensors)),
        upstream=normal(shape.batch, own_dim).detach(),
        sets=[cls_and_tokens() for _ in range(sets)],
        head=normal(measure.CLASSES, shape.own_dim, scale=shape.own_dim**-0.5),
        other=make_inputs(shape.other, device, sets) if shape.other else None,
    )


def rotated_sets(shape: Shape, device: torch.device) -> int:
    """So many that their tokens are four times a GPU's L2, or 2048; one on a CPU."""
    if device.type == "cpu":
        return 1
    return min(max(2, math.ceil(4 * environment.l2_bytes(device) / shape.token_bytes)), 2048)


# The contenders that PyTorch offers. They share f and g with the definition.


def _lift(cls: Tensor, w: ck.FusionWeights) -> Tensor:
    x = F.layer_norm(cls, cls.shape[-1:], w.proj_norm_weight, w.proj_norm_bias, EPS)
    return F.linear(F.gelu(x), w.proj_weight, w.proj_bias)


def _lower(y: Tensor, w: ck.FusionWeights) -> Tensor:
    x = F.layer_norm(y, y.shape[-1:], w.back_norm_weight, w.back_norm_bias, EPS)
    return F.linear(F.gelu(x), w.back_weight, w.back_bias)


def eager(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
    return reference.cross_attention_fusion(cls, tokens, w, heads, EPS)


def sdpa(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
    y0 = _lift(cls, w)
    x = torch.cat([y0.unsqueeze(1), tokens], dim=1)
    x = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)

    def split(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], heads, -1).transpose(1, 2)

    q = split(F.linear(x[:, :1], w.q_weight, w.q_bias))
    k = split(F.linear(x, w.k_weight, w.k_bias))
    v = split(F.linear(x, w.v_weight, w.v_bias))
    pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)  # [B, h, 1, d]
    return _lower(y0 + F.linear(pooled, w.out_weight, w.out_bias), w)


def _pool(u: Tensor, xhat: Tensor) -> Tensor:
    return (u @ xhat.transpose(1, 2)).softmax(dim=-1) @ xhat


def _pool_sdpa(u: Tensor, xhat: Tensor) -> Tensor:
    # One head whose queries are our heads: keys and values are read once for all of them.
    x = xhat.unsqueeze(1)
    return F.scaled_dot_product_attention(u.unsqueeze(1), x, x, scale=1.0).squeeze(1)


def absorbed(
    cls: Tensor,
    tokens: Tensor,
    w: ck.FusionWeights,
    heads: int,
    pool: Callable[[Tensor, Tensor], Tensor] = _pool,
) -> Tensor:
    """W_k and W_v act on the query and on the pooled tokens, so that K and V never exist."""
    dim = tokens.shape[-1]
    y0 = _lift(cls, w)
    q = F.linear(F.layer_norm(y0, (dim,), w.norm_weight, w.norm_bias, EPS), w.q_weight, w.q_bias)
    q = (q * (dim // heads) ** -0.5).view(len(q), heads, -1).transpose(0, 1)  # [h, B, d]
    u = (q @ w.k_weight.view(heads, -1, dim)).transpose(0, 1) * w.norm_weight  # [B, h, C]
    xhat = F.layer_norm(torch.cat([y0.unsqueeze(1), tokens], dim=1), (dim,), eps=EPS)
    z = pool(u, xhat) * w.norm_weight + w.norm_bias  # [B, h, C]
    o = z.transpose(0, 1) @ w.v_weight.view(heads, -1, dim).transpose(1, 2)  # [h, B, d]
    o = o.transpose(0, 1).flatten(1)
    if w.v_bias is not None:
        o = o + w.v_bias
    return _lower(y0 + F.linear(o, w.out_weight, w.out_bias), w)


def absorbed_sdpa(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
    return absorbed(cls, tokens, w, heads, _pool_sdpa)


def our_backend(name: str) -> Fusion:
    """The fusion of crossvit_kernels on one backend."""

    def fusion(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
        return ck.cross_attention_fusion(cls, tokens, w, num_heads=heads, eps=EPS, backend=name)

    return fusion


def our_form(form: str) -> Fusion:
    """The Triton fusion in "one" kernel or "three", whatever its batch."""
    fusion = our_backend("triton")

    def in_form(cls: Tensor, tokens: Tensor, w: ck.FusionWeights, heads: int) -> Tensor:
        with configurations.FORMS.choose(form):
            return fusion(cls, tokens, w, heads)

    return in_form


def two_calls(fusion: Fusion) -> Pair:
    return lambda a, b: (fusion(*a[:4]), fusion(*b[:4]))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compute one fusion, or both of a block."""

    name: str
    fusion: Fusion
    pair: Pair
    ours: bool = False
    compiled: bool = False
    skip: str | None = None  # why it is not run


def methods(options: argparse.Namespace, shape: Shape) -> list[Method]:
    """Eager first."""
    torch._dynamo.reset()  # or each shape would count as a recompilation, and soon run eager

    def alone(name: str, fusion: Fusion, **facts: Any) -> Method:
        return Method(name, fusion, two_calls(fusion), **facts)

    def with_compiler(name: str, fusion: Fusion) -> Method:
        compiled = (contest.compiled(f, options) for f in (fusion, two_calls(fusion)))
        return Method(name, *compiled, compiled=True, skip=no_compile)

    no_compile = "--no-compile" if options.no_compile else None
    too_wide = "SDPA's fused kernels end at head dim 256" if shape.dim > 256 else None
    return [
        alone("eager", eager),
        with_compiler("eager, compiled", eager),
        alone("SDPA", sdpa),
        alone("absorbed", absorbed),
        with_compiler("absorbed, compiled", absorbed),
        alone("absorbed, SDPA", absorbed_sdpa, skip=too_wide),
        *(our_method(name) for name in options.backends),
        *(our_forms() if "triton" in options.backends and not shape.pair_tokens else ()),
    ]


def our_method(backend: str) -> Method:
    """What the library does on a backend, both fusions in one call."""
    fusion = our_backend(backend)

    def pair(a: ck.FusionInputs, b: ck.FusionInputs) -> tuple[Tensor, Tensor]:
        return ck.cross_attention_fusion_pair(a, b, eps=EPS, backend=backend)

    return Method(contest.our_name(backend), fusion, pair, ours=True)


def our_forms() -> list[Method]:
    """Of the Triton fusion; which one runs by itself is predicted, so both are measured."""
    methods = []
    for form in ("one", "three"):
        fusion = our_form(form)
        methods.append(Method(f"ours (triton, {form})", fusion, two_calls(fusion), ours=True))
    return methods


Caller = Callable[[int], tuple[Tensor | None, ...]]


def result_names(mode: str, pair: bool = False) -> tuple[str, ...]:
    """Of what a caller returns."""
    of_x, of_weights = measure.TRAINED[mode]
    names = ["output", *(["output of the other"] if pair else [])]
    names += ["grad cls", "grad tokens"] if of_x else []
    names += [f"grad {name}" for name in ck.FusionWeights._fields] if of_weights else []
    return (*names, *(["grad head"] if mode == "heads" else []))


def caller(method: Method, inputs: Inputs, heads: int, mode: str) -> Caller:
    """A function of an input set's number that returns what ``result_names`` names."""
    inputs.prepare(mode)
    fusion, sets, count, other = method.fusion, inputs.sets, len(inputs.sets), inputs.other
    if other:

        def both(index: int) -> tuple[Tensor, Tensor]:
            a, b = (
                ck.FusionInputs(*x.sets[index % count], x.weights, heads) for x in (inputs, other)
            )
            return method.pair(a, b)

        return both
    leaves = [inputs.leaves(index) for index in range(count)]

    def forward(index: int) -> tuple[Tensor]:
        return (fusion(*sets[index % count], inputs.weights, heads),)

    def train(index: int) -> tuple[Tensor, ...]:
        (output,) = forward(index)
        if mode == "heads":
            return output, *torch.autograd.grad(F.linear(output, inputs.head).mean(), inputs.head)
        # allow_unused: the absorbed form has no use for k_bias, whose gradient is zero.
        gradients = torch.autograd.grad(
            output, leaves[index % count], inputs.upstream, allow_unused=True
        )
        return output, *gradients

    return forward if mode == "forward" else train


def tolerances(inputs: Inputs, heads: int, mode: str) -> dict[str, Tolerance]:
    """For each result its float64 value, and the error that eager makes in the run's dtype."""
    definition = Method("eager", eager, two_calls(eager))
    exact = caller(definition, _doubled(inputs), heads, mode)(0)
    usual = caller(definition, inputs, heads, mode)(0)
    names = result_names(mode, pair=inputs.other is not None)
    return measure.tolerances(names, exact, usual, inputs.upstream.dtype)


def _doubled(inputs: Inputs) -> Inputs:
    """The first set in float64."""
    cls, tokens, *weights, head = [t.detach().double() for t in inputs.tensors(0)]
    return Inputs(
        ck.FusionWeights(*weights),
        inputs.upstream.double(),
        [(cls, tokens)],
        head,
        _doubled(inputs.other) if inputs.other else None,
    )

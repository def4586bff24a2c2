"""Cases for kernels/run_case.cpp: inputs in bfloat16, results in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from accuracy import outputs_and_gradients, representable
from block_cases import ffn_weights, msa_weights
from core_cases import make
from fusion_cases import make_weights
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import FfnWeights, FusionWeights, MsaWeights
from crossvit_kernels.ops.attention_core import reference
from crossvit_kernels.ops.common import activations

DTYPE = torch.bfloat16
# The weights whose gradients form an image's row (saved.gradient_sizes), in order.
ROW_OF_GRADIENTS = (
    *("proj_norm_weight", "proj_norm_bias", "proj_bias", "norm_weight", "norm_bias"),
    *("q_bias", "v_bias", "out_bias", "back_norm_weight", "back_norm_bias", "back_bias"),
)


@dataclasses.dataclass(frozen=True)
class Core:
    batch: int
    tokens: int
    rows: int
    channels: int
    extra: bool = False
    masked: bool = False
    norm_eps: float | None = 1e-6
    blocks: int = 1  # sharing an image
    scale: float | None = None  # of tokens with a mean of 10 to 30 spreads

    def arrays(self) -> list[np.ndarray]:
        sizes = self.batch, self.tokens, self.rows, self.channels
        inputs, mask = make(*sizes, DTYPE, extra=self.extra, masked=self.masked)
        u, x, extra = inputs
        if self.scale is not None:
            means = 10 + 10 * (torch.arange(self.tokens)[:, None] % 3)
            inputs[1] = x = representable((means + x) * self.scale, DTYPE)
        upstream = [torch.randn(self.batch, self.rows, self.channels), torch.randn(u.shape[:2])]
        upstream = [representable(t, DTYPE) for t in upstream]

        def core(u: Tensor, x: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
            return reference.attention_core(u, x, self.norm_eps, mask, extra)

        exact = outputs_and_gradients(core, inputs, upstream, torch.float64)
        numbers = _numbers(0, *sizes, self.norm_eps is not None, self.blocks)
        given = bits(x), bits(extra), floats(u), _array(mask), *map(floats, upstream)
        return [numbers, *given, *(t.numpy() for t in exact), *[_array(None)] * (5 - len(exact))]


@dataclasses.dataclass(frozen=True)
class Fusion:
    batch: int
    tokens: int
    channels: int
    cls_channels: int
    heads: int
    images: int = 1  # per cluster
    blocks: int = 1  # per cluster
    aliased: bool = False  # the token pass is aliased to other memory

    def arrays(self) -> list[np.ndarray]:
        shapes = (self.batch, self.cls_channels), (self.batch, self.tokens, self.channels)
        cls, x, dnew_cls = (torch.randn(*s) for s in (*shapes, shapes[0]))
        weights = make_weights(self.cls_channels, self.channels)
        cls, x, dnew_cls, *weights = (representable(t, DTYPE) for t in (cls, x, dnew_cls, *weights))
        scale = torch.tensor([1.25, 0.0, 0.5, 2.0, 1.0]).double()[: self.batch]

        def image(i: int) -> tuple[Tensor, ...]:
            """Results of one image; the gradients of the weights are one row."""

            def fusion(cls: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
                w, r = FusionWeights(*weights), scale[i : i + 1]
                return ck.cross_attention_fusion(
                    cls, x, w, self.heads, residual_scale=r, backend="reference"
                )

            one = slice(i, i + 1)
            new_cls, dcls, dx, *dw = outputs_and_gradients(
                fusion, [cls[one], x[one], *weights], [dnew_cls[one]], torch.float64
            )
            named = dict(zip(FusionWeights._fields, dw, strict=True))
            return new_cls, dcls, dx, torch.cat([named[n] for n in ROW_OF_GRADIENTS])[None]

        images = zip(*(image(i) for i in range(self.batch)), strict=True)
        exact = [torch.cat(parts).numpy() for parts in images]
        numbers = _numbers(1, *dataclasses.astuple(self))
        given = bits(cls), bits(x), floats(scale), *map(bits, (dnew_cls, *weights))
        return [numbers, *given, *exact]


@dataclasses.dataclass(frozen=True)
class Block:
    """Half a transformer block; MSA has heads, FFN hidden units."""

    batch: int
    tokens: int
    channels: int
    heads: int = 0
    hidden: int = 0
    layer_scale: bool = False
    masked: bool = False
    activation: str = "gelu"

    def arrays(self) -> list[np.ndarray]:
        size = self.batch, self.tokens, self.channels
        x, dy, cls = (torch.randn(*s).double() for s in (size, size, size[::2]))
        weights = msa_weights(size[2]) if self.heads else ffn_weights(size[2], self.hidden)
        x, dy, cls, *weights = (representable(t, DTYPE) for t in (x, dy, cls, *weights))
        scale = torch.tensor([1.25, 0.5]).double()[: self.batch]
        per_channel = representable(torch.rand(size[2]).double(), DTYPE)
        options = {"residual_scale": scale, "backend": "reference"}
        dupdate = scale.view(-1, 1, 1) * dy
        mask = torch.rand(size[:2]) < 0.6 if self.masked else None
        if self.layer_scale:
            options["layer_scale"], dupdate = per_channel, per_channel * dupdate

        def msa(x: Tensor, cls: Tensor, *w: Tensor) -> Tensor:
            w = MsaWeights(*w)
            return ck.layernorm_msa(x, w, self.heads, cls=cls, key_mask=mask, **options)

        def ffn(x: Tensor, *w: Tensor) -> Tensor:
            return ck.layernorm_ffn(x, FfnWeights(*w), activation=self.activation, **options)

        inputs = [x, cls, *weights] if self.heads else [x, *weights]
        function = msa if self.heads else ffn
        y, *gradients = outputs_and_gradients(function, inputs, [dy], torch.float64)
        exact = [y, *gradients[: -len(weights)], torch.stack(gradients[-6:-4])]
        activation = activations.NAMES.index(self.activation)
        numbers = _numbers(2 if self.heads else 3, *size, self.heads or self.hidden, activation)
        given = bits(x), bits(cls if self.heads else None), floats(scale)
        given += bits(per_channel if self.layer_scale else None), _array(mask)
        given += bits(dy), bits(dupdate)
        return [numbers, *given, *map(bits, weights), *(t.numpy() for t in exact)]


# Small because ThreadSanitizer is slow, but with more than one of everything: images, splits of an
# image, passes over it, warp groups, tiles per group, ring stages; clusters, their blocks, and
# images per block.
CASES = {
    "core": Core(2, 150, 10, 48, extra=True, masked=True),
    "core, squares that overflow": Core(2, 40, 4, 48, scale=5e17),
    "core, wide": Core(1, 70, 5, 112, extra=True, masked=True),
    "core, not normalized": Core(2, 70, 5, 96, norm_eps=None),
    "core, shared": Core(2, 150, 11, 48, extra=True, masked=True, blocks=4),
    "core, wide, shared": Core(1, 70, 10, 112, extra=True, masked=True, blocks=2),
    "fusion": Fusion(5, 70, 80, 32, 10, images=3, blocks=2),
    "fusion, aliased": Fusion(5, 70, 48, 64, 3, images=3, blocks=2, aliased=True),
    "fusion, shared": Fusion(3, 70, 80, 32, 10, images=2, blocks=4),
    "fusion, wide": Fusion(3, 40, 112, 48, 7, images=3, blocks=2),
    "msa": Block(2, 53, 48, heads=3),
    "msa, few tokens": Block(1, 5, 32, heads=1),
    "msa, options": Block(2, 53, 48, heads=3, layer_scale=True, masked=True),
    "ffn": Block(2, 37, 48, hidden=136),
    "ffn, options": Block(2, 37, 48, hidden=136, layer_scale=True, activation="silu"),
    "fusion, wide, aliased": Fusion(3, 40, 112, 48, 7, images=3, blocks=2, aliased=True),
}


def write(name: str, path: Path) -> None:
    torch.manual_seed(0)
    with path.open("wb") as file:
        for array in CASES[name].arrays():
            file.write(np.int64(array.nbytes).tobytes() + array.tobytes())


def bits(t: Tensor | None) -> np.ndarray:
    return _array(None if t is None else t.to(DTYPE).view(torch.int16))


def floats(t: Tensor) -> np.ndarray:
    return _array(t.float())


def _array(t: Tensor | None) -> np.ndarray:
    """None has no elements."""
    return np.empty(0) if t is None else t.contiguous().numpy()


def _numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)

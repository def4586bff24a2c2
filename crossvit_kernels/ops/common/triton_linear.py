"""Linear layers over tokens on Triton, fused with an adjacent LayerNorm or residual."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels.gpu import launcher
from crossvit_kernels.gpu.launcher import Programs
from crossvit_kernels.ops.common import configs, sm90_linear, sm90_wide
from crossvit_kernels.ops.common import torch_norm as layer_norm
from crossvit_kernels.ops.common.activations import ACTIVATIONS
from crossvit_kernels.ops.common.column_sums import column_sums
from crossvit_kernels.ops.common.configs import LayerShape
from crossvit_kernels.ops.common.library import Step

#: LayerNorm's weight and bias [C].
Norm = tuple[Tensor, Tensor | None]


class Tokens(NamedTuple):
    """Tokens as kernels read them: aligned rows, and a CLS that replaces row 0, or None."""

    x: Tensor  # [B, N, C]
    cls: Tensor | None  # [B, C]

    @property
    def num_rows(self) -> int:
        batch, num_tokens, _ = self.x.shape
        return batch * num_tokens

    @property
    def strides(self) -> tuple[int, int, int]:
        """The batch and token strides of x, and the batch stride of cls."""
        of_image, of_token, _ = self.x.stride()
        return of_image, of_token, 0 if self.cls is None else self.cls.stride(0)


@functools.cache
def _kernels() -> ModuleType:
    """Import the kernels on first use: Triton is slow to import and may be missing."""
    from crossvit_kernels.ops.common import triton_linear_kernels

    return triton_linear_kernels


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def prepared(x: Tensor, cls: Tensor | None = None) -> Tokens:
    return Tokens(launcher.aligned_rows(x), None if cls is None else launcher.aligned_rows(cls))


def merged(tokens: Tokens, weight: Tensor) -> Tokens:
    """Return tokens with cls in row 0, if the kernel that multiplies them needs it there."""
    x, cls = tokens
    if cls is None or not sm90_linear.chosen(x, weight):
        return tokens
    x = x.clone(memory_format=torch.contiguous_format)
    x[:, 0] = cls
    return Tokens(x, None)


def normalize(
    tokens: Tokens,
    norm: Norm,
    eps: float,
    dtype: torch.dtype,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return LN(x) [B, N, C] in dtype; writes mean and rstd [B, N] if given."""
    x, cls = tokens
    normed = x.new_empty(x.shape, dtype=dtype)
    num_rows, channels = tokens.num_rows, x.shape[2]
    launcher.start(
        _kernels().normalize,
        lambda shape: Programs((-(-num_rows // shape.rows), 1, 1)),
        (x, cls, *norm, normed, *(statistics or (None, None))),
        (num_rows, x.shape[1], *tokens.strides),
        configs.candidates(configs.NORMALIZE, normed, num_rows, channels, channels),
        eps=eps,
    )
    return normed


def norm_linear(
    tokens: Tokens,
    norm: Norm,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    step: Step,
    statistics: tuple[Tensor, Tensor] | None = None,
    activation: str = "",
    product: Tensor | None = None,
) -> Tensor:
    """Return LN(x) W^T + b or its activation [B, N, W's rows].

    Writes mean and rstd [B, N], and product, what the activation is of, if given.
    """
    x, cls = tokens
    # Gluon's kernels write one result.
    has_gluon = product is None and activation in ("", "gelu")
    if has_gluon and cls is None and sm90_linear.chosen(x, weight):
        options: dict[str, Any] = {"norm": norm, "eps": eps, "statistics": statistics}
        y = sm90_linear.linear(x, weight, bias, gelu=bool(activation), **options)
        if y is not None:
            return y
    (batch, num_tokens, channels), columns = x.shape, weight.shape[0]
    num_rows, size = batch * num_tokens, weight.element_size()
    by_library = step.by_library(num_rows, channels, size)
    if has_gluon and channels > sm90_linear.WIDEST and sm90_wide.chosen(x, weight):
        normed = normalize(tokens, norm, eps, weight.dtype, statistics)
        y = sm90_wide.linear(normed, weight, bias, gelu=bool(activation))
        return linear(normed, weight, bias, activation) if y is None else y
    if by_library or configs.NORM_LINEAR.apart(num_rows, channels, size):
        normed = normalize(tokens, norm, eps, weight.dtype, statistics)
        if by_library:
            return _by_library(normed, weight, bias, activation, product)
        return linear(normed, weight, bias, activation, product)
    out = x.new_empty(batch, num_tokens, columns, dtype=weight.dtype)
    mean, rstd = statistics or (None, None)

    def programs(shape: LayerShape) -> Programs:
        tiles, steps = -(-num_rows // shape.rows), -(-columns // shape.columns)
        per_group = -(-steps // min(-(-configs.PROGRAMS // tiles), steps))
        groups = -(-steps // per_group)
        return Programs((tiles * groups, 1, 1), (), (groups, per_group * shape.columns))

    launcher.start(
        _kernels().norm_linear,
        programs,
        (x, cls, *norm, weight, bias, out, mean, rstd, product),
        (num_rows, num_tokens, *tokens.strides),
        configs.candidates(configs.NORM_LINEAR, weight, num_rows, channels, columns),
        (activation,),
        eps=eps,
    )
    return out


def _by_library(
    a: Tensor, weight: Tensor, bias: Tensor | None, activation: str, product: Tensor | None
) -> Tensor:
    """Linear by torch's kernels."""
    if product is None:
        y = F.linear(a, weight, bias)
    else:
        y, rows = product, (a.flatten(0, 1), weight.t())
        out = y.view(-1, y.shape[-1])
        torch.mm(*rows, out=out) if bias is None else torch.addmm(bias, *rows, out=out)
    return ACTIVATIONS[activation](y) if activation else y


def linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    product: Tensor | None = None,
) -> Tensor:
    """Return a W^T + b or its activation [B, N, W's rows] for a [B, N, W's columns].

    Writes product, what the activation is of, if given.
    """
    batch, num_tokens, _ = a.shape
    out = a.new_empty(batch, num_tokens, weight.shape[0])
    _linear(a, weight, bias, None, (None, None), out, activation, product)
    return out


def linear_residual(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tokens,
    residual_scale: Tensor | None,
    layer_scale: Tensor | None,
    step: Step,
) -> Tensor:
    """Return x + residual_scale * layer_scale * (a W^T + b) [B, N, C] for a [B, N, W's columns]."""
    if layer_scale is None and tokens.cls is None and tokens.x.dtype == a.dtype:
        x, y = tokens.x, None
        if sm90_wide.chosen(a, weight):
            y = sm90_wide.linear(a, weight, bias, residual=x, scale=residual_scale)
        if y is None and residual_scale is None and sm90_linear.chosen(a, weight):
            y = sm90_linear.linear(a, weight, bias, residual=x)
        if y is not None:
            return y
    if step.by_library(tokens.num_rows, weight.shape[0], weight.element_size()):
        update = F.linear(a, weight, bias)
        return layer_norm.add_residual(tokens.x, update, residual_scale, tokens.cls, layer_scale)
    y = empty_result(tokens.x, weight, layer_scale)
    _linear(a, weight, bias, tokens, (residual_scale, layer_scale), y)
    return y


def _linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tokens | None,
    scales: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    activation: str = "",
    product: Tensor | None = None,
) -> None:
    (batch, num_tokens, _), (columns, terms) = out.shape, weight.shape
    num_rows = batch * num_tokens
    x, cls = tokens or (None, None)

    def programs(shape: LayerShape) -> Programs:
        tiles, blocks = -(-num_rows // shape.rows), -(-columns // shape.columns)
        return Programs((tiles * blocks, 1, 1))

    launcher.start(
        _kernels().linear,
        programs,
        (a, weight, bias, x, cls, *scales, out, product),
        (num_rows, num_tokens, *(tokens.strides if tokens else (0, 0, 0))),
        configs.candidates(configs.LINEAR, weight, num_rows, columns, terms),
        (activation,),
    )


def empty_result(x: Tensor, weight: Tensor, layer_scale: Tensor | None) -> Tensor:
    """Allocate x plus an update in the dtype of weight, scaled or not."""
    batch, num_tokens, channels = x.shape  # new_empty takes longer to read a shape
    dtype = layer_norm.result_dtype(x, weight, layer_scale)
    return x.new_empty(batch, num_tokens, channels, dtype=dtype)


class Gradients(NamedTuple):
    """The results of norm_backward."""

    dx: Tensor  # [B, N, C]
    dcls: Tensor | None  # [B, C]
    normed: Tensor | None  # [B, N, C]: LN(x)
    d_norm_weight: Tensor  # [C]
    d_norm_bias: Tensor
    sum_dy: Tensor  # [C], float32: sum of residual_scale * dy, which may not fit 16 bits


def norm_backward(
    d: Tensor,
    dy: Tensor,
    residual_scale: Tensor | None,
    tokens: Tokens,
    norm: Norm,
    statistics: tuple[Tensor, Tensor],
    normed_dtype: torch.dtype | None = None,
) -> Gradients:
    """LayerNorm's backward from d [B N, C], the gradient of LN(x); adds dy [B, N, C] to dx.

    d and dy are contiguous. LN(x) is among the results if it has a dtype.
    """
    x, cls = tokens
    num_rows, channels = tokens.num_rows, x.shape[2]
    dx, dcls = x.new_empty(x.shape), None if cls is None else x.new_empty(cls.shape)
    bias = normed = None
    if normed_dtype is not None:
        bias, normed = norm[1], x.new_empty(x.shape, dtype=normed_dtype)

    def programs(shape: LayerShape) -> Programs:
        tiles = -(-num_rows // shape.rows)
        tiles_of_one = -(-tiles // configs.NORM_BACKWARD_PROGRAMS)
        runs = -(-tiles // tiles_of_one)
        shares = x.new_empty(runs, 3, channels, dtype=torch.float32)
        return Programs((runs, 1, 1), (shares,), (tiles_of_one,))

    (shares,) = launcher.start(
        _kernels().norm_backward,
        programs,
        (d, dy, residual_scale, x, cls, *statistics, norm[0], bias, dx, dcls, normed),
        (num_rows, x.shape[1], *tokens.strides),
        configs.candidates(configs.NORM_BACKWARD, d, num_rows, channels, channels),
    )
    dtypes = norm[0].dtype, (norm[0] if norm[1] is None else norm[1]).dtype, torch.float32
    sums = column_sums(shares.flatten(1), [channels] * len(dtypes), dtypes)
    return Gradients(dx, dcls, normed, *sums)


def input_gradient(d: Tensor, weight: Tensor) -> Tensor:
    """Return d W [..., in] for a layer's gradient d [..., out] and weight [out, in]."""
    y = sm90_wide.input_gradient(d, weight)
    return d @ weight if y is None else y


def weight_gradient(d: Tensor, rows: Tensor | None, wanted: bool) -> Any:
    """Return d^T rows for a layer's gradient d [B N, out] and its input rows [..., in]; or None."""
    return d.t() @ rows.view(d.shape[0], -1) if wanted and rows is not None else None

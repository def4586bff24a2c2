"""Argument checks of the public functions, which raise before any kernel is launched."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, t: object, *shape: int | str) -> None:
    """Check for a floating-point tensor of a shape; letters stand for arbitrary sizes."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(t).__name__}")
    if t.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, found {t.dtype}")
    if t.layout != torch.strided or t.is_nested:
        layout = "a nested tensor" if t.is_nested else t.layout
        raise TypeError(f"{name}: expected a dense tensor (torch.strided), found {layout}")
    fits = t.dim() == len(shape)
    if fits:
        for size, actual in zip(shape, t.shape, strict=True):
            if not isinstance(size, str) and size != actual:
                fits = False
    if not fits:
        raise ValueError(f"{name}: expected shape {_show(shape)}, found {_show(t.shape)}")


def optional_tensor(name: str, t: object, *shape: int | str) -> None:
    if t is not None:
        tensor(name, t, *shape)


def unit_stride(name: str, t: Tensor) -> None:
    """Check that rows are contiguous: kernels use vector loads."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected unit stride in the last dimension, found strides {t.stride()}; "
            "call .contiguous() on it"
        )


def same_device_and_dtype(like_name: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Check for one device and one dtype; under autocast dtypes may mix, except float64."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != like.device:
            raise ValueError(f"{name}: is on {t.device}, but {like_name} is on {like.device}")
        if t.dtype != like.dtype and (
            torch.float64 in (t.dtype, like.dtype) or not _autocast_is_on(like.device.type)
        ):
            raise TypeError(
                f"{name}: is {t.dtype}, but {like_name} is {like.dtype}; convert one, or use "
                "torch.autocast"
            )


def _autocast_is_on(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # meta has no autocast


def some_channels(name: str, t: Tensor) -> None:
    if t.shape[-1] == 0:
        raise ValueError(f"{name}: expected at least one channel, found shape {list(t.shape)}")


def heads(num_heads: int, **widths: int) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, found {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, found {num_heads}")
    for name, width in widths.items():
        if width % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide {name} = {width}")


def eps(name: str, value: float) -> None:
    number(name, value)
    if not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0, found {value}")


def number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a float, found {type(value).__name__}")


def probability(name: str, value: float) -> None:
    number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= p < 1, found {value}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, found {value!r}")


def key_mask(mask: Tensor | None, tokens: Tensor) -> None:
    """Check for a bool mask [B, N] for tokens [B, N, C], or None."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_mask: expected a tensor, found {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_mask: expected torch.bool (True = attend), found {mask.dtype}")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"key_mask: expected shape {_show(tokens.shape[:2])}, found {_show(mask.shape)}"
        )
    if mask.device != tokens.device:
        raise ValueError(f"key_mask: is on {mask.device}, but the tokens are on {tokens.device}")


def residual_scale(scale: Tensor | None, batch: int, device: torch.device) -> None:
    if scale is None:
        return
    tensor("residual_scale", scale, batch)
    if scale.device != device:
        raise ValueError(f"residual_scale: is on {scale.device}, but the input is on {device}")


def layer_scale(scale: Tensor | None, x: Tensor) -> None:
    """Check for a vector [C] for tokens x [B, N, C], or None."""
    if scale is None:
        return
    tensor("layer_scale", scale, x.shape[-1])
    same_device_and_dtype("x", x, layer_scale=scale)


#: Field of a NamedTuple of weights -> its sizes, by letter.
Shapes = dict[str, tuple[str, ...]]
_OPTIONAL = {"q_bias", "k_bias", "v_bias", "qkv_bias"}


def weights(
    given: Any,
    kind: Any,
    shapes: Shapes,
    sizes: dict[str, int],
    like: Tensor,
    absent: Collection[str] = (),
) -> None:
    """Check every field of a NamedTuple of weights: shape, device, dtype; absent may be None."""
    if not isinstance(given, kind):
        raise TypeError(f"weights: expected {kind.__name__}, found {type(given).__name__}")
    # The fast path for valid weights, as host time matters; only a mismatch is examined.
    if not torch.compiler.is_compiling() and _fit(given, _expected(kind, shapes, sizes), like):
        return
    for name, t in zip(given._fields, given, strict=True):
        if t is None and (name in _OPTIONAL or name in absent):
            continue
        tensor(f"weights.{name}", t, *(sizes[letter] for letter in shapes[name]))
    same_device_and_dtype(
        "the input", like, **{f"weights.{k}": t for k, t in given._asdict().items()}
    )


def _fit(given: Any, expected: list[tuple[int, ...]], like: Tensor) -> bool:
    """Whether all weights are present and as expected; loops in C."""
    try:
        return (
            list(map(_shape, given)) == expected
            and set(map(_dtype, given)) == {like.dtype}
            and set(map(_device, given)) == {like.device}
            and set(map(_layout, given)) == {torch.strided}
        )
    except (AttributeError, TypeError):  # None, not a tensor, a symbolic size
        return False


_shape, _dtype, _device, _layout = (
    operator.attrgetter(name) for name in ("shape", "dtype", "device", "layout")
)


# (kind, *sizes) -> the shapes of its fields.
_known: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}


def _expected(kind: Any, shapes: Shapes, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    """Return the shapes of a kind of weights; a kind always has the same letters."""
    key = kind, *sizes.values()
    try:
        known = _known.get(key)
    except TypeError:  # a symbolic size
        return []
    if known is None:
        known = _known[key] = [tuple(map(sizes.__getitem__, shape)) for shape in shapes.values()]
    return known


def _show(shape: tuple[int | str, ...] | torch.Size) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

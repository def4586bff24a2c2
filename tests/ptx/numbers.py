"""Arithmetic as PTX defines it, on arrays of lanes."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

U2, U4, U8 = np.uint16, np.uint32, np.uint64
F2, F4, F8 = np.float16, np.float32, np.float64
NAN = U4(0x7FFFFFFF)  # what every float32 operation of a GPU returns for NaN


def bits(x: Array) -> Array:
    """Return float32 as bits with a GPU's NaN."""
    raw = x.view(U4)
    nan = x != x
    return np.where(nan, NAN, raw) if nan.any() else raw


def flush(x: Array) -> Array:
    """Replace float32 subnormals by zeros of their sign (.ftz)."""
    small = (np.abs(x) < F4(2**-126)) & (x != 0)
    return np.where(small, np.copysign(F4(0), x), x) if small.any() else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c of float32, rounded once."""
    product = a.astype(F8) * b
    total = product + c
    tie = (total.view(U8) & U8(0x1FFFFFFF)) == U8(0x10000000)
    if tie.any():  # where rounding to float64 may have made a tie of float32
        part = total - product
        error = (product - (total - part)) + (c - part)
        away = np.where((error > 0) == (total > 0), np.inf, 0.0) * np.sign(total)
        total = np.where(tie & (error != 0) & np.isfinite(error), np.nextafter(total, away), total)
    return total.astype(F4)


def fma_down(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c of float32, rounded towards minus infinity."""
    product = a.astype(F8) * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    near = total.astype(F4)
    above = (near > total) | ((near == total) & (error < 0))
    return np.where(above, np.nextafter(near, F4(-np.inf)), near)


def from_bf16(raw: Array) -> Array:
    return (raw.astype(U4) << U4(16)).view(F4)


def to_bf16(x: Array) -> Array:
    """Round float32 to nearest even."""
    raw = x.view(U4)
    nearest = (raw + U4(0x7FFF) + ((raw >> U4(16)) & U4(1))) >> U4(16)
    return np.where(x != x, U4(0x7FFF), nearest).astype(U2)


def from_f16(raw: Array) -> Array:
    return raw.view(F2).astype(F4)


def to_f16(x: Array) -> Array:
    return np.where(x != x, U2(0x7FFF), x.astype(F2).view(U2))


def pack(low: Array, high: Array) -> Array:
    return low.astype(U4) | (high.astype(U4) << U4(16))


def halves(raw: Array) -> tuple[Array, Array]:
    return raw.astype(U2), (raw >> U4(16)).astype(U2)


def tf32(raw: Array) -> Array:
    """Return what a tensor core reads of a float32: 10 bits of its fraction."""
    return (raw & U4(0xFFFFE000)).view(F4)


def to_tf32(x: Array) -> Array:
    """Round float32 to tf32, to nearest, ties away from zero (cvt.rna)."""
    raw = x.view(U4)
    return np.where(np.isfinite(x), (raw + U4(0x1000)) & U4(0xFFFFE000), raw)


def shift_left(a: Array, n: Array, width: int) -> Array:
    n = n.astype(a.dtype)
    limit = a.dtype.type(width)
    return np.where(n < limit, a << np.minimum(n, limit - a.dtype.type(1)), a.dtype.type(0))


def shift_right(a: Array, n: Array, width: int) -> Array:
    """Shift; a signed array keeps its sign."""
    n = np.minimum(n, U4(width)).astype(a.dtype)
    last = a.dtype.type(width - 1)
    kept = a >> np.minimum(n, last)
    if a.dtype.kind == "i":
        return kept
    return np.where(n <= last, kept, a.dtype.type(0))


def extract(a: Array, start: Array, length: Array, signed: bool) -> Array:
    """Extract a bit field of 32 bits (bfe)."""
    start, length = (x.astype(np.int64) & 255 for x in (start, length))
    wide = a.view(np.int32).astype(np.int64) if signed else a.astype(np.int64)
    shifted = wide >> np.minimum(start, 63)
    mask = (np.int64(1) << np.minimum(length, 32)) - 1
    field = shifted & mask
    if signed:
        sign = np.minimum(start + length - 1, 31)
        negative = ((wide >> sign) & 1).astype(bool) & (length > 0)
        field = np.where(negative, field | ~mask, field)
    return field.astype(U4)


def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    """Insert the low bits of a into b (bfi, 32 bits)."""
    start, length = (x.astype(np.int64) & 255 for x in (start, length))
    mask = ((np.int64(1) << np.minimum(length, 32)) - 1) << np.minimum(start, 32)
    wide = (b.astype(np.int64) & ~mask) | ((a.astype(np.int64) << np.minimum(start, 32)) & mask)
    return wide.astype(U4)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Pick four of eight bytes (prmt without a mode)."""
    both = a.astype(U8) | (b.astype(U8) << U8(32))
    result = np.zeros_like(a)
    for byte in range(4):
        choice = (selector >> U4(4 * byte)) & U4(15)
        value = ((both >> ((choice & U4(7)).astype(U8) * U8(8))) & U8(255)).astype(U4)
        sign = np.where(value >= 128, U4(255), U4(0))
        result = result | (np.where(choice >= 8, sign, value) << U4(8 * byte))
    return result


def high(a: Array, b: Array, width: int) -> Array:
    """Return the upper half of a product."""
    if width == 32:
        wide = np.int64 if a.dtype.kind == "i" else U8
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    products = a.astype(object) * b.astype(object)
    return np.array([int(p) >> 64 for p in products]).astype(a.dtype)


def divide(a: Array, b: Array, remainder: bool) -> Array:
    """Divide integers towards zero; by zero gives all ones."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a.astype(object)) // np.abs(safe.astype(object))
    signs = np.where((a < 0) != (safe < 0), -1, 1)
    quotient = quotient * signs
    result = a.astype(object) - quotient * safe.astype(object) if remainder else quotient
    return np.where(b == 0, a.dtype.type(-1 if a.dtype.kind == "i" else 0), result.astype(a.dtype))


def to_integer(x: Array, dtype: type, how: str) -> Array:
    """Round a float and clamp it to an integer type; NaN gives 0."""
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[how]
    limits = np.iinfo(dtype)
    value = rounding(np.where(x != x, 0, x).astype(F8))
    clamped = np.clip(value, float(limits.min), float(limits.max))
    whole = [min(max(int(v), limits.min), limits.max) for v in clamped]
    return np.array(whole, dtype)


def minimum(a: Array, b: Array, largest: bool, nan: bool) -> Array:
    """Return min or max of floats; -0 < +0. NaN only if both are, or either (.NaN)."""
    if a.dtype.kind != "f":
        return np.maximum(a, b) if largest else np.minimum(a, b)
    pick = (np.maximum if nan else np.fmax) if largest else (np.minimum if nan else np.fmin)
    result = pick(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        sign = np.signbit(a) & np.signbit(b) if largest else np.signbit(a) | np.signbit(b)
        result = np.where(zeros, np.where(sign, -a.dtype.type(0), a.dtype.type(0)), result)
    return result.astype(a.dtype)


APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def approximate(name: str, x: Array) -> Array:
    """Return a function's value rounded from float64: within every .approx's stated error."""
    return APPROXIMATE[name](x.astype(F8)).astype(F4)

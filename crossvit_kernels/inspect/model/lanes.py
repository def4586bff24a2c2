"""Compute integer instructions on the lanes of warps.

A value is an ``int``, the same for all lanes; an int64 array [warps, 1] or [warps, 32] of 32-bit
words without sign; or None, which is not known. Predicates are ``bool``, bool arrays, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WORD = 0xFFFFFFFF
Value = Any
Operation = Callable[..., Value]


def signed(a: Value) -> Value:
    """A word as a signed number."""
    return (a ^ 0x80000000) - 0x80000000


def select(condition: Value, a: Value, b: Value) -> Value:
    """a where a known condition holds, else b; None where a value that is taken is not known."""
    if isinstance(condition, (bool, np.bool_)):
        return a if condition else b
    if a is None or b is None:
        return None
    return np.where(condition, a, b)


def broadcast_lanes(value: Value, warps: int) -> Any:
    """A known value as an array [warps, 32]."""
    return np.broadcast_to(np.asarray(value), (warps, 32))


def invert(predicate: Value) -> Value:
    if predicate is None:
        return None
    return not predicate if isinstance(predicate, (bool, np.bool_)) else ~predicate


def pair(low: Value, high: Value) -> Value:
    """64 bits, as a signed number where they are arrays."""
    return None if low is None or high is None else (high << 32) | low


def words(value: Value) -> tuple[Value, Value]:
    return value & WORD, value >> 32 & WORD


def logical_right(value: Value, shift: Value) -> Value:
    """64 bits shifted right without their sign."""
    if isinstance(value, int) and isinstance(shift, int):
        return (value & (1 << 64) - 1) >> shift
    wide = np.asarray(value & ((1 << 63) - 1) if isinstance(value, int) else value)
    shifted = wide.astype(np.int64).view(np.uint64) >> np.asarray(shift).astype(np.uint64)
    return shifted.astype(np.int64)


def lookup(table: int, a: Value, b: Value, c: Value) -> Value:
    """A bitwise function of three words: bit 4 a + 2 b + c of the table."""
    result: Value = 0
    for index in range(8):
        if table >> index & 1:
            term = WORD
            for value, bit in ((a, 4), (b, 2), (c, 1)):
                term = term & (value if index & bit else value ^ WORD)
            result = result | term
    return result


def lookup_predicates(table: int, a: Value, b: Value, c: Value) -> Value:
    """The same of predicates."""
    result: Value = False
    for index in range(8):
        if table >> index & 1:
            term: Value = True
            for value, bit in ((a, 4), (b, 2), (c, 1)):
                term = term & (value if index & bit else invert(value))
            result = result | term
    return result


def multiply_add(modifiers: tuple[str, ...], a: Value, b: Value, c: Value) -> Value:
    """IMAD's a b + c before it is cut to a word or two; c has 64 bits for WIDE and HI."""
    if "U32" not in modifiers:
        a, b = signed(a), signed(b)
    return a * b + c


def shift(modifiers: tuple[str, ...], low: Value, amount: Value, high: Value) -> Value:
    """SHF: a word of (high, low) shifted."""
    amount = amount & 31 if "W" in modifiers else _clamp(amount, 63)
    upper, wide = "HI" in modifiers, bool({"U64", "S64"} & {*modifiers})
    if modifiers[0] == "L":
        if not upper:
            return low << amount & WORD
        return logical_right(pair(low, high) << amount, 32) & WORD
    if upper and not wide:
        if "S32" in modifiers:
            return signed(high) >> _clamp(amount, 31) & WORD
        return high >> amount
    whole = pair(low, high)
    shifted = whole >> amount if "S64" in modifiers else logical_right(whole, amount)
    return shifted >> 32 & WORD if upper else shifted & WORD


def _clamp(amount: Value, most: int) -> Value:
    return min(amount, most) if isinstance(amount, int) else np.minimum(amount, most)


def scaled_add(
    modifiers: tuple[str, ...], a: Value, b: Value, c: Value, amount: int, carry: Value
) -> Value:
    """LEA before it is cut: (a << amount) + b, or its upper word for HI with c above a."""
    if "HI" not in modifiers:
        return (a << amount & WORD) + b
    whole = signed(a) if "SX32" in modifiers else pair(a, c)
    upper = logical_right(whole << amount, 32)
    return (upper & WORD) + b + carry


def permute(a: Value, selector: Value, c: Value) -> Value:
    """PRMT: four bytes of (c, a), chosen by the nibbles of the selector."""
    if not isinstance(selector, int):
        return None
    result: Value = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        source = a if nibble & 4 == 0 else c
        byte = source >> 8 * (nibble & 3) & 255
        if nibble & 8:
            byte = (byte >> 7) * 255
        result = result | byte << 8 * place
    return result


def sign_extend(modifiers: tuple[str, ...], a: Value, bits: Value) -> Value:
    """SGXT: the lower bits of a word, with the sign of the last of them or without."""
    if not isinstance(bits, int) or not 0 < bits < 32:
        return a if isinstance(bits, int) and bits >= 32 else None
    low = a & (1 << bits) - 1
    if "U32" in modifiers:
        return low
    return ((low ^ 1 << bits - 1) - (1 << bits - 1)) & WORD


_COMPARE: dict[str, Operation] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def compare(modifiers: tuple[str, ...], a: Value, b: Value, lower_result: Value) -> Value:
    """ISETP's comparison; of upper words with the result of the lower ones for EX."""
    if "U32" not in modifiers:
        a, b = signed(a), signed(b)
    result = _COMPARE[modifiers[0]](a, b)
    if "EX" not in modifiers:
        return result
    if modifiers[0] == "NE":
        return result | lower_result
    strictly = modifiers[0].replace("E", "T") if modifiers[0] in ("LE", "GE") else modifiers[0]
    beyond = False if strictly == "EQ" else _COMPARE[strictly](a, b)
    return beyond | ((a == b) & lower_result)


def combine(modifiers: tuple[str, ...], a: Value, b: Value) -> Value:
    """A comparison with another predicate."""
    if "OR" in modifiers:
        return a | b
    return a ^ b if "XOR" in modifiers else a & b


def minimum_or_maximum(modifiers: tuple[str, ...], a: Value, b: Value, least: Value) -> Value:
    """VIMNMX: the smaller one where the predicate holds, else the larger one."""
    if not isinstance(least, bool):
        return None
    smaller = a < b if "U32" in modifiers else signed(a) < signed(b)
    return select(smaller, a, b) if least else select(smaller, b, a)


def to_float(modifiers: tuple[str, ...], a: Value) -> Value:
    """The bits of an integer as float32; rounded up for RP."""
    exact = np.asarray(a if "U32" in modifiers else signed(a), dtype=np.int64).astype(np.float64)
    result = exact.astype(np.float32)
    if "RP" in modifiers:
        up = np.nextafter(result, np.float32(np.inf))
        result = np.where(result.astype(np.float64) < exact, up, result)
    return _bits(result)


def from_float(modifiers: tuple[str, ...], a: Value) -> Value:
    """A float32, given by its bits, as an integer, towards zero, within the type's range."""
    lowest, highest = (0, WORD) if "U32" in modifiers else (-(1 << 31), (1 << 31) - 1)
    number = np.nan_to_num(_number(a).astype(np.float64), posinf=2.0**40, neginf=-(2.0**40))
    return np.clip(np.trunc(number), lowest, highest).astype(np.int64) & WORD


def reciprocal(a: Value) -> Value:
    with np.errstate(divide="ignore", over="ignore"):
        return _bits(np.float32(1) / _number(a))


def _number(bits: Value) -> Any:
    return np.asarray(bits, dtype=np.int64).astype(np.uint32).view(np.float32)


def _bits(number: Any) -> Value:
    return np.asarray(number, dtype=np.float32).view(np.uint32).astype(np.int64)

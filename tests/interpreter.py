"""Fixes for Triton's interpreter.

It stores bfloat16 as uint16 and computes with that. Here products of matrices upcast their
operands; sums, differences and products of numbers do too, and round their result, to nearest even,
where the interpreter truncates. Kernels upcast before all other operations, as they should. Triton
3.6's interpreter uses arrays of one number as scalars, which NumPy 2.4 refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crossvit_kernels.gpu import launcher


def install() -> None:
    """Install the fixes for the rest of the process."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def to_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and target.scalar == tl.float32:
            return to_float32(source)
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, to_float32(a), to_float32(b), *rest)

    def rounding(operation: Any) -> Any:
        def apply(self: Any, *operands: Any) -> Any:
            result = operation(self, *map(to_float32, operands))
            if operands[0].dtype.scalar != tl.bfloat16:
                return result
            return TensorHandle(rounded(result.data), tl.bfloat16)

        return apply

    interpreter._patch_lang_tensor = patch_with_index
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fma", "create_fneg"):
        if hasattr(InterpreterBuilder, name):  # Triton 3.6 has no create_fneg
            setattr(InterpreterBuilder, name, rounding(getattr(InterpreterBuilder, name)))
    for name in ("create_fp_ext", "create_fp_trunc"):  # bound to the old cast_impl in some versions
        setattr(InterpreterBuilder, name, cast_impl)
    launcher.interpreter_has_bfloat16 = True


def rounded(x: np.ndarray) -> np.ndarray:
    """Round float32 values to bfloat16 bits, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, nearest).astype(np.uint16)

"""Describes a call by what the choice of its backend depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from crossvit_kernels.backends import autocast_dtype, needs_grad
from crossvit_kernels.calibration.store import Call, Signature, batch_class
from crossvit_kernels.verify.compare import tensors_of


def describe(operation: Any, inputs: Any, run: Callable[[Any, str], Any]) -> Call:
    """Return a call of an Operation; run(inputs, backend) repeats it."""
    return described(operation.name, operation.tokens(inputs), inputs, run)


def described(
    name: str, tokens: Tensor, values: tuple[Any, ...], run: Callable[[Any, str], Any]
) -> Call:
    """Return a call of an operation.

    Args:
        name: The operation's.
        tokens: [B, N, C].
        values: Nested tuples of all tensors, and numbers.
        run: (values, backend) -> outputs; repeats the call.
    """
    batch, num_tokens, channels = tokens.shape
    tensors, autocast = tensors_of(values), autocast_dtype(tokens)
    kinds, sizes = [str(autocast)] if autocast else [], [channels]
    _collect(values, tokens, kinds, sizes)
    signature = Signature(
        name,
        needs_grad(*tensors),
        " ".join(kinds),
        tuple(sizes),
        num_tokens,
        batch_class(batch),
    )
    return Call(signature, values, run, tokens.device, autocast)


def _is_default(value: Any, default: Any) -> bool:
    return not isinstance(value, Tensor) and bool(value == default)


def _collect(values: Any, tokens: Tensor, kinds: list[str], sizes: list[int]) -> None:
    defaults = getattr(values, "_field_defaults", {})
    for name, value in zip(getattr(values, "_fields", values), values, strict=True):
        if isinstance(name, str) and name in defaults and _is_default(value, defaults[name]):
            continue  # an option that the call does without
        if isinstance(value, Tensor):
            kinds.append(str(value.dtype).removeprefix("torch."))
            if value is not tokens and value.is_floating_point():
                sizes.extend(value.shape[1:2])
        elif isinstance(value, tuple):
            given = [t for t in value if isinstance(t, Tensor)]
            kinds.append("".join("+" if isinstance(t, Tensor) else "-" for t in value))
            kinds.extend(sorted({str(t.dtype).removeprefix("torch.") for t in given}))
            sizes.extend(t.shape[0] for t in given if t.dim() == 2)
        elif isinstance(value, int):
            sizes.append(int(value))
        else:
            kinds.append(str(value))

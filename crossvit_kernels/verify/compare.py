"""Compares a kernel's results with the reference, a few images at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossvit_kernels.autograd import recording
from crossvit_kernels.verify.rule import Tally

#: Bytes that the float64 reference may take: it runs on as many images at a time as fit.
MOST_BYTES = 256 << 20
#: With so few tokens differences in softmax's backward cancel, to zero for one.
_FEW_TOKENS = 4

#: What all images share, even if it has as many elements as there are images.
_SHARED = ("layer_scale",)

Reference = Callable[[Any, Any, float], Any]


def map_tensors(function: Callable[[Tensor], Any], values: Any) -> Any:
    """Apply a function to the tensors of nested tuples; the rest stays as it is."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, tuple):
        mapped = [map_tensors(function, v) for v in values]
        return type(values)(*mapped) if hasattr(values, "_fields") else tuple(mapped)
    return values


def tensors_of(values: Any) -> list[Tensor]:
    """Return the tensors of nested tuples, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, values)
    return found


def arithmetic(inputs: Any) -> torch.dtype:
    """Return the lowest precision among the inputs."""
    dtypes = {t.dtype for t in tensors_of(inputs) if t.is_floating_point()}
    return max(dtypes, key=lambda dtype: (torch.finfo(dtype).eps, str(dtype)))


def eager(reference: Reference, inputs: Any, eps: Any) -> tuple[Tensor, ...]:
    """Run the reference on inputs as a user in eager mode would; mixed dtypes are autocast's."""
    dtypes = {t.dtype for t in tensors_of(inputs) if t.is_floating_point()}
    context: Any = contextlib.nullcontext()
    if len(dtypes) > 1 and hasattr(inputs, "weights"):
        device = tensors_of(inputs)[0].device.type
        context = torch.autocast(device, dtype=arithmetic(inputs), cache_enabled=False)
    with context:
        outputs = reference(inputs, eps, 0.0)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(
    reference: Reference, inputs: Any, eps: Any, douts: Sequence[Tensor | None], wanted: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return detached outputs, and the gradients of the wanted inputs in order.

    Args:
        reference: (inputs, eps, dropout_p) -> output, or a tuple of them.
        inputs: Nested tuples of tensors.
        eps: The operation's.
        douts: The gradient of each output; None for zero.
        wanted: Bools in the structure of the inputs.
    """
    with recording():
        leaves = map_tensors(lambda t: t.detach().clone(), inputs)
        roots = [t for t, want in _pairs(leaves, wanted) if want]
        for t in roots:
            t.requires_grad_()
        outputs = eager(reference, leaves, eps)
        pairs = [
            (out, dout.to(out.dtype))
            for out, dout in zip(outputs, douts, strict=True)
            if dout is not None and out.requires_grad
        ]
        if not roots or not pairs:
            return [t.detach() for t in outputs], [torch.zeros_like(t) for t in roots]
        outs, grads = zip(*pairs, strict=True)
        results = torch.autograd.grad(outs, roots, grads, materialize_grads=True)
    return [t.detach() for t in outputs], list(results)


def _pairs(inputs: Any, wanted: Any) -> Iterator[tuple[Tensor, bool]]:
    for value, want in zip(inputs, wanted, strict=True):
        if isinstance(value, Tensor):
            yield value, bool(want)
        elif isinstance(value, tuple):
            yield from _pairs(value, want)


def in_dtype(values: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def _for_eager(inputs: Any, dtype: torch.dtype) -> Any:
    """Return inputs as eager mode has them for results in dtype."""
    if dtype == torch.float64:
        return in_dtype(inputs, torch.float32)
    return inputs if hasattr(inputs, "weights") else in_dtype(inputs, dtype)


def is_per_image(t: Tensor, batch: int) -> bool:
    return t.dim() > 0 and t.shape[0] == batch


def images(inputs: Any, start: int, stop: int, batch: int) -> Any:
    """Return the inputs of some images; weights, and what all images share, stay whole."""
    fields = {
        name: value[start:stop]
        for name, value in zip(inputs._fields, inputs, strict=True)
        if isinstance(value, Tensor) and name not in _SHARED and is_per_image(value, batch)
    }
    return inputs._replace(**fields)


def chunks(inputs: Any, tokens: Tensor) -> Iterator[tuple[int, int]]:
    """Yield ranges of images whose float64 reference takes at most MOST_BYTES."""
    batch, num_tokens, channels = tokens.shape
    rows = max((t.shape[1] for t in inputs if isinstance(t, Tensor) and t.dim() == 3), default=1)
    wide = max((t.shape[0] for t in tensors_of(inputs) if t.dim() == 2), default=0)
    heads = getattr(inputs, "num_heads", 1)
    per_image = (num_tokens + 1) * (24 * channels + 6 * wide + 6 * heads * max(rows, num_tokens))
    step = max(1, MOST_BYTES // (8 * per_image))
    for start in range(0, batch, step):
        yield start, min(start + step, batch)


def check_forward(
    reference: Reference, inputs: Any, eps: Any, outputs: Sequence[Tensor], tokens: Tensor
) -> str | None:
    """Return why outputs [B, ...] are not the reference's under the accuracy rule, or None."""
    dtype, batch = arithmetic(inputs), tokens.shape[0]
    tallies = [Tally(dtype) for _ in outputs]
    with torch.no_grad():
        for start, stop in chunks(inputs, tokens):
            part = images(inputs, start, stop, batch)
            exact = eager(reference, in_dtype(part, torch.float64), eps)
            low = eager(reference, _for_eager(part, dtype), eps)
            if len(exact) != len(outputs):
                return f"it has {len(outputs)} outputs, the reference {len(exact)}"
            for i, (tally, out) in enumerate(zip(tallies, outputs, strict=True)):
                if reason := tally.add(out[start:stop], low[i], exact[i]):
                    return f"output {i}: {reason}" if len(outputs) > 1 else reason
    return _violations(tallies, [f"output {i}" for i in range(len(outputs))])


def check_backward(
    reference: Reference,
    inputs: Any,
    eps: Any,
    douts: Sequence[Tensor | None],
    wanted: Any,
    found: Any,
    tokens: Tensor,
) -> str | None:
    """Return why gradients are not the reference's under the accuracy rule, or None.

    Where the terms of a gradient cancel, eager mode's own error may be small by luck, down to zero:
    in float32 a second judgement takes that of eager mode whose steps all err (``Rounding``).

    Args:
        reference: As in ``gradients``, like inputs, eps, douts and wanted.
        inputs: The operation's.
        eps: The operation's.
        douts: Gradients of the outputs.
        wanted: Bools in the structure of the inputs.
        found: The kernel's gradients, in the structure of the inputs.
        tokens: [B, N, C], the field of inputs that decides the batch.
    """
    dtype = arithmetic(inputs)

    def exact(part: Any, douts: Sequence[Tensor | None]) -> list[Tensor]:
        return gradients(reference, in_dtype(part, torch.float64), eps, douts, wanted)[1]

    def low(part: Any, douts: Sequence[Tensor | None]) -> list[Tensor]:
        return gradients(reference, _for_eager(part, dtype), eps, douts, wanted)[1]

    def erring(part: Any, douts: Sequence[Tensor | None]) -> list[Tensor]:
        with Rounding(dtype, tokens.device):
            return exact(part, douts)

    reason = _judge_backward(exact, low, inputs, douts, wanted, found, tokens)
    if reason is None or dtype != torch.float32:
        return reason
    again = _judge_backward(exact, erring, inputs, douts, wanted, found, tokens)
    return None if again is None else reason


_Gradients = Callable[[Any, Sequence[Tensor | None]], list[Tensor]]


def _judge_backward(
    exact_of: _Gradients,
    low_of: _Gradients,
    inputs: Any,
    douts: Sequence[Tensor | None],
    wanted: Any,
    found: Any,
    tokens: Tensor,
) -> str | None:
    """check_backward, given exact gradients and eager mode's of some images and their douts."""
    dtype, batch = arithmetic(inputs), tokens.shape[0]
    names, actual, shared = _wanted_gradients(inputs, wanted, found, batch)
    for name, t in zip(names, actual, strict=True):
        if t is None:
            return f"d_{name}: it is missing"
    floor = _cancellation(douts, tokens) * torch.finfo(dtype).eps
    tallies = [Tally(dtype, floor) for _ in names]
    sums: list[list[Tensor]] = [[], []]
    for start, stop in chunks(inputs, tokens):
        part = images(inputs, start, stop, batch)
        part_douts = [None if d is None else d[start:stop] for d in douts]
        exact, low = exact_of(part, part_douts), low_of(part, part_douts)
        for i, name in enumerate(names):
            if shared[i]:
                continue
            if reason := tallies[i].add(actual[i][start:stop], low[i], exact[i]):
                return f"d_{name}: {reason}"
        for total, some in zip(sums, (exact, low), strict=True):
            kept = [t.double() for t, is_shared in zip(some, shared, strict=True) if is_shared]
            total[:] = [a + b for a, b in zip(total, kept, strict=True)] if total else kept
    for i, exact_sum, low_sum in zip(
        [i for i, is_shared in enumerate(shared) if is_shared], *sums, strict=False
    ):
        rounded = low_sum if dtype == torch.float64 else low_sum.to(actual[i].dtype)
        if reason := tallies[i].add(actual[i], rounded, exact_sum):
            return f"d_{names[i]}: {reason}"
    return _violations(tallies, [f"d_{name}" for name in names])


class Rounding(TorchDispatchMode):
    """In the block, the results of all of torch's operators are off by up to two units in the last
    place of a dtype, at random: an upper estimate of what rounding costs an algorithm.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._size = 4 * torch.finfo(dtype).eps
        self._random = torch.Generator(device).manual_seed(0)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in operator._schema.returns):
            return results  # a view, or written in place
        return map_tensors(self._off, tuple(results) if isinstance(results, list) else results)

    def _off(self, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        by = torch.rand(t.shape, generator=self._random, dtype=t.dtype, device=t.device)
        return t.mul(by.sub_(0.5).mul_(self._size).add_(1))


def _violations(tallies: list[Tally], names: list[str]) -> str | None:
    for tally, name in zip(tallies, names, strict=True):
        if reason := tally.violation():
            return f"{name}: {reason}"
    return None


def _wanted_gradients(
    inputs: Any, wanted: Any, found: Any, batch: int, prefix: str = ""
) -> tuple[list[str], list[Any], list[bool]]:
    """Return names and gradients of the wanted inputs, and whether all images share the input."""
    names, actual, shared = list[str](), list[Any](), list[bool]()
    for name, value, want, gradient in zip(inputs._fields, inputs, wanted, found, strict=True):
        if isinstance(value, Tensor) and want:
            names.append(prefix + name)
            actual.append(gradient)
            shared.append(bool(prefix) or name in _SHARED or not is_per_image(value, batch))
        elif isinstance(value, tuple):
            inner = _wanted_gradients(value, want, gradient, batch, f"{name}.")
            names, actual, shared = names + inner[0], actual + inner[1], shared + inner[2]
    return names, actual, shared


def _cancellation(douts: Sequence[Tensor | None], tokens: Tensor) -> float:
    """Return the size of the terms that cancel in softmax's backward, where that matters.

    ds = p (dp - delta) with dp = dm . x, of size sqrt(C). With few tokens only rounding is left of
    the difference.
    """
    if tokens.shape[1] > _FEW_TOKENS:
        return 0.0
    size = max(
        (d.double().square().mean().sqrt().item() for d in douts if d is not None and d.numel()),
        default=0.0,
    )
    return 4 * math.sqrt(tokens.shape[2]) * size

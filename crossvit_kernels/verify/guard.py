"""Runs a backend's forward and backward, verified at first use where nothing proves its kernels.

Costs: a dict look-up a call where kernels are not watched; where they are, the key of the variant.
The first call of a variant also runs the reference in float64 and in the
call's dtype, a few images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from crossvit_kernels.verify import compare, state
from crossvit_kernels.verify.state import Retired, Variant


def forward(operation: Any, backend: str, inputs: Any, eps: Any, keep: str) -> Any:
    """Return outputs and saved as ``operation.module(backend).forward`` does."""
    module = operation.module(backend)
    if not state.watches(operation.tokens(inputs).device):
        return module.forward(inputs, eps, keep)
    variant = variant_of(operation, backend, inputs)
    details = (variant, "forward", keep, eps is None)
    if details in state.verified and not state.checks_again():
        return module.forward(inputs, eps, keep)
    tokens = operation.tokens(inputs)

    def check(results: Any) -> str | None:
        outputs = results[0] if isinstance(results[0], tuple) else (results[0],)
        return compare.check_forward(operation.reference, inputs, eps, outputs, tokens)

    results = _first(details, operation, tokens, lambda: module.forward(inputs, eps, keep), check)
    if results is not None:
        return results
    return _reference_forward(operation, module, inputs, eps, keep)


def backward(
    operation: Any,
    backend: str,
    douts: Sequence[Tensor | None],
    inputs: Any,
    saved: Any,
    eps: Any,
    wanted: Any,
) -> Any:
    """Return gradients as ``operation.module(backend).backward`` does."""
    module = operation.module(backend)
    if not state.watches(operation.tokens(inputs).device):
        return module.backward(douts, inputs, saved, eps, wanted)
    variant = variant_of(operation, backend, inputs)
    details = (variant, "backward", tuple(operation.flat(wanted)), eps is None)
    if details in state.verified and not state.checks_again():
        return module.backward(douts, inputs, saved, eps, wanted)
    tokens = operation.tokens(inputs)

    def check(found: Any) -> str | None:
        return compare.check_backward(
            operation.reference, inputs, eps, douts, wanted, found, tokens
        )

    results = None
    if not state.is_retired(variant, ("forward",)):  # it saved nothing for this
        results = _first(
            details,
            operation,
            tokens,
            lambda: module.backward(douts, inputs, saved, eps, wanted),
            check,
        )
    if results is not None:
        return results
    return _reference_backward(operation, douts, inputs, eps, wanted)


def variant_of(operation: Any, backend: str, inputs: Any) -> Variant:
    """Return what kernels are compiled or chosen for: dtypes, widths, what is absent, and classes
    of the number of images and tokens.
    """
    x = operation.tokens(inputs)
    batch, num_tokens, channels = x.shape
    classes = batch.bit_length(), num_tokens.bit_length(), channels
    key = [operation.name, backend, x.get_device(), x.dtype, *classes]
    for value in inputs:
        if isinstance(value, tuple):  # weights; this runs in every call, so not each is looked at
            key += [t is None for t in value]
            for t in (*value[:1], *value[2:3], *value[-2:-1]):
                key.append(None if t is None else (t.dtype, *t.shape))
        elif not isinstance(value, Tensor):
            key.append(value)
        elif value is not x:
            key.append(value.dtype)
            if value.dtype != torch.bool:
                key.extend(value.shape[1:2])
    return tuple(key)


def is_retired(operation: Any, backend: str, inputs: Any) -> bool:
    """Whether a backend's variant for these inputs was retired in a direction that is needed.

    A compiler's trace has no sizes: there, whether any variant of the operation was.
    """
    if torch.compiler.is_compiling():
        return f"{operation.name}/{backend}" in state.retired_names
    needs_backward = torch.is_grad_enabled() and any(
        t.requires_grad for t in compare.tensors_of(inputs)
    )
    directions = ("forward", "backward") if needs_backward else ("forward",)
    return state.is_retired(variant_of(operation, backend, inputs), directions)


def _first(
    details: Variant,
    operation: Any,
    tokens: Tensor,
    run: Callable[[], Any],
    check: Callable[[Any], str | None],
) -> Any:
    """Return the results of a run if it may be trusted, else None; retires the variant if not."""
    variant, direction = details[:2]
    if state.is_retired(variant, (direction,)):
        return None
    if _on_gpu(tokens) and torch.cuda.is_current_stream_capturing():
        return run()  # a comparison would wait for the device
    reason = results = None
    try:
        results = run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _raise_if_unusable(tokens, operation.name, variant[1], error)
        reason = f"it raises {type(error).__name__}: {_first_line(error)}"
    if reason is None:
        try:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                reason = check(results)
        except Exception as error:  # of the reference: it proves nothing against the kernel
            _raise_if_unusable(tokens, operation.name, variant[1], error)
            state.note_unverified(details, f"{type(error).__name__}: {_first_line(error)}")
            return results
    if reason is None:
        state.verified.add(details)
        return results
    shown = f"{list(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
    state.retire(variant, Retired(operation.name, variant[1], direction, reason, shown))
    return None


def _on_gpu(tokens: Tensor) -> bool:
    return tokens.is_cuda


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _raise_if_unusable(tokens: Tensor, operation: str, backend: str, error: Exception) -> None:
    """Raise if an error left the CUDA context unusable: no backend can then run on the device.

    Raises:
        RuntimeError: It did.
    """
    if not _on_gpu(tokens) or context_works(tokens.device):
        return
    raise RuntimeError(
        f"{operation} on {backend}: a CUDA error made the device unusable for this process, so no "
        f"other backend can take over: {_first_line(error)}. Restart the process with "
        "CROSSVIT_KERNELS_BACKEND=reference, or name another backend there. Please report this "
        "message, with what CUDA_LAUNCH_BLOCKING=1 and `python -m crossvit_kernels` print; it "
        f"ran on {state.environment()}"
    ) from error


def context_works(device: torch.device) -> bool:
    """Whether a device still runs kernels after an error."""
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, dtype=torch.float32, device=device).item()
    except torch.OutOfMemoryError:
        return True
    except Exception:
        return False
    return True


def _reference_forward(operation: Any, module: Any, inputs: Any, eps: Any, keep: str) -> Any:
    """Return the reference's outputs, as the backend would, and saved without contents."""
    with torch.no_grad():
        outputs = compare.eager(operation.reference, inputs, eps)
    like = operation.empty_outputs(inputs)
    outputs = tuple(t.to(e.dtype).contiguous() for t, e in zip(outputs, like, strict=True))
    saved = module.empty_saved(inputs, keep) if keep else None
    return outputs if operation.num_outputs > 1 else outputs[0], saved


def _reference_backward(
    operation: Any, douts: Sequence[Tensor | None], inputs: Any, eps: Any, wanted: Any
) -> Any:
    """Return the reference's gradients in the structure of the inputs."""
    results = compare.gradients(operation.reference, inputs, eps, douts, wanted)[1]
    remaining = iter(results)

    def fill(values: Any, wants: Any) -> Any:
        fields = [
            fill(value, want)
            if isinstance(value, tuple)
            else (next(remaining) if isinstance(value, Tensor) and want else None)
            for value, want in zip(values, wants, strict=True)
        ]
        return type(values)(*fields)

    return fill(inputs, wanted)

"""Which backends are usable here, which one runs a call, and which calls only the reference runs.

Each operation has, per backend, a module whose ``why_not`` returns why it cannot run an input, or
None. The first backend that can is chosen, in the order below; the reference can run everything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from crossvit_kernels import extension
from crossvit_kernels.calibration import store
from crossvit_kernels.gpu import launcher
from crossvit_kernels.verify import state

#: On a CPU "triton" runs only in its interpreter, very slowly. "reference" is eager PyTorch, on any
#: device. "library" composes torch's own kernels, scaled_dot_product_attention among them; it runs
#: only if it is named, or was measured to be fastest (ck.calibrate).
NAMES = ("cuda", "cpu", "triton", "library", "reference")

_ON_A_CPU = ("cpu", "cuda", "triton")  # the last two for tests
_ON_A_GPU = {0: ("triton",), 80: ("cuda", "triton")}

ENVIRONMENT_VARIABLE = "CROSSVIT_KERNELS_BACKEND"

# The backend of use_backend(); None outside of it. A plain global rather than a context variable:
# torch.compile guards on it, so compiled functions respect a change.
_requested: str | None = None

# What ``watching`` collects; None outside of it.
_watched: set[str] | None = None

# operation -> backends that have kernels for it; their order on a GPU.
_operations: dict[str, tuple[str, ...]] = {}
_orders: dict[str, Mapping[int, tuple[str, ...]]] = {}


class Backends(dict[str, bool]):
    """Maps backend names to whether they are usable; ``reasons`` says why the others are not."""

    def __init__(self, reasons: Mapping[str, str | None]) -> None:
        super().__init__({name: reason is None for name, reason in reasons.items()})
        self.reasons = {name: reason for name, reason in reasons.items() if reason is not None}

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(
            f"{name:{width}}  {'usable' if ok else 'not usable: ' + self.reasons[name]}"
            for name, ok in self.items()
        )


def backends() -> Backends:
    """Return the backends, whether each is usable on this machine, and if not, why.

    Returns:
        A dict of name to bool, e.g. ``{"reference": True, "cpu": True, "cuda": False, "triton":
        False}``, whose attribute ``reasons`` maps each unusable backend to the reason. An
        operation may still reject an input on a usable backend.
    """
    reasons = {
        "reference": None,
        "cpu": extension.missing,
        "cuda": _why_not_cuda(),
        "triton": launcher.missing(),
        "library": None,
    }
    for name, reason in reasons.items():
        if reason is None and name != "reference" and not _operations_with(name):
            reasons[name] = f"no operation has kernels for it in this version ({name})"
    return Backends(reasons)


def register_operation(
    operation: str, names: tuple[str, ...], order: Mapping[int, tuple[str, ...]] | None = None
) -> None:
    """Record the backends of an operation.

    Args:
        operation: Its name.
        names: The backends that have kernels for it.
        order: Their order on a GPU by minimum compute capability, 90 for 9.0; by default CUDA
            before Triton. Predicted (docs/cuda.md, docs/performance.md), not measured.
    """
    _operations[operation] = names
    _orders[operation] = {**_ON_A_GPU, **(order or {})}
    _order.cache_clear()


def _operations_with(backend: str) -> list[str]:
    return [operation for operation, names in _operations.items() if backend in names]


def _why_not_cuda() -> str | None:
    if extension.missing:
        return extension.missing
    if extension.cuda_kernels is None:
        return extension.NO_CUDA
    if extension.cuda_kernels.device_type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    failure = extension.failure_on(torch.device("cuda", torch.cuda.current_device()))
    return f"its check kernel did not run: {failure}" if failure else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation in the block on one backend, unless a call names another.

    Args:
        name: One of ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"``, ``"library"``,
            ``"reference"``, or a variant of its kernels, such as ``"triton:split"``. The setting
            applies to the process, not to a thread.

    Raises:
        ValueError: ``name`` is no backend. A call in the block that the backend cannot run raises
            ``ValueError`` with the reason.
    """
    global _requested
    check_name(name)
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


@contextmanager
def watching() -> Iterator[set[str]]:
    """Collect what runs in the block: "<operation>: <backend>", and the names of Triton kernels.

    Calls in compiled functions are seen only by their kernels.
    """
    global _watched
    previous = _watched, launcher.launched
    _watched = launcher.launched = set()
    try:
        yield _watched
    finally:
        _watched, launcher.launched = previous


def check_name(name: str) -> None:
    if name != "auto" and name.partition(":")[0] not in NAMES:
        raise ValueError(f"unknown backend {name!r}: expected 'auto' or one of {sorted(NAMES)}")


def order(operation: str, device: torch.device) -> tuple[str, ...]:
    """Return the backends of an operation on a device, fastest first."""
    if device.type != "cuda":
        return _ON_A_CPU
    return _order(operation, extension.compute_capability(device))


@functools.cache
def _order(operation: str, capability: int) -> tuple[str, ...]:
    orders = _orders.get(operation, _ON_A_GPU)
    return orders[max(since for since in orders if since <= capability)]


def choose(
    operation: str,
    requested: str | None,
    modules: Mapping[str, Any],
    device: torch.device,
    why_not: Callable[[Any], str | None],
    prefer_reference: bool = False,
    is_retired: Callable[[str], bool] | None = None,
    call: Callable[[], Any] | None = None,
) -> str:
    """Choose the backend that runs a call of ``operation``.

    Args:
        operation: Name, for messages.
        requested: The call's ``backend`` argument; None for that of ``use_backend`` or, outside
            of it, of the environment.
        modules: The module of each backend with kernels.
        device: The device of the call's tensors.
        why_not: Returns why a module cannot run this call, or None.
        prefer_reference: Whether the reference is faster here; a named backend takes precedence.
        is_retired: Whether verification retired a backend's kernels for this call, which another
            then runs.
        call: Returns the call as a ``calibration.store.Call``, for which a backend may have been
            measured.

    Raises:
        ValueError: The backend is unknown, or was named and cannot run the call.
    """
    name = requested or _requested or os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    check_name(name)
    if name == "auto":
        candidates = () if prefer_reference else order(operation, device)
        if call is not None:
            if store.recorder is not None and not torch.compiler.is_compiling():
                usual = _first(candidates, modules, why_not, is_retired)
                store.recorder(call()._replace(usual=usual))
            measured = store.choice(device, operation, call)
            candidates = (measured, *candidates) if measured else candidates
        name = _first(candidates, modules, why_not, is_retired)
    elif name != "reference" and (name not in modules or why_not(modules[name]) is not None):
        reasons = [
            f"{other}: {why_not(modules[other]) or 'can run it'}"
            if other in modules
            else f"{other}: no kernels for this operation"
            for other in dict.fromkeys((*NAMES, *([name] if name in modules else [])))
            if other != "reference"
        ]
        raise ValueError(
            f"backend {name!r} cannot run this call of {operation}. "
            + "; ".join([*reasons, "reference: can run it"])
        )
    if _watched is not None and not torch.compiler.is_compiling():
        _watched.add(f"{operation}: {name}")
    return name


def _first(
    candidates: tuple[str, ...],
    modules: Mapping[str, Any],
    why_not: Callable[[Any], str | None],
    is_retired: Callable[[str], bool] | None,
) -> str:
    """Return the first candidate that can run a call, else the reference."""
    for name in candidates:
        if name == "reference":
            break
        if name not in modules or why_not(modules[name]) is not None:
            continue
        if state.retired_names and is_retired is not None and is_retired(name):
            continue
        return name
    return "reference"


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of arithmetic on tokens x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """Return autocast's dtype of matrix products on t's device; None if it is off."""
    device_type = t.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # meta has no autocast
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_linears(weights: Any, like: Tensor, norms: tuple[str, ...]) -> Any:
    """Return the weights, with those of linear layers in autocast's dtype.

    Like autocast itself, it leaves float64 alone.

    Args:
        weights: NamedTuple whose fields are ``<layer>_weight`` and ``<layer>_bias``.
        like: A tensor on the device whose autocast setting applies.
        norms: The layers that are LayerNorms, which autocast leaves alone.
    """
    dtype = autocast_dtype(like)
    if dtype is None:
        return weights
    return [
        w
        if w is None or w.dtype == torch.float64 or name.rsplit("_", 1)[0] in norms
        else w.to(dtype)
        for name, w in zip(weights._fields, weights, strict=True)
    ]


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def is_plain_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the dispatcher can be bypassed: only the kernel needs to see the call."""
    return not (
        torch.compiler.is_compiling()
        or _num_dispatch_modes()
        or _num_function_modes()
        or _transform() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or not _PLAIN.issuperset(map(type, tensors))
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    )


# Modes such as FakeTensorMode or a default device, and transforms such as vmap; assumed active if
# this torch cannot report them.
_num_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_num_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_transform: Any = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: "unknown")
# The internal vmap of torch.autograd.grad.
_BATCHED_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def why_not_fused(
    tensors: Sequence[Tensor | None],
    dropout_p: float = 0.0,
    residual_scale: Tensor | None = None,
    is_plain: bool = False,
) -> str | None:
    """Return why only the reference can run a call, or None.

    Args:
        tensors: All tensors of the call; may include residual_scale.
        dropout_p: Attention dropout.
        residual_scale: [B] or None.
        is_plain: That ``is_plain_eager(tensors)`` was found true.
    """
    if dropout_p > 0:
        return f"attention dropout is not fused (dropout_p={dropout_p})"
    if residual_scale is not None and needs_grad(residual_scale):
        return "no kernel has a gradient for residual_scale"
    return why_no_kernel(tensors, is_plain)


def why_no_kernel(tensors: Sequence[Tensor | None], is_plain: bool = False) -> str | None:
    """Return why kernels cannot handle these tensors by their memory alone, or None.

    A kernel reads addresses. It neither sees nor propagates what torch attaches to its operators (a
    trace, a tangent, a batch dimension of vmap, the shards of a DTensor, a pending negation); the
    reference does, as it consists of torch's operators. What is_plain_eager rules out is not looked
    for again if it was found true.
    """
    if not is_plain:
        if torch.compiler.is_compiling():
            return None
        if torch._C._get_tracing_state() is not None:
            return "torch.jit.trace records torch's own operators alone"
        if _transform() is not None:
            return "kernels take no part in the transforms of torch.func"
        if not _PLAIN.issuperset(map(type, tensors)):
            for kind in set(map(type, tensors)) - _PLAIN:
                if _is_wrapper(kind):
                    return f"a {kind.__name__} has no memory of its own"
    if torch._C._dispatch_tls_is_dispatch_key_included(_BATCHED_GRADIENTS):
        return "kernels take no batched gradients (is_grads_batched=True)"
    given = [t for t in tensors if t is not None]
    if any(map(torch.Tensor.is_neg, given)):
        return "a tensor is a negative view: call .resolve_neg() on it"
    if any(map(torch.Tensor._is_zerotensor, given)):
        return "a tensor of zeros has no memory"
    if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in given):
        return "kernels have no forward-mode derivatives"
    return None


def overrides_functions(kind: type) -> bool:
    """Whether a tensor type overrides torch's functions."""
    function: Any = getattr(kind, "__torch_function__", None)
    default: Any = torch.Tensor.__torch_function__
    return (
        function is not torch._C._disabled_torch_function_impl
        and getattr(function, "__func__", None) is not default.__func__
    )


def _is_wrapper(kind: type) -> bool:
    """Whether tensors of a type implement torch's operators in Python instead of having memory.
    The types that torch traces with do not count: they support custom operators.
    """
    dispatches = getattr(kind, "__torch_dispatch__", None)
    if dispatches is torch._C._disabled_torch_dispatch_impl:
        return overrides_functions(kind)
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not issubclass(kind, (FakeTensor, FunctionalTensor))


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None

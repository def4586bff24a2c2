"""An operation as torch sees it: two operators, and one autograd Function for all operations.

An operation is a folder. Its ``reference.py`` defines it and its inputs; its backends (``cpu.py``,
``cuda.py``, ``triton.py``) compute it; its ``op.py`` declares an ``Operation``. A backend is a
module with

    Saved                                             NamedTuple: what backward needs
    why_not(inputs) -> str | None                     why it cannot take them; None where it can
    empty_saved(inputs, keep) -> Saved                memory for it
    forward(inputs, eps, keep) -> outputs, saved      saved is None where keep is ""
    backward(douts, inputs, saved, eps, wanted) -> gradients

Inputs are a NamedTuple of tensors or None. Two fields are special: ``weights`` is a NamedTuple of
tensors itself, ``num_heads`` an int. ``wanted`` and the gradients have the same structure: bools,
and tensors or None. keep says what forward keeps for backward, "" where none follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import choose, register_operation
from crossvit_kernels.ops import autograd, refusals
from crossvit_kernels.ops.flops import Flops, tell_counters

#: By name, for the autograd Function: a compiler traces a name more easily than an object.
OPERATIONS: dict[str, Operation] = {}

_LIBRARY = torch.library.Library("crossvit_kernels", "DEF")

Tensors = Sequence[Tensor | None]


class Operation:
    """The operators ``<name>_forward`` and ``<name>_backward``, their autograd and dispatch.

    Args:
        name: In the namespace ``crossvit_kernels``.
        inputs: Their NamedTuple.
        implementations: Backend name -> module, in the order of ``order`` where that says nothing.
        reference: (inputs, eps, dropout_p) -> output, or a tuple of them.
        empty_outputs: Of inputs, for tracing: the outputs' shapes, dtypes and devices.
        flops: For ``FlopCounterMode``.
        weights: NamedTuple of the field ``weights``; None where there is none.
        norms: Weights ``<layer>_weight`` and ``<layer>_bias`` that autocast leaves alone.
        tokens: The field whose device decides.
        num_outputs: How many there are.
        order: See ``backends.register_operation``.
    """

    def __init__(
        self,
        name: str,
        inputs: Any,
        implementations: Mapping[str, Any],
        reference: Callable[[Any, Any, float], Any],
        empty_outputs: Callable[[Any], tuple[Tensor, ...]],
        flops: Flops,
        *,
        weights: Any = None,
        norms: tuple[str, ...] = (),
        tokens: str = "x",
        num_outputs: int = 1,
        order: Mapping[int, tuple[str, ...]] | None = None,
    ) -> None:
        self.name, self.backends, self.reference = name, dict(implementations), reference
        self.num_outputs, self._flops = num_outputs, flops
        self._make, self._make_weights, self._norms = inputs, weights, norms
        self._empty_outputs = empty_outputs
        special = ("weights", "num_heads")
        self._names = tuple(field for field in inputs._fields if field not in special)
        self._at = tuple(map(inputs._fields.index, self._names))
        self._weights_at = inputs._fields.index("weights") if weights else -1
        self._tokens_at = inputs._fields.index(tokens)
        self._has_heads = "num_heads" in inputs._fields
        self._forward_operator = _register(
            f"{name}_forward(Tensor?[] tensors, int num_heads, float? eps, str keep, str backend) "
            "-> Tensor[]",
            self._forward,
            self._forward_fake,
        )
        self._backward_operator = _register(
            f"{name}_backward(Tensor?[] douts, Tensor?[] tensors, Tensor[] saved, bool[] wanted, "
            "int num_heads, float? eps, str backend) -> Tensor[]",
            self._backward,
            self._backward_fake,
        )
        OPERATIONS[name] = self
        register_operation(name, tuple(implementations), order or {})

    def __call__(
        self,
        inputs: Any,
        eps: float | None,
        *,
        keep: str = "fast",
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> Any:
        """The output, or a tuple of them, on the backend that is named or comes first."""
        chosen = self.choose(inputs, dropout_p, backend)
        if chosen == "reference":
            return self.reference(inputs, eps, dropout_p)
        return self.run(self.autocast(inputs), eps, keep, chosen)

    def choose(self, inputs: Any, dropout_p: float, backend: str | None) -> str:
        """The backend of a call.

        Raises:
            ValueError: The one that is named cannot run it.
        """
        not_fused = refusals.why_not_fused(
            *self.flat(inputs),
            dropout_p=dropout_p,
            residual_scale=getattr(inputs, "residual_scale", None),
        )
        return choose(
            self.name,
            backend,
            self.backends,
            inputs[self._tokens_at].device,
            lambda module: not_fused or module.why_not(inputs),
        )

    def run(self, inputs: Any, eps: float | None, keep: str, backend: str) -> Any:
        """The outputs on one backend, differentiable where a tensor requires it."""
        tensors = self.flat(inputs)
        num_heads = inputs.num_heads if self._has_heads else 0
        if refusals.needs_grad(*tensors):
            return _Function.apply(self.name, num_heads, eps, keep, backend, *tensors)
        if refusals.is_plain_eager(tensors):
            return self.backends[backend].forward(inputs, eps, "")[0]
        outputs = self.forward(tensors, num_heads, eps, "", backend)
        return outputs[0] if self.num_outputs == 1 else tuple(outputs)

    def autocast(self, inputs: Any) -> Any:
        """Inputs with the weights of linear layers in autocast's dtype."""
        if not self._make_weights:
            return inputs
        like = inputs[self._tokens_at]
        if autograd.autocast_dtype(like) is None:
            return inputs
        weights = autograd.autocast_linears(inputs.weights, like, self._norms)
        return inputs._replace(weights=weights)

    def flat(self, inputs: Any) -> list[Any]:
        """The tensors, those of the weights last; or what stands in their places."""
        tensors = [inputs[i] for i in self._at]
        return [*tensors, *inputs[self._weights_at]] if self._make_weights else tensors

    def inputs(self, flat: Sequence[Any], num_heads: Any = None) -> Any:
        """The counterpart of ``flat``."""
        count = len(self._names)
        fields = dict(zip(self._names, flat, strict=False))
        if self._make_weights:
            fields["weights"] = self._make_weights._make(flat[count:])
        if self._has_heads:
            fields["num_heads"] = num_heads
        return self._make(**fields)

    def forward(
        self, tensors: Tensors, num_heads: int, eps: float | None, keep: str, backend: str
    ) -> list[Tensor]:
        """The outputs, then what is kept for backward."""
        operator: Any = self._forward
        if not refusals.is_plain_eager(tensors):
            operator = self._forward_operator
            self._count_flops()
        return operator(list(tensors), num_heads, eps, keep, backend)

    def backward(
        self,
        douts: Tensors,
        tensors: Tensors,
        saved: Tensors,
        wanted: list[bool],
        num_heads: int,
        eps: float | None,
        backend: str,
    ) -> list[Tensor | None]:
        """The gradients that are wanted, None for the others."""
        operator: Any = self._backward
        if not refusals.is_plain_eager([*douts, *tensors, *saved]):
            operator = self._backward_operator
            self._count_flops()
        found = operator(list(douts), [*tensors], list(saved), wanted, num_heads, eps, backend)
        return [g if want else None for g, want in zip(found, wanted, strict=True)]

    def _count_flops(self) -> None:
        if torch.compiler.is_compiling():
            return

        def forward(tensors: Any, num_heads: int, *_: Any, **__: Any) -> int:
            return self._flops.forward(self.inputs(tensors, num_heads))

        def backward(
            douts: Any, tensors: Any, saved: Any, wanted: Any, num_heads: int, *_: Any, **__: Any
        ) -> int:
            return self._flops.backward(self.inputs(tensors, num_heads), self.inputs(wanted))

        ways = (self._forward_operator, forward), (self._backward_operator, backward)
        tell_counters({operator.overloadpacket: formula for operator, formula in ways})

    def _forward(
        self, tensors: Tensors, num_heads: int, eps: float | None, keep: str, backend: str
    ) -> list[Tensor]:
        inputs = self.inputs(tensors, num_heads)
        outputs, saved = self.backends[backend].forward(inputs, eps, keep)
        kept = saved if keep and saved else ()
        return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *kept]

    def _forward_fake(
        self, tensors: Tensors, num_heads: int, eps: float | None, keep: str, backend: str
    ) -> list[Tensor]:
        inputs = self.inputs(tensors, num_heads)
        saved = self.backends[backend].empty_saved(inputs, keep) if keep else ()
        return [*self._empty_outputs(inputs), *saved]

    def _backward(
        self,
        douts: Tensors,
        tensors: Tensors,
        saved: list[Tensor],
        wanted: list[bool],
        num_heads: int,
        eps: float | None,
        backend: str,
    ) -> list[Tensor]:
        module = self.backends[backend]
        inputs, wants = self.inputs(tensors, num_heads), self.inputs(wanted)
        found = self.flat(module.backward(douts, inputs, module.Saved(*saved), eps, wants))
        like = inputs[self._tokens_at]
        return [g if want else like.new_empty(0) for g, want in zip(found, wanted, strict=True)]

    def _backward_fake(
        self,
        douts: Tensors,
        tensors: Tensors,
        saved: list[Tensor],
        wanted: list[bool],
        num_heads: int,
        eps: float | None,
        backend: str,
    ) -> list[Tensor]:
        like = self.inputs(tensors, num_heads)[self._tokens_at]
        return autograd.empty_gradients(tensors, wanted, like)


class _Function(torch.autograd.Function):
    """The autograd of all operations."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        num_heads: int,
        eps: float | None,
        keep: str,
        backend: str,
        *tensors: Tensor | None,
    ) -> Any:
        operation = OPERATIONS[name]
        results = operation.forward(tensors, num_heads, eps, keep, backend)
        ctx.constants = (name, num_heads, eps, backend)
        return autograd.outputs(ctx, tensors, results, operation.num_outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        name, num_heads, eps, backend = ctx.constants
        operation = OPERATIONS[name]
        wanted = list(ctx.needs_input_grad[5:])
        tensors, saved = autograd.saved(ctx, len(wanted))
        if autograd.needs_reference(douts):

            def reference(*tensors: Tensor | None) -> Any:
                return operation.reference(operation.inputs(tensors, num_heads), eps, 0.0)

            gradients = autograd.by_reference(ctx, reference, tensors, wanted, douts)
        else:
            gradients = operation.backward(douts, tensors, saved, wanted, num_heads, eps, backend)
        return (None,) * 5 + tuple(gradients)


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator of a schema, for CPU and CUDA tensors.

    Operators are functional (no argument is written to) and carry no autograd formula.

    Args:
        schema: ``name(arguments) -> results`` without the namespace.
        kernel: Runs it on tensors.
        fake: Makes empty results of the right shapes, dtypes and devices, for tracing.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _without_autocast(kernel, device_type.lower()), device_type)
    torch.library.register_fake(f"crossvit_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.crossvit_kernels, name).default


def _without_autocast(kernel: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """Kernels compute in the dtypes they are given: ``Operation.autocast`` has cast the weights."""

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args, **kwargs)

    return run

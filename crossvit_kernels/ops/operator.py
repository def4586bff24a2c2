"""Operations as torch operators, two each, with one autograd Function for all operations.

An operation is a folder. Its ``reference.py`` defines it and its inputs; its backends (``cpu.py``,
``cuda.py``, ``triton.py``) compute it; its ``op.py`` declares an ``Operation``. A backend is a
module with

    Saved                                             NamedTuple: what backward needs
    why_not(inputs) -> str | None                     why it cannot take them, or None
    empty_saved(inputs, keep) -> Saved                allocates it
    forward(inputs, eps, keep) -> outputs, saved      saved is None if keep is ""
    backward(douts, inputs, saved, eps, wanted) -> gradients

Inputs are a NamedTuple of tensors or None. Three fields are special: ``weights`` is itself a
NamedTuple of tensors, ``num_heads`` an int, ``activation`` a str. ``wanted`` (bools) and the
gradients (tensors or None) have the same structure. keep says what forward keeps for backward; ""
if there is no backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit_kernels.backends import (
    autocast_dtype,
    autocast_linears,
    choose,
    is_plain_eager,
    needs_grad,
    register_operation,
    why_no_kernel,
    why_not_fused,
)
from crossvit_kernels.ops.describe import describe
from crossvit_kernels.ops.flops import Flops, tell_counters
from crossvit_kernels.ops.registration import register
from crossvit_kernels.verify import guard, state

#: By name, for the autograd Function: a name is easier to trace than an object.
OPERATIONS: dict[str, Operation] = {}

Tensors = Sequence[Tensor | None]


class Operation:
    """The operators ``<name>_forward`` and ``<name>_backward``, their autograd and dispatch.

    Args:
        name: Its name in the namespace ``crossvit_kernels``.
        inputs: The NamedTuple of its inputs.
        implementations: Backend name -> module.
        reference: (inputs, eps, dropout_p) -> output, or a tuple of them.
        empty_outputs: Allocates outputs for inputs, for tracing: shapes, dtypes and devices.
        flops: Formulas for ``FlopCounterMode``.
        weights: NamedTuple of the field ``weights``; None without that field.
        norms: Weights ``<layer>_weight`` and ``<layer>_bias`` that autocast leaves alone.
        tokens: The field whose device selects the backends.
        num_outputs: Number of outputs.
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
        self.empty_outputs = empty_outputs
        special = ("weights", "num_heads", "activation")
        self._names = tuple(field for field in inputs._fields if field not in special)
        self._tensor_indices = tuple(map(inputs._fields.index, self._names))
        self._weights_index = inputs._fields.index("weights") if weights else -1
        self._tokens_index = inputs._fields.index(tokens)
        self._has_heads = "num_heads" in inputs._fields
        self._has_activation = "activation" in inputs._fields
        activation = ', str activation="gelu"' if self._has_activation else ""
        self._forward_operator = register(
            f"{name}_forward(Tensor?[] tensors, int num_heads, float? eps, str keep, str backend"
            f"{activation}) -> Tensor[]",
            self._forward,
            self._forward_fake,
        )
        self._backward_operator = register(
            f"{name}_backward(Tensor?[] douts, Tensor?[] tensors, Tensor[] saved, bool[] wanted, "
            f"int num_heads, float? eps, str backend{activation}) -> Tensor[]",
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
        """Return the output, or a tuple of them, on the named or the first usable backend."""
        tensors = self.flat(inputs)
        is_plain = is_plain_eager(tensors)
        options = dropout_p, backend, lambda x, name: self(x, eps, keep=keep, backend=name)
        chosen = self.choose(inputs, *options, tensors, is_plain)
        if chosen == "reference":
            return self.reference(inputs, eps, dropout_p)
        if is_plain and not needs_grad(*tensors):  # autocast is off
            return self._run_forward(chosen, inputs, eps, "")[0]
        return self.run(self._autocast(inputs), eps, keep, chosen)

    def choose(
        self,
        inputs: Any,
        dropout_p: float,
        backend: str | None,
        run: Callable[[Any, str], Any] | None = None,
        tensors: Tensors | None = None,
        is_plain: bool = False,
    ) -> str:
        """Choose the backend of a call; run(inputs, backend) repeats it, to be measured.

        tensors and is_plain are flat(inputs) and is_plain_eager of it, if the caller has them.

        Raises:
            ValueError: The named backend cannot run it.
        """
        scale = getattr(inputs, "residual_scale", None)
        not_fused = why_not_fused(tensors or self.flat(inputs), dropout_p, scale, is_plain)
        return choose(
            self.name,
            backend,
            self.backends,
            self.tokens(inputs).device,
            lambda module: not_fused or module.why_not(inputs),
            is_retired=lambda name: guard.is_retired(self, name, inputs),
            call=None if run is None or not_fused else lambda: describe(self, inputs, run),
        )

    def tokens(self, inputs: Any) -> Tensor:
        """Return the tokens [B, N, C] of inputs."""
        return inputs[self._tokens_index]

    def module(self, backend: str) -> Any:
        """Return the module of a backend."""
        return self.backends[backend]

    def run(self, inputs: Any, eps: float | None, keep: str, backend: str) -> Any:
        """Compute the outputs on one backend, with autograd if a tensor requires grad."""
        tensors = self.flat(inputs)
        num_heads = inputs.num_heads if self._has_heads else 0
        activation = inputs.activation if self._has_activation else ""
        if needs_grad(*tensors):
            return _Function.apply(self.name, num_heads, eps, keep, backend, activation, *tensors)
        if is_plain_eager(tensors):
            return self._run_forward(backend, inputs, eps, "")[0]
        outputs = self.forward(tensors, num_heads, eps, "", backend, activation)
        return outputs[0] if self.num_outputs == 1 else tuple(outputs)

    def _run_forward(self, backend: str, inputs: Any, eps: float | None, keep: str) -> Any:
        """Return outputs and saved of a backend, verified where nothing proves its kernels."""
        if state.watched.get(self.tokens(inputs).device, True):
            return guard.forward(self, backend, inputs, eps, keep)
        return self.module(backend).forward(inputs, eps, keep)

    def _autocast(self, inputs: Any) -> Any:
        """Return inputs with the weights of linear layers in autocast's dtype."""
        if not self._make_weights:
            return inputs
        like = self.tokens(inputs)
        if autocast_dtype(like) is None:
            return inputs
        weights = autocast_linears(inputs.weights, like, self._norms)
        return inputs._replace(weights=weights)

    def flat(self, inputs: Any) -> list[Any]:
        """Flatten inputs, or values of the same structure; the weights come last."""
        tensors = [inputs[i] for i in self._tensor_indices]
        return [*tensors, *inputs[self._weights_index]] if self._make_weights else tensors

    def inputs(self, flat: Sequence[Any], num_heads: Any = None, activation: str = "gelu") -> Any:
        """Invert ``flat``; the dispatcher omits arguments equal to their default."""
        count = len(self._names)
        fields = dict(zip(self._names, flat, strict=False))
        if self._make_weights:
            fields["weights"] = self._make_weights._make(flat[count:])
        if self._has_heads:
            fields["num_heads"] = num_heads
        if self._has_activation:
            fields["activation"] = activation
        return self._make(**fields)

    def forward(
        self,
        tensors: Tensors,
        num_heads: int,
        eps: float | None,
        keep: str,
        backend: str,
        activation: str,
    ) -> list[Tensor]:
        """Return the outputs, then what is kept for backward."""
        operator: Any = self._forward
        if not is_plain_eager(tensors):
            operator = self._forward_operator
            self._count_flops()
        return operator(list(tensors), num_heads, eps, keep, backend, *self._given(activation))

    def _given(self, activation: str) -> tuple[str, ...]:
        return (activation,) if self._has_activation else ()

    def backward(
        self,
        douts: Tensors,
        tensors: Tensors,
        saved: Tensors,
        wanted: list[bool],
        num_heads: int,
        eps: float | None,
        backend: str,
        activation: str,
    ) -> list[Tensor | None]:
        """Return the wanted gradients, None for the others."""
        operator: Any = self._backward
        if not is_plain_eager([*douts, *tensors, *saved]):
            operator = self._backward_operator
            self._count_flops()
        constants = num_heads, eps, backend, *self._given(activation)
        gradients = operator(list(douts), [*tensors], list(saved), wanted, *constants)
        return [g if want else None for g, want in zip(gradients, wanted, strict=True)]

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
        self, tensors: Tensors, num_heads: int, eps: Any, keep: str, backend: str, *activation: str
    ) -> list[Tensor]:
        inputs = self.inputs(tensors, num_heads, *activation)
        outputs, saved = self._run_forward(backend, inputs, eps, keep)
        kept = saved if keep and saved else ()
        return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *kept]

    def _forward_fake(
        self, tensors: Tensors, num_heads: int, eps: Any, keep: str, backend: str, *activation: str
    ) -> list[Tensor]:
        inputs = self.inputs(tensors, num_heads, *activation)
        saved = self.module(backend).empty_saved(inputs, keep) if keep else ()
        return [*self.empty_outputs(inputs), *saved]

    def _backward(
        self,
        douts: Tensors,
        tensors: Tensors,
        saved: list[Tensor],
        wanted: list[bool],
        num_heads: int,
        eps: float | None,
        backend: str,
        *activation: str,
    ) -> list[Tensor]:
        module = self.module(backend)
        inputs, wants = self.inputs(tensors, num_heads, *activation), self.inputs(wanted)
        kept = module.Saved(*saved)
        if state.watched.get(self.tokens(inputs).device, True):
            gradients = self.flat(guard.backward(self, backend, douts, inputs, kept, eps, wants))
        else:
            gradients = self.flat(module.backward(douts, inputs, kept, eps, wants))
        like = self.tokens(inputs)
        return [g if want else like.new_empty(0) for g, want in zip(gradients, wanted, strict=True)]

    def _backward_fake(
        self,
        douts: Tensors,
        tensors: Tensors,
        saved: list[Tensor],
        wanted: list[bool],
        num_heads: int,
        eps: float | None,
        backend: str,
        *activation: str,
    ) -> list[Tensor]:
        like = self.tokens(self.inputs(tensors, num_heads))
        return _empty_gradients(tensors, wanted, like)


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
        activation: str,
        *tensors: Tensor | None,
    ) -> Any:
        operation = OPERATIONS[name]
        results = operation.forward(tensors, num_heads, eps, keep, backend, activation)
        ctx.constants = (name, num_heads, eps, backend, activation)
        return _save(ctx, tensors, results, operation.num_outputs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        name, num_heads, eps, backend, activation = ctx.constants
        operation = OPERATIONS[name]
        wanted = list(ctx.needs_input_grad[6:])
        tensors, saved = _saved(ctx, len(wanted))
        if _needs_reference(douts):

            def reference(*tensors: Tensor | None) -> Any:
                inputs = operation.inputs(tensors, num_heads, activation)
                return operation.reference(inputs, eps, 0.0)

            gradients = _by_reference(ctx, reference, tensors, wanted, douts)
        else:
            gradients = operation.backward(
                douts, tensors, saved, wanted, num_heads, eps, backend, activation
            )
        return (None,) * 6 + tuple(gradients)


def _save(ctx: Any, inputs: Tensors, results: list[Tensor], count: int = 1) -> Any:
    """Save inputs and results for backward and return the first ``count`` results.

    Args:
        ctx: The Function's context.
        inputs: The operation's inputs, flattened.
        results: The forward operator's results: outputs, then what backward needs; if that is
            nothing, the outputs themselves are saved.
        count: Number of outputs.
    """
    outputs = [_owned(t) for t in results[:count]]
    kept = results[count:] or outputs
    ctx.save_for_backward(*inputs, *kept)
    ctx.strides = [t.stride() for t in kept]
    ctx.autocast = autocast_dtype(outputs[0])
    return outputs[0] if count == 1 else tuple(outputs)


def _owned(t: Tensor) -> Tensor:
    """Return t, but not as a view: users may write to an output in place."""
    return t if t._base is None else torch.ops.aten._unsafe_view.default(t, t.shape)


def _saved(ctx: Any, num_inputs: int) -> tuple[Tensors, list[Tensor]]:
    """Return the inputs, and what forward kept, with its original strides: a saved-tensor hook may
    have changed its layout, which kernels rely on.
    """
    tensors = ctx.saved_tensors
    kept = [
        t if t.stride() == stride else t.new_empty_strided(t.shape, stride).copy_(t)
        for t, stride in zip(tensors[num_inputs:], ctx.strides, strict=True)
    ]
    return tensors[:num_inputs], kept


def _needs_reference(douts: Tensors) -> bool:
    """Whether backward must consist of torch's operators.

    It must if it may be differentiated again (``create_graph=True``), or if the gradients are not
    plain tensors: batched ones (``is_grads_batched=True``) or wrappers.
    """
    if torch.compiler.is_compiling():  # compiled backward passes have no second derivatives
        return False
    return torch.is_grad_enabled() or why_no_kernel(douts) is not None


def _by_reference(
    ctx: Any, reference: Callable[..., Any], inputs: Tensors, wanted: Sequence[bool], douts: Tensors
) -> list[Tensor | None]:
    """Compute the gradients of a reference's inputs; differentiable if grad mode is on.

    Args:
        ctx: The Function's context.
        reference: Maps the inputs to one output or a tuple of them.
        inputs: The saved inputs.
        wanted: Whether each input's gradient is wanted.
        douts: The gradients of the outputs.
    """
    create_graph = torch.is_grad_enabled()
    device = next(t.device.type for t in inputs if t is not None)
    autocast: Any = contextlib.nullcontext()
    if ctx.autocast is not None:
        autocast = torch.autocast(device, dtype=ctx.autocast, cache_enabled=False)
    with torch.enable_grad(), autocast:
        # Aliases, as one input may have been computed from another.
        aliases = [
            t if t is None or not want else t.view_as(t) if create_graph else t.detach()
            for t, want in zip(inputs, wanted, strict=True)
        ]
        roots = [t for t, want in zip(aliases, wanted, strict=True) if t is not None and want]
        for t in roots:
            t.requires_grad_()
        outputs = reference(*aliases)
        pairs = [
            (out, dout.to(out.dtype))
            for out, dout in zip(
                outputs if isinstance(outputs, tuple) else (outputs,), douts, strict=True
            )
            if dout is not None and out.requires_grad
        ]
    outs, grads = zip(*pairs, strict=True)
    gradients = iter(
        torch.autograd.grad(outs, roots, grads, create_graph=create_graph, materialize_grads=True)
    )
    return [
        next(gradients) if t is not None and want else None
        for t, want in zip(aliases, wanted, strict=True)
    ]


def _empty_gradients(inputs: Tensors, wanted: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Allocate gradients of the inputs, without elements for those not wanted."""
    return [
        t.new_empty(t.shape) if want and t is not None else like.new_empty(0)
        for t, want in zip(inputs, wanted, strict=True)
    ]

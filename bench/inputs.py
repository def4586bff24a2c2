"""Inputs of the kernels' benchmarks, calls on them, and the expected results.

A call computes one or more outputs from a set of input tensors and the weights. Its outputs and the
gradients of the mode are timed and judged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import environment
import measure
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
#: Mode: whether inputs, and whether weights, get gradients. In "frozen" the weights are frozen; in
#: "heads" only a linear head on the output is trained.
TRAINED = {
    "forward": (False, False),
    "train": (True, True),
    "frozen": (True, False),
    "heads": (False, False),
}
#: Mode -> plain words.
MODE_WORDS = {
    "forward": "forward",
    "train": "with backward",
    "frozen": "with frozen weights",
    "heads": "with a head alone trained",
}
CLASSES = 10  # of that head

Normal = Callable[..., Tensor]
#: The tensors of a set, then the list of weights -> one or more outputs.
Call = Callable[..., Tensor | tuple[Tensor, ...]]
#: The number of an input set -> outputs and gradients.
NumberedCall = Callable[[int], Sequence[Tensor | None]]


@dataclasses.dataclass
class Inputs:
    """Sets of tensors to rotate through, weights, a head, and the upstream gradient.

    Only the tensors that the mode trains require gradients.
    """

    output_names: tuple[str, ...]
    tensor_names: tuple[str, ...]
    sets: list[tuple[Tensor, ...]]
    weights: dict[str, Tensor]
    head: Tensor
    upstream: Tensor
    mode: str

    def __post_init__(self) -> None:
        inputs_need_grad, weights_need_grad = TRAINED[self.mode]
        for tensor in (tensor for tensors in self.sets for tensor in tensors):
            tensor.requires_grad_(inputs_need_grad)
        for weight in self.weights.values():
            weight.requires_grad_(weights_need_grad)
        self.head.requires_grad_(self.mode == "heads")

    @property
    def result_names(self) -> list[str]:
        inputs_need_grad, weights_need_grad = TRAINED[self.mode]
        leaves = [
            *(self.tensor_names if inputs_need_grad else ()),
            *(self.weights if weights_need_grad else ()),
        ]
        leaves += ["head"] if self.mode == "heads" else []
        return [*self.output_names, *(f"grad {name}" for name in leaves)]

    def numbered(self, call: Call) -> NumberedCall:
        """Return a function of an input set's number, whose results are ``result_names``."""
        weights, trained = list(self.weights.values()), self.mode != "forward"
        leaves_by_set = [
            [t for t in (*tensors, *weights, self.head) if t.requires_grad] for tensors in self.sets
        ]

        def results(index: int) -> Sequence[Tensor | None]:
            number = index % len(self.sets)
            with torch.set_grad_enabled(trained):
                outputs = call(*self.sets[number], weights)
                if isinstance(outputs, Tensor):
                    outputs = (outputs,)
                if not trained:
                    return outputs
                y = outputs[0]
                if self.mode == "heads":
                    y = F.linear(y.mean(dim=1) if y.dim() == 3 else y, self.head)
                # allow_unused: k_bias has no effect, so an algorithm may ignore it.
                return *outputs, *torch.autograd.grad(
                    y, leaves_by_set[number], self.upstream, allow_unused=True
                )

        return results

    def tolerances(self, definition: Call) -> dict[str, measure.Tolerance]:
        """The float64 value of each result, and eager's error in the run's dtype."""
        exact = self._first_set_in_float64().numbered(definition)(0)
        eager = self.numbered(definition)(0)
        return measure.tolerances(self.result_names, exact, eager, self.upstream.dtype)

    def _first_set_in_float64(self) -> Inputs:
        def double(tensor: Tensor) -> Tensor:
            return tensor.detach().double()

        return dataclasses.replace(
            self,
            sets=[tuple(map(double, self.sets[0]))],
            weights={name: double(weight) for name, weight in self.weights.items()},
            head=double(self.head),
            upstream=double(self.upstream),
        )


def make_inputs(
    names: tuple[Sequence[str], Sequence[str]],
    make_set: Callable[[Normal], tuple[Tensor, ...]],
    weight_shapes: Mapping[str, tuple[int, ...]],
    output_shape: tuple[int, ...],
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    num_sets: int = 1,
) -> Inputs:
    """Random inputs, reproducible; ``names`` are those of outputs and of tensors."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return (drawn * scale + mean).to(dtype)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        # A parameter, so that CUDA graphs of compiled baselines need not copy it.
        drawn = normal(*shape, scale=scale, mean=1.0 if name.endswith("norm_weight") else 0.0)
        return torch.nn.Parameter(drawn)

    batch, width = output_shape[0], output_shape[-1]
    return Inputs(
        output_names=tuple(names[0]),
        tensor_names=tuple(names[1]),
        sets=[make_set(normal) for _ in range(num_sets)],
        weights={name: weight(name, shape) for name, shape in weight_shapes.items()},
        head=normal(CLASSES, width, scale=width**-0.5),
        upstream=normal(*((batch, CLASSES) if mode == "heads" else output_shape)),
        mode=mode,
    )


def num_rotated_sets(set_bytes: int, device: torch.device) -> int:
    """Enough sets to exceed a GPU's L2 four times, at most 2048; one on a CPU."""
    if device.type == "cpu":
        return 1
    return min(max(2, math.ceil(4 * environment.l2_bytes(device) / set_bytes)), 2048)

"""Floating-point operations of operators, for ``torch.utils.flop_counter.FlopCounterMode``.

As there, only matrix products count, two operations per multiply-add, and only those that the
kernels compute: a fusion has no keys and values (docs/derivation.md). A backward pass counts the
products needed for the wanted gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Flops(NamedTuple):
    """The formulas of an operation.

    Attributes:
        forward: Takes the inputs, with shapes in place of tensors.
        backward: Takes the same, and which gradients are wanted.
    """

    forward: Callable[[Any], int]
    backward: Callable[[Any, Any], int]


def tell_counters(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Register the operators' formulas with torch's counter, if a program has imported it.

    It is slow to import, and imports Triton. A counter copies torch's formulas when it is created,
    so active counters are updated as well.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for operator, formula in formulas.items():
        if operator not in module.flop_registry:
            module.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        if registry := getattr(getattr(mode, "counter", None), "flop_registry", None):
            registry.update({op: module.flop_registry[op] for op in formulas if op not in registry})

"""Floating-point operations of operators, for ``torch.utils.flop_counter.FlopCounterMode``.

As there, matrix products alone count, two operations a multiply-add, and it is the kernels' own
arithmetic that is counted: of a fusion, no keys and values (docs/derivation.md). Of a backward pass
those products count whose results are wanted, or lead to some that are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


class Flops(NamedTuple):
    """The formulas of an operation.

    Attributes:
        forward: Of its inputs, whose tensors are shapes.
        backward: Of such inputs, and of which gradients are wanted.
    """

    forward: Callable[[Any], int]
    backward: Callable[[Any, Any], int]


def tell_counters(formulas: Mapping[Any, Callable[..., int]]) -> None:
    """Register the formulas of operators with torch's counter, where a program has imported it.

    It is slow to import, and imports Triton. A counter copies torch's formulas when it is made, so
    those that are counting are told as well.
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

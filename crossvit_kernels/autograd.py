"""Autograd inside of operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_KEYS = torch._C.DispatchKey
_exclude: Any = torch._C._SetExcludeDispatchKeyGuard


@contextmanager
def recording() -> Iterator[None]:
    """Record gradients in the block, also where an operator runs inside of a TorchDispatchMode.

    Such a mode (FlopCounterMode, for one) runs below autograd, where grad mode alone does nothing.
    """
    with (
        torch.enable_grad(),
        _exclude(_KEYS.AutogradFunctionality, False),
        _exclude(_KEYS.ADInplaceOrView, False),
    ):
        yield

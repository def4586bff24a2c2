"""Kernel variants of a backend, as backends of their own: "triton:split"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from crossvit_kernels.gpu.tables import Variants


class Variant:
    """A backend that runs one variant of its kernels where it can; the table chooses elsewhere.

    Args:
        module: The backend.
        variants: Those of its kernels.
        name: One of them.
        limits: A module with why_not(inputs), why it runs no part of a call, or None, and
            is_proven(device), whether its kernels are known to end there.
    """

    def __init__(
        self,
        module: Any,
        variants: Variants,
        name: str,
        limits: Any = None,
    ) -> None:
        self.Saved, self.empty_saved = module.Saved, module.empty_saved
        self._module, self._variants, self._name = module, variants, name
        self._limits = limits

    def why_not(self, inputs: Any) -> str | None:
        reason: str | None = self._module.why_not(inputs)
        return reason or (self._limits.why_not(inputs) if self._limits else None)

    def is_proven(self, device: torch.device) -> bool:
        """Whether it may be tried on a device without being asked for."""
        return self._limits is None or bool(self._limits.is_proven(device))

    def forward(self, *arguments: Any) -> Any:
        with self._variants.in_this_thread(self._name):
            return self._module.forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        with self._variants.in_this_thread(self._name):
            return self._module.backward(*arguments)


def with_variants(
    backend: str,
    module: Any,
    variants: Variants,
    limits: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a backend by name, and each of its variants as ``<backend>:<variant>``.

    Args:
        backend: The backend's name.
        module: The backend.
        variants: Those of its kernels.
        limits: Variant -> its limits, see Variant.
    """
    limits = limits or {}
    named = {
        f"{backend}:{name}": Variant(module, variants, name, limits.get(name))
        for name in variants.names[1:]
    }
    return {backend: module, **named}

"""Kernel variants of a backend, as backends of their own: "triton:split"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from crossvit_kernels.gpu.tables import Variants


class Variant:
    """A backend that runs one variant of its kernels where it can; the table chooses elsewhere.

    Args:
        module: The backend.
        variants: Those of its kernels.
        name: One of them.
        limit: Returns why it runs no part of a call, or None.
    """

    def __init__(
        self,
        module: Any,
        variants: Variants,
        name: str,
        limit: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.Saved, self.empty_saved = module.Saved, module.empty_saved
        self._module, self._variants, self._name = module, variants, name
        self._limit = limit

    def why_not(self, inputs: Any) -> str | None:
        reason: str | None = self._module.why_not(inputs)
        return reason or (self._limit(inputs) if self._limit else None)

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
    limits: Mapping[str, Callable[[Any], str | None]] | None = None,
) -> dict[str, Any]:
    """Return a backend by name, and each of its variants as ``<backend>:<variant>``.

    Args:
        backend: The backend's name.
        module: The backend.
        variants: Those of its kernels.
        limits: Variant -> function that returns why it runs no part of a call, or None.
    """
    limits = limits or {}
    named = {
        f"{backend}:{name}": Variant(module, variants, name, limits.get(name))
        for name in variants.names[1:]
    }
    return {backend: module, **named}

"""Kernel variants of a backend, as backends of their own: "triton:split"."""

from __future__ import annotations

from typing import Any

from crossvit_kernels.gpu.tables import Variants


class Variant:
    """A backend that runs one variant of its kernels where it can; the table chooses elsewhere.

    Args:
        module: The backend.
        variants: Those of its kernels.
        name: One of them.
    """

    def __init__(self, module: Any, variants: Variants, name: str) -> None:
        self.Saved, self.why_not = module.Saved, module.why_not
        self.empty_saved = module.empty_saved
        self._module, self._variants, self._name = module, variants, name

    def forward(self, *arguments: Any) -> Any:
        with self._variants.in_this_thread(self._name):
            return self._module.forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        with self._variants.in_this_thread(self._name):
            return self._module.backward(*arguments)


def with_variants(backend: str, module: Any, variants: Variants) -> dict[str, Any]:
    """Return a backend by name, and each of its variants as ``<backend>:<variant>``."""
    named = {f"{backend}:{name}": Variant(module, variants, name) for name in variants.names[1:]}
    return {backend: module, **named}

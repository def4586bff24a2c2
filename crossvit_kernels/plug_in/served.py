"""The call of a served module: an object that replaces its ``forward``."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.plug_in import looking
from crossvit_kernels.plug_in import recipe as recipes
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe
from crossvit_kernels.plug_in.watch import Watched, watch, why_not_as_watched


class Served:
    """Computes a module's forward by fused functions, from the module's own parameters.

    It is stored as the module's attribute ``forward`` and refers to the module weakly. A copy of
    the module, or one that was unpickled, has a ``Served`` of its own.

    Args:
        owner: The module.
        recipe: How its class is served.
        backend: Name of a backend, or None.
        forced: Serve it even where that is no gain.
    """

    def __init__(
        self, owner: nn.Module, recipe: Recipe, backend: str | None, forced: bool = False
    ) -> None:
        self._owner = weakref.ref(owner)
        self.backend, self._forced = backend, forced
        self._set_recipe(recipe)
        self._watched: list[tuple[Watched, ...] | None] = [None] * len(recipe.parts)
        self._found: list[Any] = [None] * len(recipe.parts)  # what Part.check returned
        self._reasons: list[str | None] = [None] * len(recipe.parts)  # of the last inspection
        for i in range(len(recipe.parts)):
            self._inspect(i, not forced)

    def _set_recipe(self, recipe: Recipe) -> None:
        self._target, self._parts, self._call = recipe
        self._first = _first_name(type(self.owner).forward)

    @property
    def owner(self) -> nn.Module:
        """The module.

        Raises:
            ReferenceError: It no longer exists.
        """
        owner = self._owner()
        if owner is None:
            raise ReferenceError("the module whose call this was no longer exists")
        return owner

    def serves(self) -> list[str]:
        """Return what computes the served parts; empty if nothing is served."""
        return [p.serves for p, w in zip(self._parts, self._watched, strict=True) if w is not None]

    def reasons(self) -> dict[str, str]:
        """Return why parts are not served, by what would serve them."""
        return {
            part.serves: reason or ""
            for part, watched, reason in zip(self._parts, self._watched, self._reasons, strict=True)
            if watched is None
        }

    def reads(self) -> set[str]:
        """Return the children that are not called."""
        parts = zip(self._parts, self._watched, strict=True)
        return {name for part, watched in parts if watched is not None for name in part.reads}

    @property
    def __code__(self) -> Any:
        """The code of the class's forward, of which ``torch.export`` shows file and line."""
        return type(self.owner).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self._owner()
        if not args and self._first in kwargs:  # adapters have names of their own
            args, kwargs = (kwargs[self._first],), {**kwargs}
            del kwargs[self._first]
        if not plain_layers.is_transformed():
            x = _first_tensor(args, kwargs)
            on = [self._is_on(owner, i, part, x) for i, part in enumerate(self._parts)]
            if any(on):
                found = [f if is_on else None for f, is_on in zip(self._found, on, strict=True)]
                output = self._call(owner, found, self.backend, *args, **kwargs)
                if not isinstance(output, str):
                    return output
                if output:
                    self._report(owner, output)
        return type(owner).forward(owner, *args, **kwargs)

    def _is_on(self, owner: Any, i: int, part: Part, x: Tensor | None) -> bool:
        """Whether a part is served in a call, of which x is the first tensor."""
        watched = self._watched[i]
        if watched is None:
            return False
        asked = part.pays if not self._forced else None
        if asked is not None and (x is None or not asked(x, self._found[i])):
            return False
        reason = why_not_as_watched(owner, watched)
        if reason is not None and not torch.compiler.is_compiling():
            reason = self._inspect_again(owner, i, reason)
        if reason is None:
            reason = part.live(owner)
        if reason is not None:
            self._report(owner, reason)
        return reason is None

    def _inspect(self, i: int, only_if_fast: bool = False) -> None:
        """Inspect a part: watch its layers, or keep the reason why it is not served."""
        part, owner = self._parts[i], self.owner
        watched = watch(owner, part.reads)
        reason: str | None
        try:
            found = part.check(owner)
            reason = why_not_as_watched(owner, watched) or part.live(owner)
            if reason is None and part.sample is not None:
                with torch.no_grad():
                    looking.require_kernels(*part.sample(owner, found), self.backend)
            if reason is None and only_if_fast:
                reason = part.fast(owner)
            if reason is None:
                self._found[i] = True if found is None else found
        except Declined as declined:
            reason = str(declined)
        self._reasons[i] = reason
        self._watched[i] = watched if reason is None else None

    def _inspect_again(self, owner: nn.Module, i: int, change: str) -> str | None:
        """Inspect a part of which a layer has changed: it may be a parametrized one."""
        if self._reasons[i] == change:  # as in the last call
            return change
        before = self._watched[i]
        self._inspect(i)
        if self._watched[i] is not None:
            return None
        self._watched[i] = before  # the change may be undone
        self._reasons[i] = change
        return change

    def _report(self, owner: nn.Module, reason: str) -> None:
        plain_layers.report(owner, reason, "its own forward runs, not fused", self.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_owner": self.owner, "_recipe": self._target}
        del state["_parts"], state["_call"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        owner, target = state.pop("_owner"), state.pop("_recipe")
        self.__dict__.update(state)
        self._owner = weakref.ref(owner)
        found = recipes.RECIPES.get(target)
        if found is None:  # an adapter that this process has not registered
            found = Recipe(target, (), _unknown)
            self._watched, self._reasons, self._found = [], [], []
        self._set_recipe(found)

    def __repr__(self) -> str:
        owner = self._owner()
        return f"<{' and '.join(self.serves()) or 'nothing'} for {type(owner).__name__}.forward>"


def _first_name(forward: Any) -> str | None:
    """Return the name of a forward's first argument after self, if it may be positional."""
    try:
        _, first, *_ = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # no signature, or no such argument
        return None
    return first.name if first.kind is first.POSITIONAL_OR_KEYWORD else None


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def _unknown(*args: Any, **kwargs: Any) -> str:
    return ""

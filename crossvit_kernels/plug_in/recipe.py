"""What an adapter says about one class of modules, and the table of all adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

#: call(module, found, backend, *args, **kwargs), the last two being the module's own arguments and
#: found what ``Part.check`` returned for each part that is served, None for others. Returns what
#: the module's forward returns; or a string, then the module's own forward runs: why, or "" for an
#: input that was never meant to be served.
Call = Callable[..., Any]


class Declined(Exception):
    """Why a module, or a part of one, is not served."""


class Part(NamedTuple):
    """A part of a module that is served, or declined, independently of the others.

    Attributes:
        serves: The function that computes it, for the report.
        reads: Names of children that are not called. Their parameters are read, so they have to
            stay what they were; the module's other children are called as ever.
        check: Raises ``Declined`` if the part computes what the function does not; may be slow.
            What it returns, if not None, is passed to calls: what holds until a layer changes.
        live: Returns a reason or None from what may change without a layer being replaced: a
            number of heads, a rate, a mode. It runs in every call.
        fast: Returns why serving is no gain on the module's device, or None.
        pays: Returns whether serving is a gain for an input, the first tensor of a call, and what
            check returned. Neither is asked if a backend is named or times are measured.
        sample: Returns an operation's name and inputs like those of calls, from the module and what
            check returned; the part is declined if no backend, or not the one named, takes them.
    """

    serves: str
    reads: tuple[str, ...]
    check: Callable[[Any], Any]
    live: Callable[[Any], str | None]
    fast: Callable[[Any], str | None]
    pays: Callable[[Tensor, Any], bool] | None = None
    sample: Callable[[Any, Any], tuple[str, Any]] | None = None


class Recipe(NamedTuple):
    """How modules of one class are served.

    Attributes:
        target: The class, as ``module.qualname``.
        parts: What can be served.
        call: See ``Call``.
    """

    target: str
    parts: tuple[Part, ...]
    call: Call


#: By target. Only these classes are served, not their subclasses, which may compute anything.
RECIPES: dict[str, Recipe] = {}
#: Classes that are known and never served, with the reason.
KNOWN: dict[str, str] = {}


def name_of(kind: type[Any]) -> str:
    """Return the name under which a class is looked up."""
    return f"{kind.__module__}.{kind.__qualname__}"


def add(recipes: Iterable[Recipe]) -> None:
    """Add recipes to the table."""
    for recipe in recipes:
        RECIPES[recipe.target] = recipe


def find(kind: type[Any]) -> Recipe | None:
    """Return the recipe of a class, or None."""
    return RECIPES.get(name_of(kind))


def register_adapter(
    target: type[nn.Module] | str,
    call: Call,
    *,
    reads: Iterable[str],
    why_not: Callable[[Any], str | None] | None = None,
    serves: str = "",
) -> None:
    """Let ``accelerate`` serve a class of modules; replaces an earlier adapter of that class.

    The library that defines the class need not be imported. A served module falls back to its own
    forward when a child in ``reads``, or anything below it, was replaced or has a hook, and when
    there is active dropout below it.

    Args:
        target: The class, or its ``"module.qualname"``. Subclasses are not served.
        call: ``call(module, backend, *args, **kwargs)`` returns what the module's forward returns
            for these arguments, usually through a function of this package, with ``backend`` (a
            name or None) passed on. It returns a string to let the module's own forward run: the
            reason, which is logged once, or ``""`` to say nothing. A function at the top of a
            module: served modules are traced by ``torch.compile``.
        reads: The children whose parameters ``call`` reads instead of calling them.
        why_not: Returns why a module cannot be served, or None. It runs in every call, and should
            look at numbers rather than tensors.
        serves: What the report says; by default the name of ``call``.

    Raises:
        TypeError: target is no class of modules and no string, or call is not callable.
        ValueError: target names no module, or reads is empty.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        target = name_of(target)
    if not isinstance(target, str):
        raise TypeError(f"target: expected a class of modules or its name, found {target!r}")
    if "." not in target:
        raise ValueError(f"target: expected 'module.Class', found {target!r}")
    if not callable(call):
        raise TypeError(f"call: expected a callable, found {type(call).__name__}")
    names = (reads,) if isinstance(reads, str) else tuple(reads)
    if not names:
        raise ValueError("reads: expected names of children, found none")
    live = why_not or never

    def check(module: Any) -> None:
        if reason := live(module):
            raise Declined(reason)

    def call_one(module: Any, parts: Any, backend: str | None, *a: Any, **k: Any) -> Any:
        return call(module, backend, *a, **k)

    shown = serves or getattr(call, "__name__", "an adapter")
    add([Recipe(target, (Part(shown, names, check, live, never),), call_one)])


def never(module: Any) -> str | None:
    """Return no reason, for any module."""
    return None

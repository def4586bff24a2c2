"""``accelerate`` and ``restore``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from crossvit_kernels.backends import check_name
from crossvit_kernels.modules.plain_layers import why_not_called_plainly
from crossvit_kernels.plug_in import recipe as recipes
from crossvit_kernels.plug_in.report import Report, Row
from crossvit_kernels.plug_in.served import Served
from crossvit_kernels.plug_in.timing import keep_what_is_faster

_UNKNOWN = "no adapter knows its class"
_BLOCKS = re.compile(r"(Block|Layer)(\d\w*)?$")
_POOLS = re.compile(r"Atten(tion|tive|tional)\w*Pool")
_LIBRARIES = ("timm.", "transformers.", "open_clip.", "torchvision.", "clip.")


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = None,
    training: bool = False,
    example: Any = None,
    budget_s: float = 30.0,
) -> Report:
    """Let fused functions compute what they can of a model that is already there.

    Known blocks and pooling heads of timm, transformers, torchvision and open_clip, and those of
    registered adapters, get a ``forward`` that calls this package's functions with the module's
    own parameters. Parameters, names, state dict, hooks on the modules, modes and results stay
    what they were, up to rounding. Whatever a fused function does not compute runs the module's own
    forward: other arguments, a mask, active dropout, and layers below that were replaced, pruned,
    quantised or got hooks, which is logged once. ``restore`` undoes it.

    Transformer blocks on a CPU are served only where that is known to be faster; see ``example``.

    Args:
        model: Any module. If it was accelerated before, it is restored first.
        backend: Name of a backend for all calls, or None for the choice of each call. A call that a
            named backend cannot run raises ``ValueError``.
        training: Serve for training: what only holds in evaluation is declined, and times are those
            of forward and backward. Otherwise a module with dropout is served in evaluation, and
            runs its own forward in training.
        example: The model's arguments: a tensor, a tuple, or a dict of keyword arguments. With it,
            every served module is measured against its own forward, and what is not faster is
            left as it was. The model's buffers and the random state are unchanged.
        budget_s: Seconds for these measurements.

    Returns:
        The report; ``print`` shows a table of what is served, and why the rest is not.

    Raises:
        TypeError: model is no module, or example is none of these.
        ValueError: There is no such backend, or budget_s is not positive.

    Source: docs/accelerate.md.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if backend is not None:
        check_name(backend)
    if example is not None and not isinstance(example, (tuple, list, dict)):
        example = (example,)
    if not budget_s > 0:
        raise ValueError(f"budget_s: expected seconds above 0, found {budget_s}")
    restore(model)
    forced = backend is not None or example is not None
    fitted: dict[str, tuple[nn.Module, Served]] = {}
    rows: dict[str, Row] = {}
    with _mode(model, training):
        _fit(model, backend, forced, fitted, rows)
    for module, served in fitted.values():
        module.__dict__["forward"] = served
    if example is not None:
        keep_what_is_faster(model, example, training, budget_s, fitted, rows)
    return Report(tuple(row for row in rows.values() if not _is_only_around(row, rows)))


def restore(model: nn.Module) -> int:
    """Undo ``accelerate``: every module has its own forward again.

    Args:
        model: The model, accelerated or not.

    Returns:
        The number of modules that were served.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    count = 0
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Served):
            del module.__dict__["forward"]
            count += 1
    return count


def _fit(
    model: nn.Module,
    backend: str | None,
    forced: bool,
    fitted: dict[str, tuple[nn.Module, Served]],
    rows: dict[str, Row],
) -> None:
    """Find what can be served; nothing below a layer that is not called."""
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, path: str, is_part: bool) -> None:
        if module in seen:
            return
        seen.add(module)
        kind = type(module)
        recipe = recipes.find(kind)
        reads: set[str] = set()
        if recipe is not None and "forward" in module.__dict__:
            reason = why_not_called_plainly(module) or "it has a forward of its own"
            rows[path] = Row(path, kind.__name__, (), (reason,))
        elif recipe is not None:
            served = Served(module, recipe, backend, forced)
            serves, reasons = served.serves(), served.reasons()
            several = len(recipe.parts) > 1
            rows[path] = Row(
                path,
                kind.__name__,
                tuple(serves),
                tuple(_reasons(reasons, several)),
            )
            if serves:
                fitted[path] = module, served
                reads = served.reads()
        elif (known := recipes.KNOWN.get(recipes.name_of(kind))) is not None:
            rows[path] = Row(path, kind.__name__, (), (known,))
        elif not is_part and _is_like_a_block(module):
            rows[path] = Row(path, kind.__name__, (), (_UNKNOWN,))
        knows = path in rows
        for name, child in module.named_children():
            if name not in reads:
                visit(child, f"{path}.{name}" if path else name, knows)

    visit(model, "", False)


def _is_only_around(row: Row, rows: dict[str, Row]) -> bool:
    """Whether a row says only that a class is unknown, of which an inner module is known."""
    inside = f"{row.path}." if row.path else ""
    return row.reasons == (_UNKNOWN,) and any(
        path.startswith(inside) and path != row.path and other.reasons != (_UNKNOWN,)
        for path, other in rows.items()
    )


def _reasons(reasons: dict[str, str], several: bool) -> Iterator[str]:
    """Yield reasons, each once, with what they keep from being served."""
    if len(set(reasons.values())) == 1 and len(reasons) > 1:
        yield next(iter(reasons.values()))
        return
    for serves, reason in reasons.items():
        yield f"{serves}: {reason}" if several else reason


def _is_like_a_block(module: nn.Module) -> bool:
    """Whether a module of a known library looks like a block or like a pooling head."""
    kind = type(module)
    if not kind.__module__.startswith(_LIBRARIES):
        return False
    if _POOLS.search(kind.__name__):
        return True
    if not _BLOCKS.search(kind.__name__):
        return False
    kinds = [type(child).__name__.lower() for child in module.children()]
    return len(kinds) > 1 and any("attention" in k or "attn" in k for k in kinds)


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode of every module without calling ``train``, which some override."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

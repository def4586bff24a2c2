"""Locates a model in a checkpoint: containers, averaged weights, prefixes of wrappers."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("crossvit")

#: Keys of a training checkpoint that hold a state dict, in timm's order of search.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema")
_TRAINED = ("state_dict", "model", "model_state_dict", "net", "network", "module", "params")
#: Names of the wrapped module in torch.compile, DataParallel, DistributedDataParallel,
#: AveragedModel, activation checkpointing and FSDP, around a model or inside it.
WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_AVERAGED_PART = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
_SHOWN = 10


@dataclasses.dataclass
class Entries:
    """A model's entries of a checkpoint.

    Attributes:
        state: Entries by the model's (timm's) names; others keep their keys.
        grid_sizes: Grids of the saved model, if its state dict records them.
        notes: What was recognised, in words.
        common_prefix: Common prefix of all keys, if it was not recognised.
    """

    state: dict[str, Any]
    grid_sizes: Any
    notes: list[str]
    common_prefix: str = ""


def shortened(names: Collection[Any], shown: int = _SHOWN) -> str:
    """The first few names, and the number of the others."""
    text = ", ".join(map(str, list(names)[:shown]))
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def unwrapped_name(key: str) -> str:
    """Remove the names of wrappers anywhere in a key."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def find(
    content: Mapping[str, Any],
    names: Collection[str],
    needed: Collection[str],
    *,
    indexed_fusion: bool,
    use_ema: bool,
) -> Entries:
    """Return the entries of a model in a checkpoint.

    Args:
        content: A state dict, or a container that holds one.
        names: Keys of the model.
        needed: Keys without which a model counts as incomplete.
        indexed_fusion: Whether names include the index of a cross-attention block; with one block
            per fusion, the official release has an index and timm has none.
        use_ema: Prefer averaged weights if there are others too.

    Raises:
        ValueError: There are no tensors, or several models and no way to choose.
    """
    state, notes = _state_dict(content, use_ema)
    splitter = _Splitter(names, indexed_fusion)
    models: dict[str, dict[str, str]] = {}  # prefix -> name -> key
    for key in state:
        if (split := splitter(key)) is not None:
            prefix, name = split
            first = models.setdefault(prefix, {}).setdefault(name, key)
            if first != key and not _equal(state[first], state[key]):
                raise ValueError(f"checkpoint: {first} and {key} are both {name}, and differ")
    whole = [prefix for prefix, keys in models.items() if keys.keys() >= set(needed)]
    if not whole:
        prefix = max(models, key=lambda prefix: len(models[prefix]), default="")
    else:
        prefix = _choose(state, models, whole, use_ema, notes)
    keys = models.get(prefix, {})
    tensors = {name: state[key] for name, key in keys.items()}
    elsewhere = _add_the_rest(tensors, state, prefix, keys, whole, splitter)
    _check_values(tensors, names)
    _note_wrappers(notes, prefix, keys, elsewhere)
    metadata = getattr(state, "_metadata", {}).get(prefix[:-1], {})
    return Entries(
        tensors, metadata.get("grid_sizes"), notes, "" if keys else _common_prefix(state)
    )


def _state_dict(content: Mapping[str, Any], use_ema: bool) -> tuple[Mapping[str, Any], list[str]]:
    """The innermost state dict of a container, and notes on the choices made."""
    notes: list[str] = []
    while (inner := _contained(content, use_ema, notes)) is not None:
        content = inner
    if not any(isinstance(value, Tensor) for value in content.values()):
        contents = f"other things: {shortened(content)}" if content else "nothing"
        raise ValueError(f"checkpoint: expected tensors by name, found {contents}")
    if others := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"checkpoint: expected names as keys, found {shortened(others)}")
    return content, notes


def _contained(
    content: Mapping[str, Any], use_ema: bool, notes: list[str]
) -> Mapping[str, Any] | None:
    """The state dict in a container; None if the content already is one."""

    def holds(key: Any) -> bool:
        return isinstance(content.get(key), Mapping) and len(content[key]) > 0

    content = {**_callback_averages(content), **content}
    averaged = next(filter(holds, _AVERAGED), None)
    trained = next(filter(holds, _TRAINED), None)
    if "averaging_state" in content and holds("current_model_state"):
        # Lightning's WeightAveraging stores the average in the usual place of the weights.
        averaged, trained = "state_dict", "current_model_state"
    if averaged is not None and not use_ema and trained is None:
        raise ValueError(
            f"use_ema=False: the checkpoint has averaged weights only, in {averaged!r}"
        )
    if averaged is not None and use_ema:
        other = f"; use_ema=False takes {trained!r}" if trained else ""
        notes.append(f"averaged weights (EMA), from {averaged!r}{other}")
        return content[averaged]
    if trained is not None:
        other = f"; use_ema=True takes {averaged!r}" if averaged else ""
        notes.append(f"weights from {trained!r}{other}")
        return content[trained]
    if any(isinstance(value, Tensor) for value in content.values()):
        return None  # a state dict already
    unnamed = [
        key
        for key in content
        if holds(key) and all(isinstance(t, Tensor) for t in content[key].values())
    ]
    if len(unnamed) > 1:
        raise ValueError(
            f"checkpoint: there are state dicts in {shortened(unnamed)}: pass one of them, as in "
            f"load_checkpoint(model, torch.load(path)[{unnamed[0]!r}])"
        )
    if unnamed:
        notes.append(f"weights from {unnamed[0]!r}")
    return content[unnamed[0]] if unnamed else None


def _callback_averages(content: Mapping[str, Any]) -> dict[str, Any]:
    """Averaged weights saved by a Lightning callback: ``callbacks.EMA.ema_state_dict``."""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else ()
    return {
        key: state[key]
        for state in states
        if isinstance(state, Mapping)
        for key in _AVERAGED
        if key in state
    }


class _Splitter:
    """Splits a key into a prefix and a name of the model."""

    def __init__(self, names: Collection[str], indexed_fusion: bool) -> None:
        self.names, self.indexed_fusion = names, indexed_fusion

    def __call__(self, key: str) -> tuple[str, str] | None:
        parts = key.split(".")
        for i, part in enumerate(parts):
            name = self.name(".".join(parts[i:]))
            if part not in WRAPPERS and name in self.names:
                return "".join(f"{outer}." for outer in parts[:i]), name
        return None

    def name(self, key: str) -> str:
        """timm's name for a key of the official release or of a wrapped module."""
        key = re.sub(r"^(pos_embed|cls_token)\.([01])$", r"\1_\2", unwrapped_name(key))
        return key if self.indexed_fusion else re.sub(r"(\.fusion\.[01])\.0\.", r"\1.", key)


def _choose(
    state: Mapping[str, Any],
    models: Mapping[str, Mapping[str, str]],
    whole: list[str],
    use_ema: bool,
    notes: list[str],
) -> str:
    """Choose the prefix of the model to load from those of complete models."""
    averaged = [prefix for prefix in whole if _AVERAGED_PART.search(prefix)]
    trained = [prefix for prefix in whole if prefix not in averaged]
    if averaged and not trained and not use_ema:
        raise ValueError(
            f"use_ema=False: the checkpoint has averaged weights only, under {averaged[0]!r}"
        )
    chosen = averaged if averaged and use_ema else trained
    first = models[chosen[0]]
    for prefix in chosen[1:]:
        other = models[prefix]
        if any(
            name in other and not _equal(state[first[name]], state[other[name]]) for name in first
        ):
            raise ValueError(
                f"checkpoint: there are models under {', '.join(map(repr, chosen))}: pass the "
                "entries of one, as in load_checkpoint(model, {key: t for key, t in state.items() "
                f"if key.startswith({chosen[-1]!r})}})"
            )
    if averaged and use_ema:
        other_weights = f"; use_ema=False takes {trained[0]!r}" if trained else ""
        notes.append(f"averaged weights (EMA), under {averaged[0]!r}{other_weights}")
    elif averaged:
        notes.append(f"use_ema=True takes averaged weights (EMA), under {averaged[0]!r}")
    return chosen[0]


def _add_the_rest(
    tensors: dict[str, Any],
    state: Mapping[str, Any],
    prefix: str,
    keys: Mapping[str, str],
    whole: Iterable[str],
    splitter: _Splitter,
) -> list[str]:
    """Add entries under the prefix that are not names of the model; return all other keys."""
    wrapper = re.compile(rf"(?:(?:{'|'.join(WRAPPERS)})\.)+$")
    others = tuple(
        outer
        for other in whole
        if (outer := wrapper.sub("", other)) != prefix and outer.startswith(prefix)
    )
    taken, elsewhere = set(keys.values()), []
    for key, value in state.items():
        if key in taken:
            continue
        if not key.startswith(prefix) or (others and key.startswith(others)):
            elsewhere.append(key)
        else:
            name = splitter.name(key.removeprefix(prefix))
            if splitter(key) != (prefix, name):  # no duplicate
                tensors[key if name in tensors else name] = value
    return elsewhere


def _check_values(tensors: dict[str, Any], names: Collection[str]) -> None:
    others = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"checkpoint: expected tensors by name, found other things: {shortened(others)}"
        )
    for name in names:
        if callable(full := getattr(tensors.get(name), "full_tensor", None)):  # a DTensor
            try:
                tensors[name] = full()
            except Exception as error:
                raise ValueError(f"{name}: a DTensor that cannot be gathered: {error}") from error


def _note_wrappers(
    notes: list[str], prefix: str, keys: Mapping[str, str], elsewhere: list[str]
) -> None:
    if prefix:
        notes.append(f"keys begin with {prefix!r}")
    inner = {p for key in keys.values() for p in key.removeprefix(prefix).split(".")}
    if wrappers := [f"{name}." for name in WRAPPERS if name in inner]:
        notes.append(f"keys have {', '.join(map(repr, wrappers))} inside")
    if elsewhere:
        notes.append(f"left out, not the model's: {shortened(elsewhere)}")


def _common_prefix(keys: Iterable[str]) -> str:
    """The leading components that all keys share."""
    components = zip(*(key.split(".")[:-1] for key in keys), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, components)
    return "".join(f"{names[0]}." for names in shared)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return (
        type(a) is type(b) is Tensor
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and not a.is_meta
        and torch.equal(a, b)
    )

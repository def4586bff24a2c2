"""Short reports of how a checkpoint does not fit a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from crossvit.checkpoint_layouts import Entries
from crossvit.configs import Config, VitConfig, config_grids, list_models, named_config

_LINES = 10
AnyConfig = Config | VitConfig


def refuse_misfits(entries: Entries, expected: Mapping[str, Tensor], config: AnyConfig) -> None:
    """Check that a checkpoint has exactly the tensors of a model.

    Raises:
        ValueError: It does not. The message names at most ten keys and counts the others, and says
            which wrappers were recognised and what the reason may be.
    """
    state = entries.state
    kinds = {
        "missing": [f"missing: {key}" for key in expected if key not in state],
        "unexpected": [f"unexpected: {key}" for key in state if key not in expected],
        "of another shape": [
            f"{key}: found {list(state[key].shape)}, expected {list(t.shape)}"
            for key, t in expected.items()
            if key in state and state[key].shape != t.shape
        ],
        "of another kind": [
            f"{key}: found {kind}, expected {t.dtype}, or a type of its kind, dense"
            for key, t in expected.items()
            if key in state and (kind := _unusable(state[key], t))
        ],
        "of two values": _torn(state, expected),
    }
    lines = _few(kinds)
    if lines:
        lines += [f"recognised: {note}" for note in entries.notes]
        if entries.common_prefix:
            lines.append(f"all keys begin with: {entries.common_prefix}")
        lines += _hints(state, expected, config)
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(lines))


def _few(kinds: Mapping[str, list[str]]) -> list[str]:
    """The first problems of each kind, ten in all, and the number of the others."""
    kinds = {kind: problems for kind, problems in kinds.items() if problems}
    if sum(map(len, kinds.values())) <= _LINES:
        return [problem for problems in kinds.values() for problem in problems]
    share = _LINES // len(kinds) - 1
    lines = []
    for kind, problems in kinds.items():
        shown = share + 1 if len(problems) <= share + 1 else share
        lines += problems[:shown]
        if len(problems) > shown:
            lines.append(f"and {len(problems) - shown} more {kind}, {len(problems)} in all")
    return lines


def _unusable(t: Tensor, expected: Tensor) -> str | None:
    """Why a tensor's values cannot be copied as they are; None if they can."""
    if t.is_meta:
        return "one on meta, without data"
    if t.layout is not torch.strided or t.is_quantized:
        return f"a {'quantised' if t.is_quantized else 'sparse'} one"
    if (
        t.is_floating_point() != expected.is_floating_point()
        or t.is_complex() != expected.is_complex()
    ):
        return str(t.dtype)
    return None


def _torn(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Tied parameters of the model with different values in the checkpoint."""
    first: dict[tuple[int, torch.Size], str] = {}
    problems = []
    for key, t in expected.items():
        if type(t) is not Tensor or t.numel() == 0:
            continue
        other = first.setdefault((t.data_ptr(), t.shape), key)
        if other == key or key not in state or other not in state:
            continue
        a, b = state[other], state[key]
        if a is b or a.shape != b.shape or _unusable(a, t) or _unusable(b, t):
            continue
        if not torch.equal(a.to(b), b):
            problems.append(f"{key}: differs from {other}, to which the model ties it")
    return problems


def _hints(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: AnyConfig
) -> list[str]:
    hints = []
    heads = [key for key in expected if key.startswith("head.")]
    if heads and not any(key in state for key in heads) and _is_one(state):
        hints.append("it has no heads: replace_head=True keeps the model's own")
    if any("lora_" in key or ".base_layer." in key for key in state):
        hints.append("it has adapters (peft): merge them before saving, merge_and_unload()")
    if any(".parametrizations." in key for key in state):
        hints.append("it has parametrizations: remove them before saving")
    if any(key.endswith("_orig") for key in state):
        hints.append("it is pruned: torch.nn.utils.prune.remove() each parameter before saving")
    if name := _looks_like(state, config):
        hints.append(f"it looks like {name}")
    return hints


def _is_one(state: Mapping[str, Tensor]) -> bool:
    return {"pos_embed_0", "norm.0.weight"} <= set(state) or {"pos_embed", "norm.weight"} <= set(
        state
    )


def _looks_like(state: Mapping[str, Tensor], config: AnyConfig) -> str | None:
    """The named model with the checkpoint's sizes and fusion, if it is another one."""
    try:
        traits = _traits_of_state(state)
    except (KeyError, IndexError):
        return None
    for name in list_models():
        named = named_config(name)
        if _traits(named) == traits:
            same = type(named) is type(config) and _traits(_at(named, config)) == _traits(config)
            return None if same else name
    return None


def _at(named: AnyConfig, config: AnyConfig) -> AnyConfig:
    """A configuration with the image size of another one."""
    return dataclasses.replace(named, img_size=config.img_size)  # type: ignore[arg-type]


def _traits(config: AnyConfig) -> tuple[object, ...]:
    """What the keys and shapes of a state dict tell of a configuration."""
    patches = math.prod(config_grids(config)[0])
    if isinstance(config, VitConfig):
        return (config.dim,), (int(config.dim * config.mlp_ratio),), config.depth, patches
    hidden = tuple(int(d * r) for d, r in zip(config.dims, config.mlp_ratios, strict=True))
    fusion = "class" if config.fusion == "pairwise" else config.fusion
    depths = config.num_blocks, *config.depths, config.cross_depth
    return config.dims, hidden, depths, patches, config.embed, fusion, config.cls_token


def _traits_of_state(state: Mapping[str, Tensor]) -> tuple[object, ...]:
    def count(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.match(pattern, key))})

    if "pos_embed" in state:
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        patches, dim = state["pos_embed"].shape[1] - 1, state["pos_embed"].shape[2]
        return (dim,), (hidden,), count(r"blocks\.(\d+)\."), patches
    dims = tuple(int(state[f"pos_embed_{b}"].shape[2]) for b in (0, 1))
    hidden_units = tuple(state[f"blocks.0.blocks.{b}.0.mlp.fc1.weight"].shape[0] for b in (0, 1))
    cls_token = "cls_token_0" in state
    fusion = "none"
    if "blocks.0.fusion.attn.qkv.weight" in state:
        fusion = "all"
    elif any(key.startswith("blocks.0.fusion.") for key in state):
        fusion = "cross"
    elif any(key.startswith("blocks.0.projs.") for key in state):
        fusion = "class"
    depths = (
        count(r"blocks\.(\d+)\."),
        *(count(rf"blocks\.0\.blocks\.{b}\.(\d+)\.") for b in (0, 1)),
        count(r"blocks\.0\.fusion\.0\.(\d+)\.") or 1,
    )
    patches = state["pos_embed_0"].shape[1] - cls_token
    embed = "conv" if "patch_embed.0.proj.0.weight" in state else "patch"
    if "patch_embed.0.project.weight" in state:
        embed = "t2t"
    return dims, hidden_units, depths, patches, embed, fusion, cls_token

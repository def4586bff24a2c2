"""Checkpoints of a CrossViT: the official files', timm's and our own."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from crossvit import checkpoint_files
from crossvit.configs import Config, Size, branch_sizes
from crossvit.embed import resize_position_embedding
from crossvit.model import CrossViT

#: Where a training checkpoint keeps its state dict, in the order of search.
_NESTED = ("model", "state_dict", "model_ema", "state_dict_ema")
#: What wrappers put in front of every key: DistributedDataParallel and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_RELEASE = "https://github.com/IBM/CrossViT/releases/download/weights-0.1"
_RELEASED_240 = ("tiny", "small", "base", "9", "15", "18", "9_dagger", "15_dagger", "18_dagger")
_RELEASED_408 = ("15_dagger", "18_dagger")
_METADATA_KEY = "crossvit"

Source = str | os.PathLike[str] | Mapping[str, Tensor]
Grids = Sequence[Size]


def load_checkpoint(
    model: CrossViT, source: Source, *, replace_head: bool = False, grid_sizes: Grids | None = None
) -> CrossViT:
    """Load weights into a model.

    Position embeddings of another image size are resized, bicubic. Tensors take the dtype and
    device of the model's parameters. On an error the model is as it was.

    Args:
        model: Of the same architecture; image size and number of classes may differ.
        source: A local file (``.safetensors``, ``.pth``, ``.bin``, in the layout of the official
            release, of timm or of ``save_checkpoint``), a URL of one, a Hugging Face hub id such as
            ``timm/crossvit_15_240.in1k``, or a state dict.
        replace_head: Keep the model's own heads. A model without heads ignores the checkpoint's.
        grid_sizes: (height, width) of each branch of the checkpoint, in patches. Needed only where
            they are not square and the file is not one of ``save_checkpoint``.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or unsafe, its number of classes is another, or keys are
            missing, unexpected or of another shape: all of them are listed.
        ImportError: The source needs a package that is not installed.
    """
    content, metadata = _read(source)
    state = _timm_keys(_state_dict(content), model.config)
    own = model.state_dict()
    _fit_heads(state, own, model.num_classes, replace_head)
    _fit_position_embeddings(state, model, grid_sizes or _grids(metadata))
    _check_keys(state, own)
    model.load_state_dict(state)
    return model


def load_model(
    source: str | os.PathLike[str], *, replace_head: bool = False, **options: Any
) -> CrossViT:
    """The model of a file that ``save_checkpoint`` wrote, with its weights.

    Args:
        source: A local file, a URL or a hub id.
        replace_head: Keep new heads, as for another ``num_classes``.
        **options: Arguments of ``CrossViT`` that differ, e.g. ``use_fused=True``.

    Raises:
        ValueError: The file does not describe its model, or see ``load_checkpoint``.
    """
    path = checkpoint_files.locate(source)
    _, metadata = checkpoint_files.read(path)
    description = _description(metadata)
    if description is None:
        raise ValueError(
            f"{source}: does not describe its model; build it and use load_checkpoint(model, ...)"
        )
    config = _config(description.pop("config"))
    model = CrossViT(config, **{**description, **options})
    return load_checkpoint(model, path, replace_head=replace_head)


def save_checkpoint(model: CrossViT, path: str | os.PathLike[str]) -> None:
    """Write weights and the model's description as safetensors, the whole file or nothing.

    Raises:
        ValueError: The path does not end in ``.safetensors``.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected one that ends in .safetensors, found {path}")
    block = model.blocks[0]
    description = {
        "config": dataclasses.asdict(model.config),
        "num_classes": model.num_classes,
        "in_chans": model.in_chans,
        "qkv_bias": block.blocks[0][0].attn.qkv.bias is not None,
        "reread_patches": block.reread_patches,
    }
    tensors = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(description)}
    checkpoint_files.write_safetensors(path, tensors, metadata)


def official_url(name: str) -> str:
    """Where the paper's authors publish the ImageNet weights of a named model.

    Args:
        name: As in ``list_models``; the 11 released ones are the nine at 240 pixels and the
            15_dagger and 18_dagger at 408.

    Raises:
        ValueError: There are no weights of this model.
    """
    released = {f"crossvit_{model}_240": f"crossvit_{model}_224" for model in _RELEASED_240}
    released |= {f"crossvit_{model}_408": f"crossvit_{model}_384" for model in _RELEASED_408}
    if name not in released:
        raise ValueError(f"no weights of {name!r} were released, only of {', '.join(released)}")
    return f"{_RELEASE}/{released[name]}.pth"


def _read(source: Source) -> tuple[Mapping[str, Any], dict[str, str]]:
    if isinstance(source, Mapping):
        return source, {}
    return checkpoint_files.read(checkpoint_files.locate(source))


def _state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint, without wrappers' prefixes."""
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        found = f"other things: {', '.join(map(str, others))}" if others else "nothing"
        raise ValueError(f"checkpoint: expected tensors by name, found {found}")
    state = dict(content)
    for prefix in _WRAPPERS * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): t for key, t in state.items()}
    return state


def _timm_keys(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Keys of the official release as ours, which are timm's."""

    def rename(key: str) -> str:
        key = re.sub(r"^(pos_embed|cls_token)\.([01])$", r"\1_\2", key)
        if config.cross_depth == 1:
            key = re.sub(r"(\.fusion\.[01])\.0\.", r"\1.", key)
        return key

    return {rename(key): t for key, t in state.items()}


def _fit_heads(
    state: dict[str, Tensor], own: Mapping[str, Tensor], num_classes: int, replace_head: bool
) -> None:
    found = state.get("head.0.weight")
    if replace_head or num_classes == 0:
        for key in [key for key in state if key.startswith("head.")]:
            del state[key]
        state.update({key: t for key, t in own.items() if key.startswith("head.")})
    elif found is not None and found.dim() == 2 and len(found) != num_classes:
        raise ValueError(
            f"the checkpoint has {len(found)} classes, the model {num_classes}: build the model "
            f"with num_classes={len(found)}, or keep its own heads with replace_head=True"
        )


def _fit_position_embeddings(
    state: dict[str, Tensor], model: CrossViT, grid_sizes: Grids | None
) -> None:
    for b, new_grid in enumerate(model.grid_sizes):
        key = f"pos_embed_{b}"
        embedding = state.get(key)
        if embedding is None or embedding.dim() != 3 or embedding.shape[1] < 2:
            continue  # listed with the other keys
        patches = embedding.shape[1] - 1
        if grid_sizes is None and patches == math.prod(new_grid):
            continue
        side = math.isqrt(patches)
        old_grid = (side, side) if grid_sizes is None else tuple(grid_sizes[b])
        if math.prod(old_grid) != patches:
            raise ValueError(
                f"{key}: has {patches} patches, which are not {old_grid[0]} x {old_grid[1]}: name "
                "the checkpoint's (height, width) in patches of each branch with grid_sizes"
            )
        state[key] = resize_position_embedding(embedding, (old_grid[0], old_grid[1]), new_grid)


def _check_keys(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    problems = [f"missing: {key}" for key in own if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in own]
    problems += [
        f"{key}: found {list(state[key].shape)}, expected {list(t.shape)}"
        for key, t in own.items()
        if key in state and state[key].shape != t.shape
    ]
    if problems:
        raise ValueError("the checkpoint does not fit the model:\n  " + "\n  ".join(problems))


def _description(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    text = metadata.get(_METADATA_KEY)
    return None if text is None else json.loads(text)


def _grids(metadata: Mapping[str, str]) -> Grids | None:
    description = _description(metadata)
    if description is None:
        return None
    config = _config(description["config"])
    sizes = branch_sizes(config.img_size, config.patch_sizes)
    return [
        (height // patch, width // patch)
        for (height, width), patch in zip(sizes, config.patch_sizes, strict=True)
    ]


def _config(fields: Mapping[str, Any]) -> Config:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Config(**{name: tuples(value) for name, value in fields.items()})

"""Checkpoints of models in the official, timm's and our own layout."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from crossvit import checkpoint_files, checkpoint_layouts, checkpoint_targets
from crossvit.backbone import Backbone
from crossvit.checkpoint_layouts import Entries, logger
from crossvit.checkpoint_report import refuse_misfits
from crossvit.configs import Config, Size, VitConfig, config_grids
from crossvit.create import make_model
from crossvit.embed import resize_position_embedding
from crossvit.model import CrossViT
from crossvit.vit import VisionTransformer

_METADATA_KEY = "crossvit"
_CLASS_NAMES_KEY = "class_names"
_NORMALIZATION_KEY = "normalization"

Normalization = tuple[list[float], list[float]]  # mean and standard deviation of each channel

Source = str | os.PathLike[str] | Mapping[str, Any]
Grids = Sequence[Size]
Model = TypeVar("Model", bound=nn.Module)


def load_checkpoint(
    model: Model,
    source: Source,
    *,
    replace_head: bool = False,
    grid_sizes: Grids | None = None,
    use_ema: bool = True,
) -> Model:
    """Load weights into a model.

    Additions of wrappers and training scripts are recognised: a container such as
    ``{"state_dict": ..., "epoch": ...}``, any prefix of the model's keys (``module.``,
    ``model.``, ...), names of torch.compile, FSDP or activation checkpointing inside keys, and
    entries outside the model's prefix, such as a loss's or a metric's, which are left out. The
    logger ``crossvit`` reports at level INFO what was recognised.

    Position embeddings of another grid are resized with bicubic interpolation. The checkpoint's
    grid is, in this order: ``grid_sizes``; what ``save_checkpoint`` or ``state_dict()`` of this
    class recorded; the model's, if both branches have its number of patches; else square. If it
    could be either the model's non-square grid or a square one, the checkpoint is refused.
    Tensors take the dtype and device of the model's parameters. An error leaves the model
    unchanged.

    Args:
        model: A model of the same architecture; image size and number of classes may differ. It may
            be wrapped by torch.compile, DataParallel, DistributedDataParallel, FSDP (all ranks call
            this), AveragedModel, activation checkpointing.
        source: A local file (``.safetensors``, ``.pth``, ``.bin``, ``.ckpt``, in the layout of the
            official release, of timm or of ``save_checkpoint``), the index of a sharded one, a
            directory with ``model.safetensors`` or the like, a URL of a file, a Hugging Face hub
            id such as ``timm/crossvit_15_240.in1k``, or a state dict or container.
        replace_head: Keep the model's own heads. A model without heads ignores the checkpoint's.
        grid_sizes: (height, width) of each branch of the checkpoint, in patches.
        use_ema: If there are averaged weights and others (``model_ema`` and ``model``, or keys
            under ``ema_model.`` and ``online_model.``), load the averaged ones, as timm does.

    Returns:
        The model, as it was passed. If the file records the normalization of its images, the
        model's ``pretrained_cfg`` has it.

    Raises:
        FileNotFoundError: There is no such file, repository or entry.
        ConnectionError: The hub or the server of a URL cannot be reached, or fails.
        PermissionError: The hub or the server denies access.
        ValueError: The file is damaged or unsafe, the number of classes differs, the weights or the
            grid are ambiguous, or keys are missing, unexpected or of another shape; the message
            names at most ten of them.
        TypeError: The model is not one of this package, or the source is none of the above.
        ImportError: The source needs a package that is not installed.
    """
    core = checkpoint_targets.unwrap(model)
    content, metadata = _read(source)
    _check_architecture(metadata, core)
    expected = checkpoint_targets.tensors(model)
    entries = _entries(core, expected, content, replace_head, use_ema)
    _fit_heads(entries.state, expected, core, replace_head)
    grids = _checked_grids(grid_sizes, len(core.grid_sizes)) or _grids(metadata)
    _fit_position_embeddings(entries, core, grids)
    refuse_misfits(entries, expected, core.config)
    name = "a state dict" if isinstance(source, Mapping) else source
    recorded = _normalization(metadata, name)
    checkpoint_targets.load(model, entries.state)
    if recorded is not None:
        mean, std = map(tuple, recorded)
        core.pretrained_cfg = {**core.pretrained_cfg, "mean": mean, "std": std}
    for note in entries.notes:
        logger.info("%s: %s", name, note)
    return model


def to_our_layout(state: Mapping[str, Any], model: Backbone) -> dict[str, Any]:
    """Return released weights under the model's names, position embeddings in its size.

    Args:
        state: A state dict in the layout of the authors, of timm or of this package.
        model: Of the same architecture; image size, heads and input channels may differ.

    Raises:
        ValueError: The weights or their grid are ambiguous.
    """
    entries = _entries(model, model.state_dict(), state, True, use_ema=True)
    _fit_position_embeddings(entries, model, None)
    return entries.state


def load_model(
    source: str | os.PathLike[str],
    *,
    name: str | Config | VitConfig | None = None,
    replace_head: bool = False,
    use_ema: bool = True,
    **options: Any,
) -> CrossViT | VisionTransformer:
    """Return the model of a checkpoint, with its weights.

    Args:
        source: A local file, a URL or a hub id.
        name: The architecture, a name or a ``Config``; needed if the file was not written by
            ``save_checkpoint``. The number of classes is the checkpoint's either way.
        replace_head: Keep the new heads, e.g. for another ``num_classes``.
        use_ema: As for ``load_checkpoint``.
        **options: Arguments of the model to change, e.g. ``use_fused=True``.

    Raises:
        ValueError: The file does not describe its model and there is no ``name``.
            ``load_checkpoint`` lists the other errors.
    """
    path = checkpoint_files.locate(source)
    content, metadata = checkpoint_files.read(path)
    description = _description(metadata)
    if description is None and name is None:
        raise ValueError(
            f"{source}: does not describe its model: give its architecture, such as "
            'name="crossvit_15_240"'
        )
    options = {**(description or {}), **options}
    config = options.pop("config", None)
    model = make_model(_config(config) if name is None else name, **options)
    if "num_classes" not in options:
        model.reset_classifier(_num_classes(model, content, use_ema))
    return load_checkpoint(model, path, replace_head=replace_head, use_ema=use_ema)


def read_class_names(source: str | os.PathLike[str]) -> list[str] | None:
    """Return the names of a checkpoint's classes, if ``save_checkpoint`` wrote them.

    Args:
        source: A local file, a URL or a hub id.

    Raises:
        ValueError: They are damaged. ``load_checkpoint`` lists the other errors.
    """
    _, metadata = checkpoint_files.read(checkpoint_files.locate(source))
    if (text := metadata.get(_CLASS_NAMES_KEY)) is None:
        return None
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source}: the names of its classes are damaged")
    return names


def read_normalization(source: str | os.PathLike[str]) -> Normalization | None:
    """Return the mean and standard deviation of each channel that ``save_checkpoint`` recorded.

    Args:
        source: A local file, a URL or a hub id.

    Raises:
        ValueError: They are damaged. ``load_checkpoint`` lists the other errors.
    """
    _, metadata = checkpoint_files.read(checkpoint_files.locate(source))
    return _normalization(metadata, source)


def _normalization(metadata: Mapping[str, str], source: Any) -> Normalization | None:
    if (text := metadata.get(_NORMALIZATION_KEY)) is None:
        return None
    try:
        mean, std = ([float(value) for value in values] for values in json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"{source}: the mean and standard deviation are damaged") from None
    return mean, std


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Write weights and the model's description as safetensors, atomically.

    Args:
        model: One of this package, which may be wrapped as for ``load_checkpoint``; keys are its
            own. All ranks of a sharded model must call this; the first writes.
        path: Path of the file; must end in ``.safetensors``.
        class_names: Names of the classes, in the order of the logits.
        normalization: Mean and standard deviation of each channel that images were normalized
            with. ``python -m crossvit.evaluate`` and ``predict`` use them.

    Raises:
        ValueError: The path does not end in ``.safetensors``, the model is on ``meta``, or there
            is not one name for each class, or one mean and deviation for each channel.
        TypeError: The model is not one of this package.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected one that ends in .safetensors, found {path}")
    metadata = describe(model, class_names=class_names, normalization=normalization)
    tensors: dict[str, Tensor] = {}
    memory = set()
    for key, t in checkpoint_targets.tensors(model).items():
        t = t.detach().cpu().contiguous()
        # Tied parameters are written twice: safetensors has no references.
        start = t.untyped_storage().data_ptr()
        tensors[key] = t.clone() if start in memory else t
        memory.add(start)
    if checkpoint_targets.writes(model):
        checkpoint_files.write_safetensors(path, tensors, {"format": "pt", **metadata})


def describe(
    model: nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, str]:
    """Return what ``save_checkpoint`` records besides the weights, as texts."""
    core = checkpoint_targets.unwrap(model)
    if class_names is not None and len(class_names) != core.num_classes:
        raise ValueError(
            f"class_names: expected {core.num_classes}, one for each class, found "
            f"{len(class_names)}"
        )
    if normalization is not None and [*map(len, normalization)] != [core.in_chans] * 2:
        raise ValueError(
            f"normalization: expected {core.in_chans} means and as many deviations, one for each "
            f"channel, found {normalization}"
        )
    state = checkpoint_targets.tensors(model)
    description = {
        "config": dataclasses.asdict(core.config),
        "num_classes": core.num_classes,
        "in_chans": core.in_chans,
        "global_pool": core.global_pool,
        "dynamic_img_size": core.dynamic_img_size,
        # Of the blocks: a performer's projections in the embedding always have one.
        "qkv_bias": any(re.match(r"blocks\..*\.attn\.qkv\.bias$", key) for key in state),
    }
    metadata = {_METADATA_KEY: json.dumps(description)}
    if class_names is not None:
        metadata[_CLASS_NAMES_KEY] = json.dumps(list(class_names))
    if normalization is not None:
        metadata[_NORMALIZATION_KEY] = json.dumps([list(values) for values in normalization])
    return metadata


def _read(source: Source) -> tuple[Mapping[str, Any], dict[str, str]]:
    if isinstance(source, Mapping):
        return source, {}
    return checkpoint_files.read(checkpoint_files.locate(source))


def _entries(
    model: Backbone,
    expected: Mapping[str, Tensor],
    content: Mapping[str, Any],
    replace_head: bool,
    use_ema: bool,
) -> Entries:
    """The entries of a model in a checkpoint."""
    without_heads = replace_head or model.num_classes == 0
    return checkpoint_layouts.find(
        content,
        [*expected, *(f"{head}.{kind}" for head in model.heads for kind in ("weight", "bias"))],
        [key for key in expected if not (without_heads and key.startswith("head."))],
        indexed_fusion=getattr(model.config, "cross_depth", 1) > 1,
        use_ema=use_ema,
    )


def _num_classes(model: Backbone, content: Mapping[str, Any], use_ema: bool) -> int:
    """The number of classes of a checkpoint of this architecture; 0 if it has no heads."""
    state = _entries(model, model.state_dict(), content, True, use_ema).state
    head = state.get(f"{model.heads[0]}.weight")
    return len(head) if head is not None and head.dim() == 2 else 0


def _check_architecture(metadata: Mapping[str, str], model: Backbone) -> None:
    """Refuse what the shapes of weights do not show.

    Raises:
        ValueError: The file was saved from a model that computes something else.
    """
    description = _description(metadata) or {"config": {}}
    saved = description["config"]
    if model.num_classes:  # else the caller pools
        saved = {"global_pool": description.get("global_pool", model.global_pool), **saved}
    for name in ("fusion", "num_heads", "patch_sizes", "reread_patches", "global_pool"):
        ours = getattr(model if name == "global_pool" else model.config, name, None)
        if name in saved and ours is not None and saved[name] != ours:
            raise ValueError(f"{name}: the checkpoint's is {saved[name]!r}, the model's {ours!r}")


def _fit_heads(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], model: Backbone, replace_head: bool
) -> None:
    head, num_classes = state.get(f"{model.heads[0]}.weight"), model.num_classes
    if replace_head or num_classes == 0:
        for key in [key for key in state if key.startswith("head.")]:
            del state[key]
        state.update({key: t for key, t in expected.items() if key.startswith("head.")})
    elif head is not None and head.dim() == 2 and len(head) != num_classes:
        raise ValueError(
            f"the checkpoint has {len(head)} classes, the model {num_classes}: build the model "
            f"with num_classes={len(head)}, or keep its own heads with replace_head=True"
        )


def _fit_position_embeddings(entries: Entries, model: Backbone, grid_sizes: Grids | None) -> None:
    """Resize the position embeddings to the model's grids."""
    patches = {}
    prefix = model.num_prefix_tokens
    if prefix != any(key.startswith("cls_token") for key in entries.state):
        return  # reported with the other keys
    for b, key in enumerate(model.position_embeddings):
        t = entries.state.get(key)
        if t is not None and t.dim() == 3 and t.shape[1] > prefix and t.is_floating_point():
            patches[b] = t.shape[1] - prefix  # others are reported with the other keys
    noted = entries.grid_sizes  # may be outdated: it survives replacing the tensors
    if noted and any(math.prod(noted[b]) != count for b, count in patches.items()):
        noted = None
    grids = grid_sizes or noted or _assumed_grids(patches, model, entries.notes)
    for b, count in patches.items():
        key, (height, width) = model.position_embeddings[b], grids[b]
        new_grid = model.grid_sizes[b]
        if height * width != count:
            raise ValueError(
                f"{key}: has {count} patches, which are not {height} x {width}: name "
                "the checkpoint's (height, width) in patches of each branch with grid_sizes"
            )
        embedding = entries.state[key]
        if not embedding.is_meta:  # refused later
            entries.state[key] = resize_position_embedding(embedding, (height, width), new_grid)


def _assumed_grids(patches: Mapping[int, int], model: Backbone, notes: list[str]) -> Grids:
    """The grids of a checkpoint that records only the numbers of patches.

    Raises:
        ValueError: They fit both the model's grids and different square ones.
    """
    model_grids = model.grid_sizes
    sides = [math.isqrt(patches.get(b, 1)) for b in range(len(model_grids))]
    squares = [(side, side) for side in sides]
    fit_model = all(math.prod(model_grids[b]) == count for b, count in patches.items())
    fit_squares = all(math.prod(squares[b]) == count for b, count in patches.items())
    if not fit_model or all(model_grids[b] == squares[b] for b in patches):
        return squares
    if fit_squares:
        names = " and ".join(f"{model.position_embeddings[b]} {patches[b]}" for b in patches)
        raise ValueError(
            f"the checkpoint does not say whether its patches ({names}) are the model's grids, "
            f"{_text(model_grids)}, or square ones, {_text(squares)}: name them with "
            f"grid_sizes={list(model_grids)} for the former or grid_sizes={squares} for the latter"
        )
    notes.append(
        f"position embeddings are taken for the model's grids, {_text(model_grids)} patches"
    )
    return model_grids


def _text(grids: Grids) -> str:
    return " and ".join(f"{height} x {width}" for height, width in grids)


def _checked_grids(grid_sizes: Any, num_branches: int) -> Grids | None:
    if grid_sizes is None:
        return None
    try:
        grids = [(int(height), int(width)) for height, width in grid_sizes]
    except (TypeError, ValueError):
        grids = []
    if len(grids) != num_branches or min(map(min, grids)) < 1:
        raise ValueError(
            f"grid_sizes: expected (height, width) in patches of each branch, "
            f"{num_branches} in all, found {grid_sizes}"
        )
    return grids


def _description(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    if (text := metadata.get(_METADATA_KEY)) is None:
        return None
    try:
        description = json.loads(text)
        fields = dict(description["config"])
        if "reread_patches" in description:  # before it was one of Config
            reread = description.pop("reread_patches")
            fields["reread_patches"] = reread and fields.get("cross_depth", 1) > 1
        description["config"] = dataclasses.asdict(_config(fields))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's description of its model is damaged, or of another version: {error}"
        ) from error
    return description


def _grids(metadata: Mapping[str, str]) -> Grids | None:
    description = _description(metadata)
    if description is None:
        return None
    config = _config(description["config"])
    return config_grids(config)


def _config(fields: Mapping[str, Any]) -> Config | VitConfig:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value

    fields = {name: tuples(value) for name, value in fields.items()}
    if "conv_stem" in fields:  # before there were other embeddings
        fields["embed"] = "conv" if fields.pop("conv_stem") else "patch"
    return Config(**fields) if "dims" in fields else VitConfig(**fields)

"""Prepares a run from its options: images, model, and what trains it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import nn

from crossvit.backbone import Backbone
from crossvit.training import build
from crossvit.training.data import (
    Images,
    Loader,
    StreamedImages,
    TrainingBatches,
    evaluation_loader,
)
from crossvit.training.distributed import Processes, replicate, shard
from crossvit.training.engine import Engine
from crossvit.training.recipes import Recipe
from crossvit.training.sources import Source, find_split, open_source
from crossvit.transforms import eval_transform

#: Images per process and pass, at most, where the user names none.
_LARGEST_BATCH = {"cuda": 256, "cpu": 64}


@dataclasses.dataclass
class Setup:
    """Everything a run needs.

    Attributes:
        engine: Trains the model.
        train: Batches of the training images.
        val: Batches of the validation images, or None.
        steps: Steps of an epoch.
        identity: What a run cannot change when it is resumed, besides its recipe.
        class_names: By class number, if the images tell them.
        normalization: Mean and standard deviation of each channel.
        notes: Lines for the user.
    """

    engine: Engine
    train: Loader
    val: Loader | None
    steps: int
    identity: dict[str, Any]
    class_names: list[str] | None
    normalization: tuple[list[float], list[float]]
    notes: list[str]

    def close(self) -> None:
        """End the workers that read images."""
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()


def settle_vector_math() -> None:
    """Compute exp and log once on one thread: if several threads are the first of a process to do
    so, torch's vector library is sometimes off, and a resumed run would differ in its last bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.rand(64, 512, dtype=dtype, device="cpu", generator=generator)
        torch.logsumexp(x, dim=-1).exp_().log_()
        x.softmax(dim=-1).erf_().sqrt_()
    torch.set_num_threads(threads)


def divide_batch(recipe: Recipe, processes: Processes, batch_size: int | None) -> tuple[int, int]:
    """Return images per process and pass, and passes per step, that make the global batch.

    Raises:
        ValueError: The global batch cannot be divided like this.
    """
    share, rest = divmod(recipe.global_batch, processes.world_size)
    even = 2 if recipe.mixup or recipe.cutmix else 1
    if rest or share % even:
        pairs = " in pairs, which mixup and cutmix mix" if even == 2 else ""
        raise ValueError(
            f"global_batch: {recipe.global_batch} images are not divisible among "
            f"{processes.world_size} processes{pairs}"
        )
    if batch_size is None:
        largest = min(share, _LARGEST_BATCH[processes.device.type])
        batch_size = next(n for n in range(largest, 0, -1) if share % n == 0 and n % even == 0)
    if share % batch_size or batch_size % even:
        kind = "an even divisor" if even == 2 else "a divisor"
        raise ValueError(
            f"batch_size: expected {kind} of {share}, each process's share of the global batch "
            f"{recipe.global_batch}, found {batch_size}"
        )
    return batch_size, share // batch_size


def open_sources(
    options: argparse.Namespace, processes: Processes, batch_size: int
) -> tuple[Source, Source | None]:
    """Open the training images, and those of the validation unless its split is ''."""
    common = {"root": options.data_root, "in_chans": options.in_chans, "batch_size": batch_size}
    common |= {"seed": options.seed}

    def open_both(download: bool) -> tuple[Source, Source | None]:
        train = open_source(
            options.data,
            options.train_split,
            download=download,
            training=True,
            num_samples=options.train_samples,
            **common,
        )
        if not options.val_split:
            return train, None
        val = open_source(
            options.data,
            options.val_split,
            download=download,
            num_samples=options.val_samples,
            class_to_index=train.class_to_index,
            **common,
        )
        return train, val

    _require_validation(options)
    if options.download:
        if processes.first:  # the others would write the same files
            open_both(True)
        processes.wait()
    return open_both(False)


def _require_validation(options: argparse.Namespace) -> None:
    """Refuse to validate on the training images: a folder without splits has no others."""
    from pathlib import Path

    folder = Path(options.data)
    if options.val_split and folder.is_dir() and find_split(folder, options.val_split) is None:
        raise ValueError(
            f"data: {folder} has no folder {options.val_split!r} (or val, test) to validate on; "
            "--val-split '' trains without validation"
        )


def count_classes(options: argparse.Namespace, train: Source) -> int:
    """Return the number of classes.

    Raises:
        ValueError: It is unknown, or less than two, or less than the images have.
    """
    found = train.num_classes
    if options.num_classes is None and found is None:
        raise ValueError(f"data: {options.data} does not tell its classes; name --num-classes")
    num_classes = options.num_classes or found or 0
    if found is not None and num_classes < found:
        raise ValueError(f"num_classes: {options.data} has {found} classes, found {num_classes}")
    if num_classes < 2:
        raise ValueError(f"data: {options.data} has {num_classes} class; expected at least 2")
    return num_classes


def prepare(options: argparse.Namespace, recipe: Recipe, processes: Processes) -> Setup:
    """Open the images and make the model, its optimizer, and the loaders.

    Raises:
        ValueError, TypeError, OSError, ImportError: Something does not fit; the message says what.
    """
    build.require_timm()
    if processes.device.type == "cpu":
        settle_vector_math()
    batch_size, accumulation = divide_batch(recipe, processes, options.batch_size)
    train, val = open_sources(options, processes, batch_size)
    num_classes = count_classes(options, train)
    changes = dict(options.model_args)
    if options.img_size is not None:
        changes["img_size"] = options.img_size
    model = build.make_model(
        options.model,
        recipe,
        num_classes=num_classes,
        in_chans=options.in_chans,
        seed=options.seed,
        changes=changes,
        checkpoint=options.checkpoint,
        replace_head=options.replace_head,
    )
    identity = {
        "model": options.model,
        "model_args": {name: repr(value) for name, value in changes.items()},
        "num_classes": num_classes,
        "in_chans": options.in_chans,
        "checkpoint": options.checkpoint,
        "freeze": options.freeze,
        "seed": options.seed,
        "training_images": len(train),
        "classes": train.class_names or [],
    }
    frozen = build.freeze(model, options.freeze)
    size = _image_size(model)
    loader, steps = _training_loader(
        options, recipe, processes, train, model, size, (batch_size, accumulation)
    )
    engine = _engine(options, recipe, processes, model, steps, accumulation)
    notes = [
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
        + (f", {frozen} tensors frozen" if frozen else ""),
        f"{len(train):,} training images, {len(val) if val else 0:,} to validate, "
        f"{num_classes} classes",
        f"{processes.world_size} process(es) x {batch_size} images x {accumulation} pass(es) = "
        f"{recipe.global_batch} images per step, {steps} steps per epoch on "
        f"{processes.device.type}, peak lr {recipe.peak_lr:g}",
    ]
    val_loader = _validation_loader(options, recipe, processes, val, size, batch_size)
    names = train.class_names if train.num_classes == num_classes else None
    mean, std = (t.tolist() for t in build.channel_statistics(recipe, options.in_chans))
    return Setup(engine, loader, val_loader, steps, identity, names, (mean, std), notes)


def _image_size(model: Backbone) -> tuple[int, int]:
    """(height, width) of the images that a model takes, in pixels: the S branch's."""
    first: Any = model.patch_embed
    if isinstance(first, nn.ModuleList):
        first = first[0]
    return first.img_size


def _training_loader(
    options: argparse.Namespace,
    recipe: Recipe,
    processes: Processes,
    source: Source,
    model: Backbone,
    size: tuple[int, int],
    batch: tuple[int, int],
) -> tuple[Loader, int]:
    """The loader, and the steps of an epoch."""
    batch_size, accumulation = batch
    transform = build.training_transform(recipe, size)
    common: dict[str, Any] = {
        "workers": options.workers,
        "skip_bad": options.skip_bad,
        "pin_memory": processes.device.type == "cuda",
    }
    if source.streams:
        stream = StreamedImages(source, transform, options.seed)
        loader = Loader(stream, None, batch_size=batch_size, **common)
        steps = len(source) // (batch_size * accumulation)  # of this process's images
    else:
        batches = TrainingBatches(
            len(source),
            batch_size,
            accumulation,
            seed=options.seed,
            rank=processes.rank,
            world_size=processes.world_size,
            repeats=build.repeats(recipe, model),
        )
        images = Images(source, transform, options.seed, replace=options.skip_bad)
        loader, steps = Loader(images, batches, **common), batches.steps
    if steps < 1:
        raise ValueError(
            f"global_batch: a step takes {recipe.global_batch} images, and there are "
            f"{len(source)}; choose a smaller --global-batch"
        )
    return loader, steps


def _validation_loader(
    options: argparse.Namespace,
    recipe: Recipe,
    processes: Processes,
    source: Source | None,
    size: tuple[int, int],
    batch_size: int,
) -> Loader | None:
    if source is None:
        return None
    mean, std = build.channel_statistics(recipe, options.in_chans)
    side = size[0] if size[0] == size[1] else size
    transform = eval_transform(side, recipe.crop_pct, mean.tolist(), std.tolist())
    return evaluation_loader(
        source,
        transform,
        batch_size,
        workers=options.workers,
        rank=processes.rank,
        world_size=processes.world_size,
        skip_bad=options.skip_bad,
        pin_memory=processes.device.type == "cuda",
    )


def _engine(
    options: argparse.Namespace,
    recipe: Recipe,
    processes: Processes,
    model: Backbone,
    steps: int,
    accumulation: int,
) -> Engine:
    device = processes.device
    model.set_fused(not options.eager, options.backend, options.keep)
    model.set_grad_checkpointing(options.grad_checkpointing)
    model.to(device)
    if options.channels_last and not options.fsdp:  # which shards contiguous parameters only
        model.to(memory_format=torch.channels_last)
    model.train()
    ema = build.make_ema(model, recipe, foreach=not options.fsdp)
    if options.fsdp:
        shard(model, processes)
        if ema is not None:
            shard(ema.module, processes)
    new_head = options.checkpoint is not None and options.replace_head
    optimizer = build.make_optimizer(model, recipe, new_head)
    if options.compile:
        model.compile()
    parallel: nn.Module = model if options.fsdp else replicate(model, processes)
    amp = options.amp == "bf16" or (options.amp == "auto" and device.type == "cuda")
    return Engine(
        model=model,
        parallel=parallel,
        optimizer=optimizer,
        schedule=build.Schedule(optimizer, recipe, steps),
        ema=ema,
        augmentation=build.Augmentation(
            recipe, model.num_classes, model.in_chans, options.seed, device
        ),
        recipe=recipe,
        processes=processes,
        autocast=torch.bfloat16 if amp else None,
        accumulation=accumulation,
        seed=options.seed,
        channels_last=options.channels_last,
    )

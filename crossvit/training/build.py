"""What a recipe asks for, made with timm: the model, its optimizer, schedule, averages, images."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crossvit import create
from crossvit.backbone import Backbone
from crossvit.checkpoints import load_checkpoint
from crossvit.configs import Config
from crossvit.pretrained import released_weights
from crossvit.training.randomness import derive, seed_all
from crossvit.training.recipes import Recipe
from crossvit.training.sources import INSTALL


def require_timm() -> None:
    """Raise ImportError, saying what to install, if timm or torchvision is missing."""
    try:
        import timm  # noqa: F401
        import torchvision  # noqa: F401
    except ImportError as error:
        raise ImportError(f"training needs timm and torchvision: {INSTALL}") from error


def make_model(
    name: str,
    recipe: Recipe,
    *,
    num_classes: int,
    in_chans: int,
    seed: int,
    changes: dict[str, Any],
    checkpoint: str | None = None,
    replace_head: bool = False,
) -> Backbone:
    """Make a model on the CPU, initialised from the seed or from a checkpoint.

    Args:
        name: As in ``list_models``.
        recipe: Gives drop path and dropout.
        num_classes: Of both heads.
        in_chans: Channels of the images.
        seed: Of the run.
        changes: Further arguments of the model's class, such as ``img_size``.
        checkpoint: Anything that ``load_checkpoint`` takes, ``official`` or ``timm``.
        replace_head: Keep new heads, for other classes than the checkpoint's.

    Raises:
        ValueError: The name is unknown, or the checkpoint is of another model or class count.
        TypeError: There is no such argument.
    """
    seed_all(seed)
    model = create.make_model(
        name,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=recipe.drop_path,
        drop_rate=recipe.drop,
        **changes,
    )
    if checkpoint is not None:
        released = checkpoint in ("official", "timm")
        source = released_weights(name, checkpoint) if released else checkpoint
        try:
            load_checkpoint(model, source, replace_head=replace_head)
        except ValueError as error:
            text = str(error).replace("replace_head=True", "--replace-head")
            raise ValueError(f"checkpoint {checkpoint}: {text}") from error
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Exclude parameters from training.

    Args:
        model: The model.
        patterns: Shell-style patterns of parameter names, e.g. ``blocks.0.*``.

    Returns:
        How many parameters (tensors) are frozen.

    Raises:
        ValueError: A pattern matches none, or nothing is left to train.
    """
    for pattern in patterns:
        matched = [p for n, p in model.named_parameters() if fnmatch.fnmatchcase(n, pattern)]
        if not matched:
            raise ValueError(f"freeze: no parameter is called {pattern!r}")
        for p in matched:
            p.requires_grad_(False)
    frozen = [not p.requires_grad for p in model.parameters()]
    if all(frozen):
        raise ValueError(f"freeze: {' '.join(patterns)} leaves nothing to train")
    return sum(frozen)


def make_optimizer(model: Backbone, recipe: Recipe, new_head: bool) -> torch.optim.Optimizer:
    """Make timm's optimizer, without decay of biases, norms, position embeddings and CLS tokens.

    Raises:
        ValueError: timm has no such optimizer, or it does not take the recipe's arguments.
    """
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    heads = {id(p) for p in model.head.parameters()}
    groups = []
    for group in param_groups_weight_decay(
        model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()
    ):
        for in_head in (False, True):
            params = [p for p in group["params"] if (id(p) in heads) == in_head]
            scale = recipe.new_head_lr_scale if in_head and new_head else 1.0
            if params:
                groups.append({**group, "params": params, "lr_scale": scale})
    options: dict[str, Any] = {"lr": recipe.peak_lr, "weight_decay": recipe.weight_decay}
    if "sgd" in recipe.opt or "momentum" in recipe.opt:
        options["momentum"] = recipe.momentum
    else:
        options["eps"] = recipe.opt_eps
    try:
        return create_optimizer_v2(groups, opt=recipe.opt, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"opt: {recipe.opt}: {error}") from error


class Schedule:
    """The learning rate as a function of the step; it has no state to save.

    Args:
        optimizer: Whose learning rates are set.
        recipe: Gives the schedule.
        steps: Steps of an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> None:
        from timm.scheduler import CosineLRScheduler

        self.per_step = recipe.schedule_per == "step"
        self.steps = steps
        unit = steps if self.per_step else 1
        constant = recipe.schedule == "constant"
        warmup = min(recipe.warmup_epochs, recipe.epochs - 1) * unit
        self._scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(recipe.epochs * unit, 2),
            lr_min=recipe.peak_lr if constant else recipe.min_lr,
            warmup_t=warmup,
            warmup_lr_init=recipe.warmup_lr if warmup else 0.0,
            t_in_epochs=not self.per_step,
        )

    def set(self, step: int) -> None:
        """Set the learning rates of a step."""
        if self.per_step:
            self._scheduler.step_update(step)
        else:
            self._scheduler.step(step // self.steps)


def make_ema(model: nn.Module, recipe: Recipe, foreach: bool) -> Any:
    """Make timm's average of the weights; None if the recipe has none."""
    if not recipe.ema_decay:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup, foreach=foreach)


def repeats(recipe: Recipe, model: Backbone) -> int:
    """Draws of an image per epoch: the paper repeats images for CrossViT-18 only."""
    if recipe.repeats:
        return recipe.repeats
    config = model.config
    return 3 if isinstance(config, Config) and config.dims == (224, 448) else 1


def channel_statistics(recipe: Recipe, in_chans: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel; the average of the recipe's for grey images.

    Raises:
        ValueError: The recipe has neither as many as there are channels nor three.
    """
    found = []
    for name in ("mean", "std"):
        values = torch.tensor(getattr(recipe, name), dtype=torch.float32, device="cpu")
        if len(values) != in_chans and in_chans == 1:
            values = values.mean().reshape(1)
        if len(values) != in_chans:
            raise ValueError(f"{name}: expected {in_chans} numbers, found {len(values)}")
        found.append(values)
    return found[0], found[1]


def training_transform(recipe: Recipe, size: tuple[int, int]) -> Callable[[Any], Tensor]:
    """Make timm's augmentation, from a PIL image to uint8 [C, height, width].

    Raises:
        ValueError: timm has no such policy of augmentation.
    """
    from timm.data.transforms_factory import create_transform

    options: dict[str, Any] = {
        "scale": recipe.scale,
        "ratio": recipe.ratio,
        "hflip": recipe.hflip,
        "color_jitter": recipe.color_jitter or None,
        "auto_augment": recipe.auto_augment or None,
        "interpolation": recipe.interpolation,
    }
    try:
        transform = create_transform((3, *size), is_training=True, normalize=False, **options)
    except (AssertionError, KeyError, ValueError) as error:  # timm asserts that it knows a policy
        raise ValueError(f"auto_augment: {recipe.auto_augment!r}: {error}") from error
    for step in transform.transforms:
        for op in _augmentations(step):
            if op.name.startswith("Posterize"):
                op.level_fn = functools.partial(_at_least_one_bit, op.level_fn)
    return transform


def _augmentations(step: Any) -> Iterator[Any]:
    """The operations of timm's RandAugment, AutoAugment or AugMix."""
    yield from getattr(step, "ops", ())
    for policy in getattr(step, "policy", ()):
        yield from policy


def _at_least_one_bit(level_fn: Callable[..., Any], level: float, hparams: Any) -> tuple[int]:
    """Bits of a colour to keep; timm draws 0 for one image in 700, which new Pillow refuses."""
    return (max(1, level_fn(level, hparams)[0]),)


class Augmentation:
    """What is done to a batch on its device: normalise, erase parts of images, mix images.

    Args:
        recipe: Gives the probabilities.
        num_classes: Of the targets.
        in_chans: Channels of the images.
        seed: Of the run.
        device: Of the batches.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, in_chans: int, seed: int, device: torch.device
    ) -> None:
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        mean, std = channel_statistics(recipe, in_chans)
        self.mean = (mean * 255).view(1, -1, 1, 1).to(device)
        self.std = (std * 255).view(1, -1, 1, 1).to(device)
        self.seed, self.device = seed, device
        self.erase = None
        if recipe.reprob:
            self.erase = RandomErasing(
                recipe.reprob,
                mode=recipe.remode,
                max_count=recipe.recount,
                device=str(device),
            )
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                mode=recipe.mixup_mode,
                label_smoothing=recipe.smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, images: Tensor, targets: Tensor, positions: Iterable[int], key: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Prepare a batch.

        Args:
            images: uint8 [B, C, H, W].
            targets: int64 [B].
            positions: In the epoch, of each image: what is erased depends on it alone.
            key: (epoch, step, ...): how the batch is mixed depends on it.

        Returns:
            Images float32 [B, C, H, W], and targets int64 [B], or [B, num_classes] if mixed.
        """
        x = images.float().sub_(self.mean).div_(self.std)
        if self.erase is not None:
            for image, position in zip(x, positions, strict=True):
                seed_all(self.seed, key[0], position, 1)
                self.erase(image)
        if self.mix is not None:
            seed_all(derive(self.seed, *key))
            x, targets = self.mix(x, targets)
        return x, targets

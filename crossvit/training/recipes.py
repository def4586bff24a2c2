"""Training recipes: every number that decides what a run learns, with the paper's values.

A recipe is printed when a run starts and stored with it; each field is an option of
``python -m crossvit.train``. What neither the paper nor its released code says is in ``OURS``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import Any


def _says(text: str) -> dict[str, str]:
    return {"help": text}


_CHOICES = {
    "schedule": ("cosine", "constant"),
    "schedule_per": ("epoch", "step"),
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
    "interpolation": ("bicubic", "bilinear", "random"),
}


def _require(recipe: Recipe, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {getattr(recipe, name)!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run; the defaults are the paper's for ImageNet (section 4.1)."""

    name: str = "imagenet"

    # Optimizer
    global_batch: int = field(default=4096, metadata=_says("images per step, of all processes"))
    opt: str = field(default="adamw", metadata=_says("any name of timm's optimizers"))
    lr: float = field(default=5e-4, metadata=_says("learning rate at a batch of lr_batch"))
    lr_batch: int = field(
        default=512, metadata=_says("lr is scaled by global_batch / lr_batch; 0: it is not")
    )
    opt_eps: float = field(default=1e-8, metadata=_says("epsilon of adaptive optimizers"))
    momentum: float = field(default=0.9, metadata=_says("of SGD"))
    weight_decay: float = field(
        default=0.05, metadata=_says("not of biases, norms, position embeddings and CLS tokens")
    )
    clip_grad: float = field(default=0.0, metadata=_says("largest norm of the gradient; 0: any"))
    new_head_lr_scale: float = field(
        default=1.0, metadata=_says("factor of the learning rate of heads that were replaced")
    )

    # Schedule
    epochs: int = field(default=300, metadata=_says("passes over the training images"))
    schedule: str = field(default="cosine", metadata=_says("cosine or constant, after warm-up"))
    schedule_per: str = field(
        default="epoch", metadata=_says("whether lr changes each epoch, as released, or each step")
    )
    warmup_epochs: int = field(default=30, metadata=_says("of linearly rising learning rate"))
    warmup_lr: float = field(default=1e-6, metadata=_says("learning rate at the start"))
    min_lr: float = field(default=1e-5, metadata=_says("learning rate at the end"))

    # Regularisation
    drop_path: float = field(default=0.1, metadata=_says("stochastic depth of the last block"))
    drop: float = field(default=0.0, metadata=_says("dropout before the heads"))
    smoothing: float = field(default=0.1, metadata=_says("label smoothing"))
    mixup: float = field(default=0.8, metadata=_says("alpha of mixup; 0: none"))
    cutmix: float = field(default=1.0, metadata=_says("alpha of cutmix; 0: none"))
    mixup_prob: float = field(default=1.0, metadata=_says("share of batches that are mixed"))
    mixup_switch_prob: float = field(default=0.5, metadata=_says("share of cutmix among these"))
    mixup_mode: str = field(default="batch", metadata=_says("mix per batch, pair or elem"))
    ema_decay: float = field(default=0.0, metadata=_says("of averaged weights, 0: none"))
    ema_warmup: bool = field(default=False, metadata=_says("let the decay rise from 0"))

    # Images
    repeats: int = field(
        default=0,
        metadata=_says("draws of an image per epoch (repeated augmentation); 0: 3 for CrossViT-18"),
    )
    scale: tuple[float, float] = field(
        default=(0.08, 1.0), metadata=_says("share of an image that a crop keeps, from and to")
    )
    ratio: tuple[float, float] = field(
        default=(3 / 4, 4 / 3), metadata=_says("aspect ratio of a crop, from and to")
    )
    hflip: float = field(default=0.5, metadata=_says("share of images flipped left to right"))
    color_jitter: float = field(
        default=0.4, metadata=_says("of brightness, contrast, saturation; not with auto_augment")
    )
    auto_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata=_says("timm's RandAugment policy; '' for none")
    )
    interpolation: str = field(default="bicubic", metadata=_says("of crops"))
    reprob: float = field(default=0.25, metadata=_says("share of images with a part erased"))
    remode: str = field(default="pixel", metadata=_says("erase with const, rand or pixel"))
    recount: int = field(default=1, metadata=_says("erased parts per image, at most"))
    crop_pct: float = field(default=0.875, metadata=_says("share kept in evaluation"))
    mean: tuple[float, ...] = field(
        default=(0.485, 0.456, 0.406), metadata=_says("of each channel, from 0 to 1")
    )
    std: tuple[float, ...] = field(
        default=(0.229, 0.224, 0.225), metadata=_says("of each channel, from 0 to 1")
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field is out of its range; the message names it.
        """
        for name in ("global_batch", "epochs", "recount"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "opt_eps"):
            _require(self, name, 0 < getattr(self, name) < float("inf"), "a positive number")
        for name in ("lr_batch", "weight_decay", "clip_grad", "warmup_epochs", "warmup_lr"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("min_lr", "mixup", "cutmix", "repeats", "new_head_lr_scale", "color_jitter"):
            _require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("drop_path", "drop", "smoothing", "momentum", "ema_decay"):
            _require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        for name in ("mixup_prob", "mixup_switch_prob", "hflip", "reprob"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name, names in _CHOICES.items():
            _require(self, name, getattr(self, name) in names, f"one of {', '.join(names)}")
        _require(
            self,
            "warmup_epochs",
            self.warmup_epochs < self.epochs or self.epochs == 1,
            f"fewer than the {self.epochs} epochs",
        )
        _require(self, "crop_pct", 0 < self.crop_pct <= 1, "more than 0 and at most 1")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            _require(self, name, 0 < low <= high, "two rising positive numbers")
        _require(self, "std", all(value > 0 for value in self.std), "positive numbers")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr * self.global_batch / self.lr_batch if self.lr_batch else self.lr

    def lines(self) -> list[str]:
        """One ``name = value`` per field, saying what is ours and not the paper's."""
        ours = OURS.get(self.name, ())
        pairs = dataclasses.asdict(self).items()
        return [f"{k} = {json.dumps(v)}{'  # ours' if k in ours else ''}" for k, v in pairs]


IMAGENET = Recipe()

#: Another image size, as DeiT is fine-tuned (lr, weight decay, batch), for the paper's 30 epochs;
#: other classes, whose new heads learn faster.
FINETUNE = dataclasses.replace(
    IMAGENET,
    name="finetune",
    epochs=30,
    warmup_epochs=5,
    global_batch=512,
    lr=5e-6,
    min_lr=5e-6,
    weight_decay=1e-8,
    new_head_lr_scale=10.0,
)

#: Table 5: SGD, one learning rate for all layers, the augmentation of ImageNet.
TRANSFER = dataclasses.replace(
    IMAGENET,
    name="transfer",
    epochs=1000,
    warmup_epochs=5,
    global_batch=768,
    opt="sgd",
    lr=0.01,
    lr_batch=0,
    weight_decay=1e-4,
)

RECIPES = {recipe.name: recipe for recipe in (IMAGENET, FINETUNE, TRANSFER)}

#: Fields that neither the paper nor its released code sets for this recipe.
OURS = {
    "finetune": (
        *("global_batch", "lr", "lr_batch", "min_lr", "warmup_epochs", "warmup_lr"),
        *("weight_decay", "new_head_lr_scale", "repeats"),
    ),
    "transfer": (
        *("momentum", "schedule", "schedule_per", "warmup_epochs", "warmup_lr", "min_lr"),
        "repeats",
    ),
}


def find_recipe(name: str) -> Recipe:
    """Return a named recipe, or the one stored in a run's ``run.json``.

    Raises:
        ValueError: There is no such recipe or file, or it has unknown fields.
    """
    if name in RECIPES:
        return RECIPES[name]
    try:
        fields = json.loads(Path(name).read_text(encoding="utf-8"))
        return from_fields(fields.get("recipe", fields))
    except OSError:
        raise ValueError(
            f"recipe: expected {', '.join(RECIPES)} or a run's run.json, found {name!r}"
        ) from None
    except (AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"recipe: {name}: {error}") from error


def from_fields(fields: dict[str, Any]) -> Recipe:
    """Make a recipe of JSON fields."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Recipe(**values)

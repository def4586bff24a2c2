"""The recipes' numbers, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from crossvit import CrossViT, list_models
from crossvit.training import build
from crossvit.training.options import parse
from crossvit.training.recipes import FINETUNE, IMAGENET, OURS, RECIPES, TRANSFER, Recipe
from crossvit.training.setup import divide_batch

pytestmark = pytest.mark.usefixtures("trainer")


def tiny(**options: object) -> CrossViT:
    return CrossViT(
        "crossvit_tiny", dims=(8, 16), num_heads=(2, 2), depths=(1, 1), num_blocks=1, **options
    )


def test_imagenet() -> None:
    """Section 4.1, and the defaults of the released code."""
    expected = {
        "global_batch": 4096,
        "epochs": 300,
        "warmup_epochs": 30,
        "opt": "adamw",
        "opt_eps": 1e-8,
        "weight_decay": 0.05,
        "warmup_lr": 1e-6,
        "min_lr": 1e-5,
        "drop_path": 0.1,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "color_jitter": 0.4,
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mixup_switch_prob": 0.5,
        "smoothing": 0.1,
        "interpolation": "bicubic",
        "schedule": "cosine",
        "clip_grad": 0.0,
        "ema_decay": 0.0,
    }
    fields = dataclasses.asdict(IMAGENET)
    assert {name: fields[name] for name in expected} == expected
    assert IMAGENET.peak_lr == pytest.approx(0.004)
    assert dataclasses.replace(IMAGENET, global_batch=512).peak_lr == pytest.approx(5e-4)


def test_other_recipes_mark_what_is_ours() -> None:
    assert (FINETUNE.epochs, FINETUNE.opt) == (30, "adamw")
    paper = ("sgd", 0.01, 1e-4, 768, 1000)
    fields = ("opt", "lr", "weight_decay", "global_batch", "epochs")
    assert tuple(getattr(TRANSFER, name) for name in fields) == paper
    assert TRANSFER.peak_lr == 0.01
    for recipe in RECIPES.values():
        changed = {
            f.name
            for f in dataclasses.fields(Recipe)
            if getattr(recipe, f.name) != getattr(IMAGENET, f.name)
        }
        ours = set(OURS.get(recipe.name, ()))
        stated = {"name", "epochs"} if recipe is FINETUNE else {"name", "lr_batch", *fields}
        assert changed - stated <= ours
        marked = {line.split()[0] for line in recipe.lines() if line.endswith("# ours")}
        assert marked == ours
    assert "momentum" in OURS["transfer"] and "lr" in OURS["finetune"]


def test_only_18_repeats_images() -> None:
    for name in list_models("*_240"):
        with torch.device("meta"):
            model = CrossViT(name)
        assert build.repeats(IMAGENET, model) == (3 if "_18_" in name else 1), name
    assert build.repeats(dataclasses.replace(IMAGENET, repeats=2), tiny()) == 2


def test_weight_decay_spares_biases_norms_positions_and_cls() -> None:
    model = tiny(embed="conv")
    optimizer = build.make_optimizer(model, IMAGENET, new_head=False)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {
        names[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
    }
    spared = {f"{kind}_{b}" for kind in ("pos_embed", "cls_token") for b in (0, 1)} | norms
    weights = {name for name in names.values() if not name.endswith(".bias")} - spared
    assert decayed == weights and len(norms) == 12
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW) and group["eps"] == 1e-8


def test_new_heads_learn_faster() -> None:
    model = tiny(num_classes=5)
    optimizer = build.make_optimizer(model, FINETUNE, new_head=True)
    build.Schedule(optimizer, FINETUNE, steps=7).set(5 * 7)
    heads = {id(p) for p in model.head.parameters()}
    for group in optimizer.param_groups:
        scale = 10 if id(group["params"][0]) in heads else 1
        assert group["lr"] == pytest.approx(5e-6 * scale)
        assert {id(p) in heads for p in group["params"]} == {scale == 10}


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_schedule(per: str) -> None:
    """Linear warm-up from 1e-6, then a cosine to 1e-5, as a function of the step alone."""
    recipe = dataclasses.replace(IMAGENET, schedule_per=per)
    optimizer = build.make_optimizer(tiny(), recipe, new_head=False)
    schedule = build.Schedule(optimizer, recipe, steps=10)
    for step in (2999, 0, 5, 150, 299, 300, 1234):
        schedule.set(step)
        epoch = step / 10 if per == "step" else step // 10
        expected = 1e-6 + (0.004 - 1e-6) * epoch / 30
        if epoch >= 30:
            expected = 1e-5 + (0.004 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), step


def test_constant_schedule() -> None:
    recipe = dataclasses.replace(IMAGENET, schedule="constant", epochs=5, warmup_epochs=2)
    optimizer = build.make_optimizer(tiny(), recipe, new_head=False)
    schedule = build.Schedule(optimizer, recipe, steps=3)
    rates = []
    for step in range(15):
        schedule.set(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 1e-6 and rates[6:] == pytest.approx([0.004] * 9)


def test_every_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = ["--data", "x"], {}
    for f in dataclasses.fields(Recipe):
        if f.name == "name":
            continue
        value = getattr(IMAGENET, f.name)
        if isinstance(value, bool):
            value, text = True, []
        elif isinstance(value, tuple):
            value = tuple(x * 1.01 for x in value)
            text = [str(x) for x in value]
        elif isinstance(value, str):
            value = {"epoch": "step", "cosine": "constant", "batch": "elem"}.get(value, value)
            text = [value]
        else:
            value = type(value)(value + 1) if isinstance(value, int) else value * 0.5
            text = [str(value)]
        words += [f"--{f.name.replace('_', '-')}", *text]
        expected[f.name] = value
    recipe = parse(words)[1]
    assert recipe is not None and dataclasses.asdict(recipe) == expected | {"name": "imagenet"}
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in expected)


def test_a_stored_recipe_can_be_used_again(tmp_path: Path) -> None:
    stored = dataclasses.replace(TRANSFER, lr=0.02, scale=(0.5, 1.0))
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"recipe": dataclasses.asdict(stored), "options": {}}))
    assert parse(["--data", "x", "--recipe", str(path)])[1] == stored
    changed = parse(["--data", "x", "--recipe", str(path), "--lr", "0.1"])[1]
    assert changed == dataclasses.replace(stored, lr=0.1)


def test_the_global_batch_is_divided() -> None:
    from crossvit.training.distributed import Processes

    def divided(world_size: int, batch_size: int | None, **changes: object) -> tuple[int, int]:
        recipe = dataclasses.replace(IMAGENET, **changes)
        device = torch.device("cpu")
        return divide_batch(recipe, Processes(0, world_size, device), batch_size)

    assert divided(1, None) == (64, 64)
    assert divided(8, 256) == (256, 2)
    assert divided(8, None, global_batch=96) == (12, 1)
    assert divided(1, None, global_batch=106) == (2, 53)  # 53 is odd
    assert divided(1, None, global_batch=106, mixup=0.0, cutmix=0.0) == (53, 2)


def test_freezing_heads_only_trains_the_rest() -> None:
    model = tiny()
    assert build.freeze(model, ["head.*"]) == 4
    optimizer = build.make_optimizer(model, IMAGENET, new_head=False)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for n, p in model.named_parameters() if not n.startswith("head.")}


def test_posterize_keeps_a_bit():
    """timm draws 0 bits at the highest level, which new Pillow refuses."""
    from PIL import Image

    image = Image.new("RGB", (24, 24), (90, 100, 110))
    for policy in ("rand-m9-mstd0.5-inc1", "original", "augmix-m10-w3"):
        recipe = dataclasses.replace(IMAGENET, auto_augment=policy)
        transform = build.training_transform(recipe, (24, 24))
        posterize = [
            op
            for step in transform.transforms
            for op in build._augmentations(step)
            if op.name.startswith("Posterize")
        ]
        assert posterize
        for op in posterize:
            op.prob, op.magnitude_std = 1.0, 0.0
            for op.magnitude in (0, 9, 10):
                op(image)

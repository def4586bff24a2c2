"""The command line of ``python -m crossvit.train``."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossvit.training.recipes import RECIPES, Recipe, find_recipe

DESCRIPTION = """Train a CrossViT, from one CPU to many nodes.

  python -m crossvit.train --data imagenet/ --model crossvit_15_240
  torchrun --nproc-per-node 8 -m crossvit.train --data imagenet/ --model crossvit_18_240
  python -m crossvit.train --data torch/cifar10 --data-root data/ --download \\
      --recipe transfer --model crossvit_15_240 --checkpoint official --replace-head

The same command continues a run that was killed, from its last checkpoint. docs/training.md has
more, and says what each option costs.
"""

EPILOGUE = """exit codes: 0 finished; 1 an error; 2 a wrong option; 75 stopped by SIGTERM or
SIGUSR1 after a checkpoint was saved; 130 the same by Ctrl-C."""


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe | None]:
    """Return the options of a run and its recipe, which is None if runs are only plotted.

    Exits with status 2 if an option is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m crossvit.train",
        description=DESCRIPTION,
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_data(parser.add_argument_group("images"))
    _add_model(parser.add_argument_group("model"))
    _add_run(parser.add_argument_group("run"))
    _add_execution(parser.add_argument_group("execution, which changes results by rounding only"))
    _add_recipe(parser)
    options = parser.parse_args(arguments)
    if options.data is None:
        if options.plot:
            return options, None
        parser.error("the following arguments are required: --data")
    for name in ("keep_checkpoints", "save_every", "log_every", "max_bad_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if options.workers < 0 or (options.batch_size is not None and options.batch_size < 1):
        parser.error("--workers and --batch-size: expected at least 0 and 1")
    if options.eager and options.backend:
        parser.error("--eager and --backend: expected one of them")
    try:
        return options, _recipe(options)
    except ValueError as error:
        parser.error(str(error))


def _recipe(options: argparse.Namespace) -> Recipe:
    changes: dict[str, Any] = {}
    for f in _fields():
        value = getattr(options, f"recipe_{f.name}")
        if value is not None:
            changes[f.name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(find_recipe(options.recipe), **changes)


def _fields() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(Recipe) if f.metadata]


def _add_data(group: Any) -> None:
    add = group.add_argument
    add(
        "--data",
        metavar="DIR_OR_NAME",
        help="folder with train/ and val/, or a name of timm's "
        "data sets: torch/cifar10, hfds/OWNER/NAME, wds/NAME, ...",
    )
    add("--data-root", metavar="DIR", help="where a named data set is, or is cached")
    add("--download", action="store_true", help="download a named data set")
    add("--train-split", default="train", metavar="NAME")
    add("--val-split", default="validation", metavar="NAME", help="'' to train without validation")
    add("--train-samples", type=int, metavar="N", help="of a stream that does not know it")
    add("--val-samples", type=int, metavar="N", help="of a stream that does not know it")
    add("--in-chans", type=int, default=3, choices=(1, 3), help="1 for grey images")
    add("--num-classes", type=int, metavar="N", help="of a data set that does not know it")
    add("--skip-bad", action="store_true", help="skip and count unreadable images")
    add("--workers", type=int, default=4, metavar="N", help="per process, to read images")


def _add_model(group: Any) -> None:
    add = group.add_argument
    add("--model", default="crossvit_15_240", metavar="NAME", help="see crossvit.list_models()")
    add(
        "--model-args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        type=_assignment,
        help="further arguments of CrossViT, e.g. img_size=256 patch_sizes=8,16",
    )
    add("--img-size", type=int, metavar="PIXELS", help="side of the S branch's image")
    add(
        "--checkpoint",
        metavar="SOURCE",
        help="start from weights: official, timm, a file, a URL or a hub id",
    )
    add("--replace-head", action="store_true", help="new heads, for other classes")
    add("--freeze", nargs="+", default=[], metavar="PATTERN", help="parameters not to train")


def _add_run(group: Any) -> None:
    add = group.add_argument
    names = ", ".join(RECIPES)
    add("--recipe", default="imagenet", metavar="NAME", help=f"{names}, or a run's run.json")
    add("--output", type=Path, metavar="DIR", help="of the run; default: runs/MODEL-RECIPE")
    add("--seed", type=int, default=0)
    add(
        "--save-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="between checkpoints, which are also saved after each epoch",
    )
    add("--keep-checkpoints", type=int, default=3, metavar="N", help="the last ones")
    add("--log-every", type=int, default=50, metavar="STEPS", help="between rows of steps.csv")
    add(
        "--max-bad-steps",
        type=int,
        default=10,
        metavar="N",
        help="stop after so many steps in a row without a finite loss and gradient",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="continue a run although its recipe or model options differ",
    )
    add(
        "--plot",
        nargs="*",
        metavar="RUN",
        type=Path,
        help="draw curves of this run, and of others; without --data, only of these",
    )


def _add_execution(group: Any) -> None:
    add = group.add_argument
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per process and pass; gradients accumulate to the global batch",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--eager", action="store_true", help="without the fused kernels")
    add("--backend", metavar="NAME", help="of crossvit_kernels")
    add(
        "--keep",
        choices=("fast", "lean"),
        default="fast",
        help="lean: save less for backward on a GPU, and recompute it",
    )
    add(
        "--grad-checkpointing",
        action="store_true",
        help="recompute each multi-scale block in backward",
    )
    add(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bf16 autocast; auto: on GPUs",
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--channels-last", action="store_true", help="memory format of images")
    add("--fsdp", action="store_true", help="shard parameters and optimizer (FSDP2); default: DDP")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "recipe", "Fields of the recipe, with ImageNet's values; --recipe chooses others."
    )
    hints = typing.get_type_hints(Recipe)
    for f in _fields():
        options: dict[str, Any] = {"dest": f"recipe_{f.name}", "default": None}
        hint = hints[f.name]
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            items = typing.get_args(hint)
            options |= {"type": float, "nargs": "+" if ... in items else len(items)}
            options["metavar"] = "X"
        else:
            options |= {"type": hint, "metavar": {int: "N", float: "X", str: "NAME"}[hint]}
        default = " ".join(map(_short, f.default)) if isinstance(f.default, tuple) else f.default
        text = f"{f.metadata['help']} ({default})".replace("%", "%%")
        group.add_argument(f"--{f.name.replace('_', '-')}", help=text, **options)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a string

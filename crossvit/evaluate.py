"""Measure the top-1 and top-5 accuracy of a CrossViT, and of each of its branches alone.

    python -m crossvit.evaluate --data imagenet --model crossvit_15_240 --checkpoint timm
    python -m crossvit.evaluate --data images/test --checkpoint runs/best.safetensors
    torchrun --nproc-per-node 8 -m crossvit.evaluate --data imagenet --checkpoint best.safetensors

Every image counts once, however many processes share them. Prints one line; --json writes all of
it. Exit status: 0; 1 if the evaluation is impossible, after a line that says why; 2 for wrong
options. Needs the extra "train": pip install "crossvit-kernels[train]".
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from crossvit import command_line, imagenet
from crossvit.command_line import autocast_dtype, make_transform, open_model, positive
from crossvit.evaluation import NOT_COUNTED, Accuracy, Evaluation, evaluate
from crossvit.training.data import Batch, evaluation_loader
from crossvit.training.distributed import Processes, start_processes, stop_processes
from crossvit.training.sources import INSTALL, Source, open_source

_PROGRAM = "crossvit.evaluate"
_SHOWN = 5


def class_numbers(source: Source, names: Sequence[str] | None, num_classes: int) -> Tensor | None:
    """Return the model's number of each of the images' classes, int64; None if they are the same.

    Args:
        source: The images. If both have names, their classes may be fewer than the model's.
        names: Of the model's classes; None if unknown: the images must then have as many classes,
            and in the model's order.
        num_classes: Of the model.

    Raises:
        ValueError: Classes do not match; the message says which.
    """
    theirs = source.class_names
    if theirs is None:
        return None  # evaluate() refuses targets that are no class of the model
    if names is None:
        if len(theirs) != num_classes:
            raise ValueError(
                f"data: {source.name} has {len(theirs)} classes ({_shortened(theirs)}), the model "
                f"{num_classes}: name the model's, one per line, with --labels FILE, or give a "
                "checkpoint of these classes"
            )
        return None
    if unknown := sorted(set(theirs) - set(names)):
        raise ValueError(
            f"data: {source.name} has classes that the model does not: {_shortened(unknown)}; the "
            f"model's are {_shortened(names)}"
        )
    if repeated := [name for name in theirs if names.count(name) > 1]:
        raise ValueError(f"several classes of the model are called {_shortened(repeated)}")
    numbers = [names.index(name) for name in theirs]
    if numbers == list(range(len(numbers))):
        return None
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def names_of_classes(
    options: argparse.Namespace, weights: str, source: Source, num_classes: int
) -> list[str] | None:
    """Names from --labels or the checkpoint; else ImageNet's, if they are the images' classes."""
    names = command_line.class_names(options, weights, num_classes)
    theirs = source.class_names
    if names is None and theirs and num_classes == imagenet.NUM_CLASSES:
        wordnet_ids = imagenet.wordnet_ids()
        names = wordnet_ids if set(theirs) <= set(wordnet_ids) else None
    return names


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _renumbered(batches: Iterable[Batch], numbers: Tensor | None) -> Iterator[Batch]:
    """Batches with the model's class numbers."""
    for batch in batches:
        if numbers is None:
            yield batch
        else:
            targets = batch.targets.where(batch.targets == NOT_COUNTED, numbers[batch.targets])
            yield batch._replace(targets=targets)


def _shown(batches: Iterable[Batch], total: int, processes: Processes) -> Iterator[Batch]:
    """The same batches; the first process shows how far it is, on a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError as error:
        raise ImportError(f"the progress bar needs rich: {INSTALL}") from error
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.fields[speed]}")
    off = not (processes.first and console.is_terminal)
    begun, done = time.perf_counter(), 0
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        task = progress.add_task("", total=total or None, speed="")
        for batch in batches:
            yield batch
            done = min(done + len(batch.images) * processes.world_size, total or sys.maxsize)
            speed = f"{done / (time.perf_counter() - begun):.0f} images/s"
            progress.update(task, completed=done, speed=speed)


def _line(report: dict[str, Any], result: Evaluation) -> str:
    def text(accuracy: Accuracy) -> str:
        return f"top-1 {accuracy.top1:.2f} % top-5 {accuracy.top5:.2f} %"

    branches = "".join(
        f"; {name} branch {text(accuracy)}"
        for name, accuracy in (("S", result.small), ("L", result.large))
        if accuracy is not None
    )
    skipped = f", {result.unreadable} unreadable" if result.unreadable else ""
    return (
        f"{report['model']}, {result.images} images{skipped}: {text(result.mean)}{branches}; "
        f"loss {result.loss:.4f}; {report['images_per_s']:.0f} images/s"
    )


def _evaluate(options: argparse.Namespace, processes: Processes) -> int:
    model, weights = open_model(options, processes.device)
    transform = make_transform(options, model, weights)
    source = open_source(
        options.data,
        options.split,
        root=options.data_root,
        download=options.download,
        in_chans=model.in_chans,
        batch_size=options.batch_size,
        num_samples=options.num_samples,
    )
    names = names_of_classes(options, weights, source, model.num_classes)
    numbers = class_numbers(source, names, model.num_classes)
    if processes.first and (names is None or source.class_names is None):
        whose = "the checkpoint does" if names is None else "the images do"
        print(
            f"{_PROGRAM}: {whose} not name the classes: those of {source.name} are taken for the "
            "model's by their numbers",
            file=sys.stderr,
        )
    loader = evaluation_loader(
        source,
        transform,
        options.batch_size,
        workers=options.workers,
        rank=processes.rank,
        world_size=processes.world_size,
        skip_bad=options.skip_bad,
        pin_memory=processes.device.type == "cuda",
    )
    total = 0 if source.streams else len(source)
    begun = time.perf_counter()
    batches = _renumbered(_shown(loader, total, processes), numbers)
    result = evaluate(model, batches, dtype=autocast_dtype(options))
    seconds = time.perf_counter() - begun
    for problem in result.problems:
        print(f"{_PROGRAM}: skipped {problem}", file=sys.stderr)
    if total and result.images + result.unreadable != total:
        raise ValueError(
            f"data: {source.name} has {total} images, of which only {result.images} have a class"
        )
    if processes.first:
        report = _report(options, weights, processes, result.images / seconds, seconds)
        if str(options.json) != "-":
            print(_line(report, result))
        if options.json:
            results = dataclasses.asdict(result)
            del results["problems"]  # of this process alone
            command_line.write_json(options.json, {**report, **results})
    return 0


def _report(
    options: argparse.Namespace,
    weights: str,
    processes: Processes,
    images_per_s: float,
    seconds: float,
) -> dict[str, Any]:
    """What was evaluated and how, for the JSON file."""
    return {
        "model": options.model or str(weights),
        "checkpoint": str(weights),
        "data": options.data,
        "split": options.split,
        "transform": options.transform,
        "crop_pct": options.crop_pct,
        "img_size": options.img_size,
        "dtype": options.dtype,
        "fused": not options.eager,
        "device": processes.device.type,
        "processes": processes.world_size,
        "torch": torch.__version__,
        "seconds": seconds,
        "images_per_s": images_per_s,
    }


def _command(options: argparse.Namespace) -> int:
    processes = start_processes(options.device, fsdp=False)
    status = _evaluate(options, processes)
    stop_processes()
    return status


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_PROGRAM}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        required=True,
        metavar="DIR_OR_NAME",
        help="folder with a subfolder of images for each class, or with such folders train and "
        "val; or a name of timm's data sets, such as torch/cifar10, hfds/owner/name, wds/name",
    )
    add("--split", default="validation", help="default: validation")
    add("--data-root", metavar="DIR", help="where a named data set is, or is cached")
    add("--download", action="store_true", help="download a named data set if needed")
    add("--num-samples", type=positive, metavar="N", help="images of a stream that lacks it")
    add(
        "--workers",
        type=int,
        default=min(8, _processors() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        metavar="N",
        help="processes that read images, of each process; default: one per processor, at most 8",
    )
    add("--skip-bad", action="store_true", help="count unreadable images instead of stopping")
    command_line.add_image_options(parser, batch_size=64)
    command_line.add_model_options(parser)
    parser.add_argument(
        "--json",
        type=command_line.output_file,
        metavar="FILE",
        help="write the result to a file; - is standard output, in place of the line",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    return command_line.run(_PROGRAM, lambda: _command(options))


if __name__ == "__main__":
    sys.exit(main())

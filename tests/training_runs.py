"""Runs of the trainer in processes of their own, for tests: tiny models, generated images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

#: A model of 14 thousand parameters for images of 24 pixels.
TINY = "--model-args dims=8,16 num_heads=2,2 depths=1,1 num_blocks=1 mlp_ratios=2.,2. img_size=24"
#: Mixup, cutmix, erasing, drop path and averaged weights are on; 4 steps per epoch.
TRAIN = f"{TINY} --global-batch 8 --epochs 3 --warmup-epochs 1 --ema-decay 0.9 --device cpu"
#: Nothing random but the order of images and their augmentation, which are the same for all.
PLAIN = "--mixup 0 --cutmix 0 --drop-path 0"

#: Two steps of 16 images without randomness, to compare numbers of processes.
TWO_STEPS = f"{PLAIN} --global-batch 16 --epochs 1 --warmup-epochs 0 --lr 0.05 --clip-grad 0.1"
TWO_STEPS += " --log-every 1"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["training_runs", "crossvit.training.run", "timm.data"])


def make_images(folder: Path, classes: int = 3, train: int = 11, val: int = 5) -> Path:
    """Write images whose class is the place of a bright bar."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for c in range(classes):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (24, 24, 3), dtype=np.uint8)
                pixels[:, c * 24 // classes : (c + 1) * 24 // classes] += 150
                Image.fromarray(pixels).save(folder / split / f"class{c}" / f"{i}.png")
    return folder


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    """The command line of a tiny run."""
    words = " ".join((TRAIN, *more)).split()
    return ["--data", str(data), "--output", str(output), "--workers", "1", *words]


def run(
    command: Sequence[str],
    hook: Callable[..., Any] | None = None,
    *hook_arguments: Any,
    processes: int = 1,
    timeout: float = 120,
) -> list[int]:
    """Run the trainer as torchrun would, without its supervision; return the exit codes.

    Args:
        command: The command line.
        hook: Called in each process before it trains.
        *hook_arguments: Of the hook.
        processes: How many.
        timeout: In seconds.
    """
    started = start(command, hook, *hook_arguments, processes=processes)
    try:
        for process in started:
            process.join(timeout)
        assert all(process.exitcode is not None for process in started), "a process hangs"
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()


def start(
    command: Sequence[str],
    hook: Callable[..., Any] | None = None,
    *hook_arguments: Any,
    processes: int = 1,
) -> list[Any]:
    """Start the trainer without waiting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ranks}
        target = (list(command), environment if processes > 1 else {}, hook, hook_arguments)
        process = _context.Process(target=_main, args=target)
        process.start()
        started.append(process)
    return started


def _main(command: list[str], environment: dict[str, Any], hook: Any, hook_arguments: Any) -> None:
    from crossvit.train import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    output = Path(command[command.index("--output") + 1])
    output.parent.mkdir(parents=True, exist_ok=True)
    rank = environment.get("RANK", 0)
    log = os.open(f"{output}.log{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    multiprocessing.set_start_method("fork", force=True)  # of the loaders' workers
    torch.set_num_threads(1)  # of several, each would wait for the others on a busy machine
    if hook is not None:
        hook(*hook_arguments)
    sys.exit(main(command))


def printed(output: Path, rank: int = 0) -> str:
    """What the runs in a folder printed."""
    return Path(f"{output}.log{rank}").read_text()


# Hooks


def die_before_step(step: int) -> None:
    """Kill this process when it begins a step."""
    from crossvit.training.engine import Engine

    original = Engine.step

    def dies(self: Engine, batches: Any, epoch: int, number: int, stop: Any) -> Any:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batches, epoch, number, stop)

    Engine.step = dies


def die_while_writing(count: int, share: float) -> None:
    """Kill this process when a share of its count-th checkpoint is written."""
    import io

    from crossvit.training import state

    seen = 0

    def half(content: dict[str, Any], file: Any) -> None:
        nonlocal seen
        seen += 1
        whole = io.BytesIO()
        torch.save(content, whole)
        if seen == count:
            file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(whole.getvalue())

    state._torch_save = half


def die_after_writing(count: int) -> None:
    """Kill this process when its count-th checkpoint is written, before old ones are deleted."""
    from crossvit.training import state

    original, seen = state.write_whole, 0

    def dies(path: Path, write: Any) -> None:
        nonlocal seen
        original(path, write)
        seen += path.suffix == ".pt"
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    state.write_whole = dies


def die_while_evaluating(count: int) -> None:
    """Kill this process at its count-th evaluation."""
    from crossvit.training import run as module

    original, seen = module.evaluate, 0

    def dies(*evaluated: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*evaluated, **options)

    module.evaluate = dies

"""Train a CrossViT: ``python -m crossvit.train --help``, or under torchrun."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from crossvit.training import options as command_line
from crossvit.training.recipes import Recipe

FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or continue, the run that the arguments describe; return the exit code.

    Args:
        arguments: As on the command line; by default those of this process.

    Returns:
        0 for a finished run, 1 after an error, which is printed, 75 if SIGTERM or SIGUSR1 stopped
        it and 130 if Ctrl-C did, both with a checkpoint saved.
    """
    options, recipe = command_line.parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        code = _plot(options, []) if recipe is None else _train(options, recipe)
    except KeyboardInterrupt:
        code = _fail("interrupted; the last checkpoint is kept")
    except _expected_errors() as error:
        code = _fail(str(error))
    except Exception as error:
        if message := _advice(error):
            code = _fail(message)
        elif not _several_processes():
            raise
        else:
            traceback.print_exc()
            code = FAILED
    if code and _several_processes():
        # The other processes may wait for this one: end at once, and torchrun ends them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _expected_errors() -> tuple[type[BaseException], ...]:
    from crossvit.training.engine import Diverged

    return ValueError, TypeError, OSError, ImportError, Diverged


def _advice(error: Exception) -> str:
    """What a user can do about an error of the machine; "" for others."""
    import torch

    from crossvit.training.data import reader_died

    if isinstance(error, torch.OutOfMemoryError):
        return f"{error}: try a smaller --batch-size, --keep lean or --grad-checkpointing"
    return reader_died(error)


def _fail(message: str) -> int:
    rank = os.environ.get("RANK")
    where = f"[rank {rank}] " if rank else ""
    print(f"crossvit.train: {where}{message}", file=sys.stderr)
    return FAILED


def _train(options: Any, recipe: Recipe) -> int:
    from crossvit.training.distributed import start_processes, stop_processes
    from crossvit.training.plots import check_matplotlib
    from crossvit.training.run import FINISHED, Run, Signals, locked
    from crossvit.training.setup import prepare

    if options.plot is not None:  # now, not after hours of training
        check_matplotlib()
    folder = options.output or Path("runs", f"{options.model}-{recipe.name}")
    processes = start_processes(options.device, options.fsdp)
    with ExitStack() as stack:
        signals = stack.enter_context(Signals())
        if processes.first:
            stack.enter_context(locked(folder))
        setup = stack.enter_context(closing(prepare(options, recipe, processes)))
        run = stack.enter_context(closing(Run(folder, options, recipe, processes, setup, signals)))
        for line in (*recipe.lines(), *setup.notes):
            run.display.say(line)
        code = run.train()
    stop_processes()
    if code == FINISHED and options.plot is not None and processes.first:
        _plot(options, [folder])
    return code


def _plot(options: Any, runs: list[Path]) -> int:
    from crossvit.training.plots import draw

    path = runs[0] / "curves.png" if runs else options.output or Path("curves.png")
    draw([*runs, *options.plot], path)
    print(f"curves in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

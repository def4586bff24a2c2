"""Checkpoint files of a run: written whole or not at all, read without running code.

One file holds everything, unsharded, however many processes trained: a run may go on with
another number of them, with DDP or FSDP. torch.distributed.checkpoint converts the states; its
sharded files are not used because their metadata is a pickle, which could run code when it is
read, and a CrossViT with its optimizer fits one file.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

logger = logging.getLogger("crossvit.train")

FORMAT = 1
_NAME = re.compile(r"step-(\d+)\.pt")
_UNFINISHED = ".unfinished"
_UNREADABLE = (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError)


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that neither a crash nor a reader sees half of it.

    Args:
        path: Of the file.
        write: Called with the open binary file.

    Raises:
        OSError: It cannot be written; an earlier file of this name is untouched.
    """
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    with _signals_wait():
        try:
            with unfinished.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            unfinished.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> OSError:
    """The same error with a message that names the file."""
    why = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
    return OSError(error.errno, f"cannot write {path}: {why or error}")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of a run, of which the last few are kept.

    Args:
        folder: Where they are; made if missing.
        keep: How many.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """All checkpoints, the latest first."""
        found = [path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_step, reverse=True)

    def save(self, step: int, content: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete those that are too old, and those of later steps: the run
        did not continue from them, as they were damaged or of other options.

        Raises:
            OSError: It cannot be written; the earlier ones are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        write_whole(path, lambda file: _torch_save(content | {"format": FORMAT}, file))
        paths = self.paths()
        later = paths.index(path)
        for old in (*paths[:later], *paths[later + self.keep :]):
            old.unlink(missing_ok=True)
        return path

    def set_aside(self, step: int) -> Path | None:
        """Rename the checkpoint of a step, so that no run continues from it; None without one."""
        path = self.folder / f"step-{step:08d}.pt"
        if not path.exists():
            return None
        return path.rename(path.with_name(f"diverged-{path.name}"))

    def clean(self) -> None:
        """Remove what a killed process left unfinished."""
        for path in self.folder.glob(f".*{_UNFINISHED}"):
            path.unlink(missing_ok=True)

    def load_latest(self) -> dict[str, Any] | None:
        """Return the latest checkpoint that can be read; None if there is none.

        Raises:
            ValueError: There are some, but none can be read.
        """
        paths = self.paths()
        for path in paths:
            try:
                return load(path)
            except ValueError as error:
                logger.warning("%s", error)
        if paths:
            raise ValueError(f"no checkpoint in {self.folder} can be read; remove them to restart")
        return None


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _torch_save(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch's writer hides the error of the file that it wrote to.
        cause = error.__context__ or error.__cause__
        if isinstance(cause, OSError):
            raise cause from error
        raise OSError(errno.EIO, str(error)) from error


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let Ctrl-C and the end of a worker wait: torch's writer ends the process if handlers raise.

    torch.utils.data raises from its handler of SIGCHLD when a worker was killed.
    """
    if threading.current_thread() is not threading.main_thread():  # others run no handlers
        yield
        return
    came: list[int] = []
    with ExitStack() as stack:
        for number in (signal.SIGCHLD, signal.SIGINT):
            handler = signal.getsignal(number)
            if handler is not None:
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda number, _: came.append(number))
        yield
    for late in came:
        signal.raise_signal(late)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this trainer.

    Raises:
        ValueError: It is damaged, of another version, or holds more than tensors and numbers.
    """
    with _signals_wait():  # else the end of a worker makes a file look damaged
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except _UNREADABLE as error:
            raise ValueError(f"{path}: not a checkpoint of this trainer: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this version of the trainer")
    return content


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOAD = StateDictOptions(full_state_dict=True)


def model_state(model: nn.Module) -> dict[str, Any]:
    """The unsharded weights on the CPU; all processes of a sharded model call this."""
    return dict(get_model_state_dict(model, options=_WHOLE))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's unsharded state by parameter names; all processes call this."""
    return dict(get_optimizer_state_dict(model, optimizer, options=_WHOLE))


def restore(model: nn.Module, state: dict[str, Any]) -> None:
    """Set the weights to those of ``model_state``."""
    set_model_state_dict(model, state, options=_LOAD)


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Set an optimizer's state to that of ``optimizer_state``, but not its hyper-parameters.

    Those are the recipe's, which may have been changed. The learning rate is the saved one, until
    the next step sets it.
    """
    own = [
        {k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups
    ]
    set_optimizer_state_dict(model, optimizer, state, options=_LOAD)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)

"""What a run writes about itself: a row per epoch, a row per logged step, TensorBoard's events."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crossvit.training.state import cannot_write, write_whole

Row = dict[str, Any]


class Table:
    """A CSV file that a resumed run continues without repeating rows.

    Args:
        path: Of the file.
        columns: Names of the columns; the first is the key, which rises from row to row.
        first: Rows whose key is not below this one are dropped: they are written again.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], first: int) -> None:
        self.path, self.columns = path, columns
        kept = [row for row in read_table(path) if int(row[columns[0]]) < first]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_whole(path, lambda file: file.write(text.getvalue().encode()))
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="", lineterminator="\n")

    def add(self, row: Row) -> None:
        """Append a row; missing columns stay empty."""
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a table; none if there is no file."""
    if not path.is_file():
        return []
    # A killed process may have written half of the last line.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    return list(csv.DictReader(lines))


EPOCHS = (
    *("epoch", "step", "lr", "train_loss", "val_loss", "val_top1", "val_top5"),
    *("val_small_top1", "val_large_top1"),
    *("ema_loss", "ema_top1", "ema_top5", "images_per_s", "data_wait", "seconds", "memory_mb"),
    *("unreadable", "skipped_steps"),
)
STEPS = ("step", "epoch", "loss", "lr", "grad_norm")


class Records:
    """The tables of a run, and TensorBoard's events if tensorboard is installed.

    Args:
        folder: Of the run.
        epoch: First epoch that is to be recorded.
        step: First step that is to be recorded.
    """

    def __init__(self, folder: Path, epoch: int, step: int) -> None:
        self.epochs = Table(folder / "epochs.csv", EPOCHS, epoch)
        self.steps = Table(folder / "steps.csv", STEPS, step)
        self._board = _tensorboard(folder / "tensorboard", step)

    def add_step(self, row: Row) -> None:
        """Record a step."""
        self.steps.add(row)
        self._add_scalars("step", row, row["step"])

    def add_epoch(self, row: Row) -> None:
        """Record an epoch."""
        self.epochs.add(row)
        self._add_scalars("epoch", row, row["step"])

    def _add_scalars(self, group: str, row: Mapping[str, Any], step: int) -> None:
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Close all files."""
        self.epochs.close()
        self.steps.close()
        if self._board is not None:
            self._board.close()


def add_unreadable(path: Path, problems: list[str]) -> None:
    """Append names of unreadable images to a file, each once; any process may call this."""
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    new = [problem for problem in dict.fromkeys(problems) if problem not in known]
    if new:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{problem}\n" for problem in new))


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def environment() -> dict[str, str]:
    """Versions that a run depends on."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }

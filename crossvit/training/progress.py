"""What a run shows while it trains: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import datetime
import resource
import time
from typing import Any

import torch

from crossvit.training.sources import INSTALL

#: Seconds between two lines where there is no terminal.
_LINE_EVERY = 30.0


def memory_mb(device: torch.device) -> float:
    """Largest memory so far in MiB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Meter:
    """Speed and waiting since a moment, over the last steps."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.steps, self.waited, self.start = 0, 0.0, time.perf_counter()

    def add(self, waited: float) -> None:
        """Count a step."""
        self.steps += 1
        self.waited += waited

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.perf_counter() - self.start, 1e-9)

    @property
    def images_per_s(self) -> float:
        """Of all processes."""
        return self.steps * self.images_per_step / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time that was spent waiting for data, from 0 to 1."""
        return self.waited / self.seconds


class Display:
    """Shows a run's progress; silent in all processes but the first.

    Args:
        visible: Whether this process shows anything.
        total: Steps of the run.
        done: Steps before this start.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self, visible: bool, total: int, done: int) -> None:
        try:
            from rich.console import Console
        except ImportError as error:
            raise ImportError(f"the progress bar needs rich: {INSTALL}") from error
        self.visible, self.total, self.done = visible, total, done
        self.console = Console(quiet=not visible, highlight=False, soft_wrap=True)
        self._last_line, self._begun = time.perf_counter(), time.perf_counter()
        self._first = done
        self._bar: Any = None
        self._task: Any = None
        if visible and self.console.is_terminal:
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
        from rich.table import Column

        # On a narrow terminal the text is cut, not the time left.
        text = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True))
        bar, left = BarColumn(bar_width=12), Remaining(elapsed_when_finished=True)
        columns = (bar, MofNCompleteColumn(), left, text)
        self._bar = Progress(*columns, console=self.console, expand=True)
        self._task = self._bar.add_task("", total=self.total, completed=self.done)
        self._bar.start()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def step(self, epoch: int, loss: float, lr: float, meter: Meter, device: torch.device) -> None:
        """Show a step."""
        self.done += 1
        if not self.visible:
            return
        now = time.perf_counter()
        if self._bar is None and now - self._last_line < _LINE_EVERY:
            return
        text = (
            f"loss {loss:.4f} {meter.images_per_s:.0f} images/s, {meter.data_wait:.0%} waiting for "
            f"data, lr {lr:.1e} epoch {epoch} {memory_mb(device):.0f} MiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=text)
            return
        self._last_line = now
        rate = (now - self._begun) / max(self.done - self._first, 1)
        left = datetime.timedelta(seconds=round(rate * (self.total - self.done)))
        self.say(f"step {self.done}/{self.total} {text}, {left} left")

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

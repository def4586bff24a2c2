"""One run: its folder, what it resumes from, its epochs, and how it ends."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crossvit.checkpoints import describe, save_checkpoint
from crossvit.evaluation import Evaluation, evaluate
from crossvit.training import state
from crossvit.training.distributed import Processes
from crossvit.training.engine import Diverged, StepResult, endless
from crossvit.training.progress import Display, Meter, memory_mb
from crossvit.training.recipes import Recipe
from crossvit.training.records import Records, add_unreadable, environment, write_json
from crossvit.training.setup import Setup

#: Exit codes: finished; told to stop, and the state is saved (sysexits.h: try again); Ctrl-C.
FINISHED, STOPPED, INTERRUPTED = 0, 75, 130


@dataclasses.dataclass
class Progress:
    """Where a run is; saved with each checkpoint. Sums are of the current epoch."""

    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # of finite steps
    finite_steps: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    unreadable: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    best_top1: float = -1.0

    def next_epoch(self) -> Progress:
        """The beginning of the next epoch."""
        bad = self.bad_in_a_row
        return Progress(epoch=self.epoch + 1, best_top1=self.best_top1, bad_in_a_row=bad)

    def count(self, result: StepResult) -> None:
        """Count a step."""
        self.step_in_epoch += 1
        self.unreadable += result.unreadable
        if result.finite:
            self.loss_sum += result.loss
            self.finite_steps += 1
            self.bad_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.bad_in_a_row += 1


class Signals:
    """Remembers SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C; a second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def received(self) -> bool:
        """Whether there was a signal."""
        return self.code is not None

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self.code is not None:
            raise KeyboardInterrupt
        self.code = INTERRUPTED if number == signal.SIGINT else STOPPED

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Run:
    """Trains from the last checkpoint in a folder, or from the start, to the end.

    Args:
        folder: Of the run.
        options: From the command line.
        recipe: Of the run.
        processes: This process among all.
        setup: Images, model, and what trains it.
        signals: What this process was told.

    Raises:
        ValueError: The folder has a run with another recipe or model, or unreadable checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        recipe: Recipe,
        processes: Processes,
        setup: Setup,
        signals: Signals,
    ) -> None:
        self.folder, self.options, self.recipe = folder, options, recipe
        self.processes, self.setup, self.engine = processes, setup, setup.engine
        self.signals, self.progress = signals, Progress()
        self.checkpoints = state.Checkpoints(folder / "checkpoints", options.keep_checkpoints)
        if processes.first:
            self.checkpoints.clean()
        processes.wait()
        self._resume()
        if processes.first:
            write_json(folder / "run.json", self._description())
        self.display = Display(processes.first, recipe.epochs * setup.steps, self.step)
        self.records = None
        if processes.first:
            self.records = Records(folder, self.progress.epoch, self.step)

    @property
    def step(self) -> int:
        """Steps so far."""
        return self.progress.epoch * self.setup.steps + self.progress.step_in_epoch

    # Saving and resuming

    def _description(self) -> dict[str, Any]:
        options = {k: v for k, v in vars(self.options).items() if not k.startswith("recipe")}
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "identity": self.setup.identity,
            "options": json.loads(json.dumps(options, default=str)),
            "processes": self.processes.world_size,
            "environment": environment(),
        }

    def _resume(self) -> None:
        content = self.checkpoints.load_latest()
        found = -1.0 if content is None else float(content["step"])
        if self.processes.sums(found)[0] != found * self.processes.world_size:
            raise ValueError(
                f"output: {self.folder} is not the same folder for all processes; it must be on "
                "storage that all of them see"
            )
        if content is None:
            return
        self._check_identity()
        self.progress = Progress(**content["progress"])
        engine = self.engine
        try:
            state.restore(engine.model, content["model"])
            state.restore_optimizer(engine.model, engine.optimizer, content["optimizer"])
            if engine.ema is not None:  # averages that begin here begin with the weights
                state.restore(engine.ema.module, content["ema"] or content["model"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"output: the checkpoints in {self.folder} are of another model or optimizer; "
                "choose another --output, and --checkpoint to start from a model's weights"
            ) from error

    def _check_identity(self) -> None:
        """Refuse to continue another run."""
        path = self.folder / "run.json"
        if self.options.allow_changes or not path.is_file():
            return
        stored, mine = json.loads(path.read_text()), json.loads(json.dumps(self._description()))
        for part in ("recipe", "identity"):
            for name, value in mine[part].items():
                old = stored.get(part, {}).get(name)
                if old != value:
                    raise ValueError(
                        f"output: {self.folder} has a run with {name} = {_short(old)}, not "
                        f"{_short(value)}; choose another --output, or --allow-changes"
                    )

    def save(self) -> None:
        """Write a checkpoint; all processes call this.

        Raises:
            OSError: It cannot be written; the earlier ones are kept.
        """
        engine = self.engine
        content = {
            "step": self.step,
            "progress": dataclasses.asdict(self.progress),
            "model": state.model_state(engine.model),
            "optimizer": state.optimizer_state(engine.model, engine.optimizer),
            "ema": None if engine.ema is None else state.model_state(engine.ema.module),
            "metadata": describe(engine.model, **self._recorded()),
        }
        if self.processes.first:
            self.checkpoints.save(self.step, content)

    def _export(self, model: Any, name: str) -> None:
        if self.options.fsdp or self.processes.first:  # all processes have a part of a sharded one
            path = self.folder / name
            try:
                save_checkpoint(model, path, **self._recorded())
            except OSError as error:
                raise state.cannot_write(path, error) from error

    def _recorded(self) -> dict[str, Any]:
        """What checkpoints say about the data."""
        setup = self.setup
        return {"class_names": setup.class_names, "normalization": setup.normalization}

    # Training

    def train(self) -> int:
        """Train to the end, or until a signal; return the exit code.

        Raises:
            Diverged: Too many steps in a row were not finite.
            OSError: A file cannot be written.
            ValueError: An image cannot be read.
        """
        if self.step:
            self.display.say(f"{self.folder}: continues after step {self.step}")
        while self.progress.epoch < self.recipe.epochs:
            if self._train_epoch():
                return self._stop()
            self._finish_epoch()
        averaged = self.engine.ema is not None
        self._export(self.engine.ema.module if averaged else self.engine.model, "last.safetensors")
        self.display.say(f"finished: {self.folder}")
        return FINISHED

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; return whether to stop before it."""
        progress, steps, engine = self.progress, self.setup.steps, self.engine
        first = progress.step_in_epoch * engine.accumulation
        batches = endless(self.setup.train, progress.epoch, first)
        meter = Meter(self.recipe.global_batch)
        before = progress.seconds, progress.waited
        while progress.step_in_epoch < steps:
            step = self.step
            result = engine.step(batches, progress.epoch, step, self.signals.received)
            progress.count(result)
            meter.add(result.waited)
            progress.seconds, progress.waited = before[0] + meter.seconds, before[1] + meter.waited
            self._show(step, result, meter)
            if progress.bad_in_a_row >= self.options.max_bad_steps:
                raise Diverged(self._divergence(result))
            if result.stop:
                return True
            if self.step % self.options.save_every == 0 and not progress.bad_in_a_row:
                self.save()
        return False

    def _show(self, step: int, result: StepResult, meter: Meter) -> None:
        lr = max(group["lr"] for group in self.engine.optimizer.param_groups)
        epoch = self.progress.epoch
        self.display.step(epoch, result.loss, lr, meter, self.processes.device)
        if self.records is None:
            return
        if (step + 1) % self.options.log_every == 0:
            row = {"step": step, "epoch": epoch, "loss": result.loss, "lr": lr}
            self.records.add_step(row | {"grad_norm": result.grad_norm})

    def _divergence(self, result: StepResult) -> str:
        bad = self.progress.bad_in_a_row
        # Bad steps change nothing: what spoilt the weights is the step before them.
        spoilt = self.checkpoints.set_aside(self.step - bad) if self.processes.first else None
        kept = self.checkpoints.paths()
        advice = f"the last checkpoint is {kept[0]}" if kept else "there is no checkpoint before it"
        if spoilt:
            advice = f"the weights before them are in {spoilt}, which no run continues; {advice}"
        return (
            f"{bad} steps in a row, to step {self.step}, had no finite loss and gradient (loss "
            f"{result.loss}, norm {result.grad_norm}); {advice}; try a lower --lr, or --clip-grad 1"
        )

    def _stop(self) -> int:
        code = self.signals.code or STOPPED
        if self.progress.bad_in_a_row:
            self.display.say("stopped; not saved, as the last step was not finite")
        else:
            self.save()
            self.display.say(f"stopped after step {self.step}, which is saved")
        return code

    def _finish_epoch(self) -> None:
        """Evaluate, record, export the best, and save."""
        progress, engine = self.progress, self.engine
        row: dict[str, Any] = {"epoch": progress.epoch, "step": self.step}
        if not progress.bad_in_a_row:
            self.save()  # an evaluation may take longer than a node waits before it kills
        averaged = None if engine.ema is None else engine.ema.module
        for prefix, model in (("val", engine.model), ("ema", averaged)):
            # A model whose steps are not finite would give logits that are not.
            if model is not None and self.setup.val is not None and not progress.bad_in_a_row:
                result = evaluate(model, self.setup.val, dtype=engine.autocast)
                row |= _columns(prefix, result)
                self._keep_best(model, result)
                if prefix == "val":
                    progress.unreadable += result.unreadable
                    engine.problems += result.problems
        add_unreadable(self.folder / "unreadable.txt", engine.problems)
        engine.problems.clear()
        self._record(row)
        self.progress = progress.next_epoch()
        if not progress.bad_in_a_row:
            self.save()

    def _keep_best(self, model: Any, result: Evaluation) -> None:
        if result.mean.top1 > self.progress.best_top1:
            self.progress.best_top1 = result.mean.top1
            self._export(model, "best.safetensors")

    def _record(self, row: dict[str, Any]) -> None:
        progress = self.progress
        loss = progress.loss_sum / progress.finite_steps if progress.finite_steps else math.nan
        seconds = max(progress.seconds, 1e-9)
        row |= {
            "lr": max(group["lr"] for group in self.engine.optimizer.param_groups),
            "train_loss": loss,
            "images_per_s": progress.step_in_epoch * self.recipe.global_batch / seconds,
            "data_wait": progress.waited / seconds,
            "seconds": progress.seconds,
            "memory_mb": memory_mb(self.processes.device),
            "unreadable": progress.unreadable,
            "skipped_steps": progress.skipped_steps,
        }
        if self.records is not None:
            self.records.add_epoch(row)
        text = f"epoch {progress.epoch}: training loss {loss:.4f}"
        for prefix, name in (("val", "held out"), ("ema", "averaged weights")):
            if f"{prefix}_top1" in row:
                top1, top5 = (row[f"{prefix}_{k}"] for k in ("top1", "top5"))
                text += f", {name} top-1 {top1:.2f} % top-5 {top5:.2f} %"
        self.display.say(f"{text}, {row['images_per_s']:.0f} images/s")

    def close(self) -> None:
        """Close the files."""
        self.display.close()
        if self.records is not None:
            self.records.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, until the block or this process ends, however it does.

    Raises:
        BlockingIOError: Another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the workers
        except BlockingIOError:
            raise BlockingIOError(f"output: another process trains in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield


def _columns(prefix: str, result: Evaluation) -> dict[str, float]:
    """An evaluation's columns in the table of epochs."""
    columns = {"loss": result.loss, "top1": result.mean.top1, "top5": result.mean.top5}
    if prefix == "val" and result.small and result.large:
        columns |= {"small_top1": result.small.top1, "large_top1": result.large.top1}
    return {f"{prefix}_{name}": value for name, value in columns.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

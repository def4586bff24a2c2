"""Batches of labelled images, for training and evaluation.

Nothing about a loader is saved with a run: the order of an epoch and the augmentation of each of
its images follow from (seed, epoch, position), so training resumes within an epoch with the same
batches, whatever the number of workers.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from crossvit.evaluation import NOT_COUNTED
from crossvit.training.randomness import derive, seeded
from crossvit.training.sources import Source

#: Unreadable images in a row that may be replaced: after so many, the disk is to blame.
MAX_REPLACED = 100

Transform = Callable[[Any], Tensor]


class Draw(NamedTuple):
    """An image of an epoch; image -1 is padding, which evenly divides an evaluation."""

    image: int
    epoch: int = 0
    position: int = 0


class Sample(NamedTuple):
    """An image, its class, and what was wrong with the files tried for it."""

    image: Tensor  # [C, H, W]
    target: int
    problems: list[str]
    position: int = 0


class Batch(NamedTuple):
    """Images with their classes.

    Attributes:
        images: [B, C, H, W], as the transform makes them: uint8, or normalised float32.
        targets: int64 [B]; ``NOT_COUNTED`` for padding and unreadable images of an evaluation.
        problems: For each unreadable image, its name and the reason.
        positions: int64 [B], in the epoch's order.
    """

    images: Tensor
    targets: Tensor
    problems: list[str]
    positions: Tensor


class UnreadableImage(ValueError):
    """An image cannot be read, and is not to be skipped."""


class Images(Dataset[Sample]):
    """Images of a source with random access, each transformed with random numbers of its own.

    Args:
        source: Where they are.
        transform: Makes a tensor [C, H, W] of a PIL image.
        seed: Of the run.
        replace: Whether the next readable image stands in for an unreadable one; else it is zeros
            and not counted.
    """

    def __init__(
        self, source: Source, transform: Transform, seed: int = 0, replace: bool = False
    ) -> None:
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draw: Draw) -> Sample:
        from PIL import Image

        problems: list[str] = []
        image, target = None, NOT_COUNTED
        tries = MAX_REPLACED if self.replace else 1
        for index in range(draw.image, draw.image + tries) if draw.image >= 0 else ():
            try:
                image, target = self._read(index % len(self))
                break
            except Exception as error:  # decoders raise anything
                problems.append(f"{self._name(index % len(self))}: {error or type(error).__name__}")
        if image is None and self.replace:
            raise UnreadableImage(f"{tries} unreadable images in a row, the last: {problems[-1]}")
        with seeded(self.seed, draw.epoch, draw.position):
            image = self.transform(image or Image.new(self.source.mode, (64, 64)))
        return Sample(image, target, problems, draw.position)

    def _read(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        dataset = self.source.dataset
        if not hasattr(dataset, "reader"):  # torchvision's
            image, target = dataset[index]
            return image.convert(self.source.mode), int(target)
        # Not through timm's data set, which replaces unreadable images silently.
        file, target = dataset.reader[index][:2]
        with file, Image.open(file) as image:
            return image.convert(self.source.mode), NOT_COUNTED if target is None else int(target)

    def _name(self, index: int) -> str:
        try:
            return str(self.source.dataset.filename(index, absolute=True))
        except Exception:  # not all data sets have names
            return f"{self.source.name}, image {index}"


class StreamedImages(IterableDataset[Sample]):
    """Images of a stream, in its order.

    Batches come from the workers in turn, the first from worker 0. Each leaves out as many as its
    share of ``skipped_batches``, in whole turns, without transforming them.
    """

    def __init__(self, source: Source, transform: Transform, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.epoch, self.skipped_batches, self.batch_size = 0, 0, 1
        self.source.dataset.transform = None

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skip = self.skipped_batches // workers * self.batch_size
        for n, (image, target) in enumerate(self.source.dataset):
            if n < skip:
                continue
            with seeded(self.seed, self.epoch, worker, n):
                tensor = self.transform(image)
            label = NOT_COUNTED if target is None else int(target)
            yield Sample(tensor, label, [], worker << 40 | n)


class TrainingBatches:
    """The draws of every batch of one process: the batch sampler of a training loader.

    A step's global batch are consecutive draws of the epoch's order, dealt to the processes in
    turn, so that several processes see the images that one would.

    Args:
        num_images: Images of the source.
        batch_size: Images per process and forward pass.
        accumulation: Forward passes per step.
        seed: Of the run.
        rank: Of this process.
        world_size: Number of processes.
        repeats: Draws of each image, next to each other; an epoch has ``num_images`` draws all the
            same (repeated augmentation, as in DeiT).
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        accumulation: int = 1,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
    ) -> None:
        self.num_images, self.batch_size, self.accumulation = num_images, batch_size, accumulation
        self.seed, self.rank, self.world_size, self.repeats = seed, rank, world_size, repeats
        self.epoch, self.first_batch = 0, 0

    @property
    def steps(self) -> int:
        """Steps of an epoch; the draws that are left over make no step."""
        return self.num_images // (self.batch_size * self.accumulation * self.world_size)

    def order(self) -> Tensor:
        """The image of each position in the epoch, int64 [num_images]."""
        generator = torch.Generator("cpu").manual_seed(derive(self.seed, self.epoch))
        order = torch.randperm(
            self.num_images, generator=generator, dtype=torch.int64, device="cpu"
        )
        return order.repeat_interleave(self.repeats)[: self.num_images]

    def __len__(self) -> int:
        return self.steps * self.accumulation - self.first_batch

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = self.epoch, self.order().tolist()
        micro = self.batch_size * self.world_size
        for batch in range(self.first_batch, self.steps * self.accumulation):
            positions = range(batch * micro + self.rank, (batch + 1) * micro, self.world_size)
            yield [Draw(order[p], epoch, p) for p in positions]


class EvaluationBatches:
    """The draws of one process's share of an evaluation, each image once over all processes.

    All processes have the same number of equal batches, as sharded models need: what is missing is
    padding.
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-self.num_images // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in range(len(self)):
            start = batch * self.batch_size * self.world_size + self.rank
            end = (batch + 1) * self.batch_size * self.world_size
            indices = range(start, end, self.world_size)
            yield [Draw(i if i < self.num_images else -1) for i in indices]


def collate(samples: list[Sample]) -> Batch:
    """Make a batch of samples."""
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.tensor([sample.target for sample in samples], dtype=torch.int64, device="cpu"),
        [problem for sample in samples for problem in sample.problems],
        torch.tensor([sample.position for sample in samples], dtype=torch.int64, device="cpu"),
    )


class Loader:
    """Batches of a source, from worker processes.

    Args:
        images: The samples.
        batches: The draws of each batch; None for a stream, which has its own order.
        batch_size: For a stream.
        workers: Processes that read and transform images; 0 for none but this one.
        skip_bad: Let the reader of the batches count unreadable images; else the first one raises.
        pin_memory: For copies to a GPU that do not wait.
        share: For the evaluation of a stream: the rank of this process and the number of processes.
            Each reads the whole stream, and keeps its turn of the batches.
    """

    def __init__(
        self,
        images: Images | StreamedImages,
        batches: TrainingBatches | EvaluationBatches | None,
        *,
        batch_size: int = 1,
        workers: int = 0,
        skip_bad: bool = False,
        pin_memory: bool = False,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.images, self.batches, self.skip_bad, self.share = images, batches, skip_bad, share
        self.generator = torch.Generator()  # else the loader draws from torch's own
        options: dict[str, Any] = {
            "generator": self.generator,
            "collate_fn": collate,
            "pin_memory": pin_memory,
            "worker_init_fn": _ignore_signals,
        }
        if isinstance(images, StreamedImages):
            # A stream's order follows from the seed in processes of its own, new ones each epoch.
            workers = max(workers, 1)
            images.batch_size = batch_size
            if share:
                reader = images.source.dataset.reader
                reader.dist_rank, reader.dist_num_replicas = 0, 1
            images.source.dataset.set_loader_cfg(num_workers=workers)
            options["batch_size"] = batch_size
        else:
            options |= {"batch_sampler": batches, "persistent_workers": workers > 0}
        self._loader: DataLoader[Any] = DataLoader(images, num_workers=workers, **options)

    def start(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration begin at a batch of an epoch."""
        if isinstance(self.images, StreamedImages):
            self.images.epoch, self.images.skipped_batches = epoch, batch
            self.images.source.dataset.set_epoch(epoch)
            self.generator.manual_seed(derive(self.images.seed, epoch))
        elif isinstance(self.batches, TrainingBatches):
            self.batches.epoch, self.batches.first_batch = epoch, batch

    def close(self) -> None:
        """End the worker processes."""
        del self._loader

    def __iter__(self) -> Iterator[Batch]:
        batches: Iterable[Batch] = _received(self._loader)
        if self.share is not None:
            batches = _turns(batches, *self.share)
        elif isinstance(self.images, StreamedImages):
            rest = self.images.skipped_batches % self._loader.num_workers  # of a whole turn
            batches = itertools.islice(batches, rest, None)
        for batch in batches:
            if batch.problems and not self.skip_bad:
                raise UnreadableImage(
                    f"unreadable image: {batch.problems[0]} (--skip-bad skips and counts them)"
                )
            yield batch


#: How torch's messages begin. That of a transform's error says "Caught ... in DataLoader worker".
_DEATHS_OF_READERS = ("DataLoader worker (pid", "Pin memory thread exited")


def reader_died(error: BaseException) -> str:
    """Say what a user can do if a worker process was killed; "" for other errors."""
    if isinstance(error, RuntimeError) and str(error).startswith(_DEATHS_OF_READERS):
        return "a process that reads images was killed; is there enough memory? Try fewer --workers"
    return ""


def _received(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; if a worker was killed, the error that says so."""
    try:
        yield from batches
    except Exception:
        # A killed worker's sockets close before SIGCHLD comes, whose handler, torch's, raises here.
        time.sleep(1)
        raise


@atexit.register
def _kill_workers() -> None:
    """Kill workers that still run when this process ends.

    They ignore SIGTERM, with which multiprocessing ends them before it waits for them, and may
    themselves wait for a lock of one that was killed.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _ignore_signals(worker: int) -> None:
    """Let the main process alone answer SIGTERM and Ctrl-C, which may go to all of them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _turns(batches: Iterable[Batch], rank: int, world_size: int) -> Iterator[Batch]:
    """Every world_size-th batch; at the end, padding for those who have one less."""
    turn: list[Batch] = []
    for batch in batches:
        turn.append(batch)
        if len(turn) == world_size:
            yield turn[rank]
            turn = []
    if turn:
        padding = turn[0]._replace(targets=torch.full_like(turn[0].targets, NOT_COUNTED))
        yield turn[rank] if rank < len(turn) else padding._replace(problems=[])


def evaluation_loader(
    source: Source,
    transform: Transform,
    batch_size: int,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_bad: bool = False,
    pin_memory: bool = False,
) -> Loader:
    """Return the batches of this process's share of a source; leave out ``NOT_COUNTED`` targets.

    Args:
        source: From ``open_source``.
        transform: Makes a tensor [C, H, W] of a PIL image, such as ``eval_transform``.
        batch_size: Images per process and batch.
        workers: Processes that read images.
        rank: Of this process.
        world_size: Number of processes.
        skip_bad: Do not count unreadable images, listed in ``Batch.problems``, instead of raising
            ``UnreadableImage``.
        pin_memory: For copies to a GPU that do not wait.
    """
    options: dict[str, Any] = {"workers": workers, "skip_bad": skip_bad, "pin_memory": pin_memory}
    if source.streams:
        stream = StreamedImages(source, transform)
        return Loader(stream, None, batch_size=batch_size, share=(rank, world_size), **options)
    batches = EvaluationBatches(len(source), batch_size, rank, world_size)
    return Loader(Images(source, transform), batches, **options)

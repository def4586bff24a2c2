"""Batches follow from (seed, epoch, position), over any number of workers and processes."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossvit.evaluation import NOT_COUNTED
from crossvit.training import build
from crossvit.training.data import (
    Batch,
    Draw,
    EvaluationBatches,
    Images,
    Loader,
    StreamedImages,
    TrainingBatches,
    _turns,
    collate,
    evaluation_loader,
    reader_died,
)
from crossvit.training.recipes import IMAGENET
from crossvit.training.sources import open_source
from crossvit.transforms import eval_transform

pytestmark = pytest.mark.usefixtures("trainer")


def drawn(batches: TrainingBatches) -> list[list[Draw]]:
    return list(batches)


def test_an_epoch_has_each_image_once_and_an_order_of_its_own() -> None:
    batches = TrainingBatches(24, 8, seed=5)
    first = [draw.image for batch in drawn(batches) for draw in batch]
    assert sorted(first) == list(range(24))
    assert first == [
        draw.image for batch in drawn(TrainingBatches(24, 8, seed=5)) for draw in batch
    ]
    batches.epoch = 1
    assert first != [draw.image for batch in drawn(batches) for draw in batch]
    assert first != [
        draw.image for batch in drawn(TrainingBatches(24, 8, seed=6)) for draw in batch
    ]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_processes_share_each_global_batch(accumulation: int) -> None:
    """And what is left over at the end makes no step."""
    one = drawn(TrainingBatches(53, 4, accumulation))
    many = [drawn(TrainingBatches(53, 2, accumulation, rank=r, world_size=2)) for r in (0, 1)]
    assert len(one) == len(many[0]) == len(many[1]) == 53 // (4 * accumulation) * accumulation
    for whole, parts in zip(one, zip(*many, strict=True), strict=True):
        assert sorted(whole) == sorted(itertools.chain(*parts))


def test_an_epoch_continues_at_any_batch() -> None:
    batches = TrainingBatches(40, 4, 2)
    whole = drawn(batches)
    batches.first_batch = 3
    assert drawn(batches) == whole[3:] and len(batches) == len(whole) - 3


def test_repeated_augmentation() -> None:
    """Three draws of an image are neighbours, so they go to different processes."""
    draws = [draw for batch in drawn(TrainingBatches(30, 6, repeats=3)) for draw in batch]
    assert len(draws) == 30
    assert set(Counter(draw.image for draw in draws).values()) == {3}
    ranks = [drawn(TrainingBatches(30, 2, repeats=3, rank=r, world_size=3))[0] for r in range(3)]
    images = [{draw.image for draw in batch} for batch in ranks]
    assert images[0] == images[1] == images[2] and len(images[0]) == 2


@pytest.mark.parametrize("num_images", [1, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_an_evaluation_counts_each_image_once(num_images: int, world_size: int) -> None:
    shares = [list(EvaluationBatches(num_images, 3, r, world_size)) for r in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert {len(batch) for share in shares for batch in share} == {3}
    images = [draw.image for share in shares for batch in share for draw in batch]
    assert sorted(i for i in images if i >= 0) == list(range(num_images))


def training_batches(data: Path, workers: int, epoch: int, batch: int) -> list[Batch]:
    source = open_source(str(data), "train")
    images = Images(source, build.training_transform(IMAGENET, (24, 24)), seed=3)
    loader = Loader(images, TrainingBatches(len(source), 4, seed=3), workers=workers)
    loader.start(epoch, batch)
    try:
        return list(loader)
    finally:
        loader.close()


def test_augmentation_depends_on_the_position_alone(data: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    whole = training_batches(data, 0, epoch=1, batch=0)
    assert torch.equal(state, torch.get_rng_state())
    assert whole[0].images.dtype == torch.uint8 and len(whole) == 33 // 4
    torch.manual_seed(8)
    resumed = training_batches(data, 2, epoch=1, batch=5)
    for a, b in zip(whole[5:], resumed, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
    other = training_batches(data, 0, epoch=2, batch=0)
    assert not any(torch.equal(a.images, b.images) for a, b in zip(whole, other, strict=True))


def test_classes_missing_from_a_split_keep_their_numbers(data: Path, tmp_path: Path) -> None:
    (tmp_path / "val/class2").mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "val/class2/0.png")
    train = open_source(str(data), "train")
    val = open_source(str(tmp_path), "validation", class_to_index=train.class_to_index)
    (batch,) = evaluation_loader(val, eval_transform(24), 1)
    assert batch.targets.tolist() == [2]
    assert val.class_names == ["class0", "class1", "class2"]


def test_torchvision_data_sets(data: Path) -> None:
    named = open_source("torch/folder", "val", root=str(data / "val"))
    folder = open_source(str(data), "validation")
    assert (named.num_classes, named.class_names) == (3, folder.class_names)
    batches = [next(iter(evaluation_loader(s, eval_transform(24), 15))) for s in (named, folder)]
    assert torch.equal(batches[0].images, batches[1].images)
    assert torch.equal(batches[0].targets, batches[1].targets)


def test_grey_images(data: Path) -> None:
    source = open_source(str(data), "validation", in_chans=1)
    transform = eval_transform(24, mean=(0.5,), std=(0.25,))
    batch = next(iter(evaluation_loader(source, transform, 2)))
    assert batch.images.shape == (2, 1, 24, 24)
    with pytest.raises(ValueError, match="in_chans: expected 3"):
        open_source(str(data), in_chans=4)


def test_a_folder_of_unreadable_images_is_not_skipped_forever(tmp_path: Path) -> None:
    for c in ("a", "b"):
        (tmp_path / c).mkdir()
        (tmp_path / c / "0.png").write_bytes(b"no image")
    source = open_source(str(tmp_path), "train")
    images = Images(source, build.training_transform(IMAGENET, (24, 24)), replace=True)
    with pytest.raises(ValueError, match="unreadable images in a row"):
        images[Draw(0)]


def numbered(count: int) -> list[Batch]:
    """Batches with the targets 0, 1, 2, ..."""
    image = torch.zeros(3, 2, 2)
    return [Batch(image[None], torch.tensor([i]), [], torch.tensor([i])) for i in range(count)]


def test_an_error_of_a_transform_is_not_a_killed_worker(data: Path) -> None:
    loader = evaluation_loader(open_source(str(data / "val")), broken, 5, workers=1)
    with pytest.raises(RuntimeError, match="broken transform") as error:
        next(iter(loader))
    assert reader_died(error.value) == ""


def broken(image: Image.Image) -> torch.Tensor:
    raise RuntimeError("broken transform")


@pytest.mark.parametrize("count", range(1, 8))
def test_processes_take_turns_at_a_stream(count: int) -> None:
    shares = [list(_turns(numbered(count), rank, 3)) for rank in range(3)]
    targets = [batch.targets.item() for share in shares for batch in share]
    assert sorted(t for t in targets if t != NOT_COUNTED) == list(range(count))
    assert len({len(share) for share in shares}) == 1


def test_collate() -> None:
    from crossvit.training.data import Sample

    image = torch.zeros(3, 2, 2)
    batch = collate([Sample(image, 1, ["a"], 7), Sample(image, 2, ["b", "c"], 8)])
    assert batch.images.shape == (2, 3, 2, 2) and batch.problems == ["a", "b", "c"]
    assert batch.targets.tolist() == [1, 2] and batch.positions.tolist() == [7, 8]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four webdataset shards of six images."""
    pytest.importorskip("webdataset")
    generator = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for i in range(6):
                png = io.BytesIO()
                pixels = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(png, "png")
                for suffix, content in (("png", png.getvalue()), ("cls", b"%d" % (i % 2))):
                    entry = tarfile.TarInfo(f"{shard}-{i}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return tmp_path


def streamed(shards: Path, epoch: int, batch: int) -> list[Batch]:
    source = open_source(
        "wds/images", "train-{0..3}.tar|24", root=str(shards), training=True, batch_size=3
    )
    images = StreamedImages(source, build.training_transform(IMAGENET, (24, 24)), seed=3)
    loader = Loader(images, None, batch_size=3, workers=2)
    loader.start(epoch, batch)
    try:
        return list(loader)
    finally:
        loader.close()


@pytest.mark.slow
def test_a_stream_continues_at_any_batch(shards: Path) -> None:
    whole, resumed = streamed(shards, 1, 0), streamed(shards, 1, 3)
    assert len(whole) == 8
    for a, b in zip(whole[3:], resumed, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
    assert not torch.equal(whole[0].images, streamed(shards, 2, 0)[0].images)


def test_a_stream_is_evaluated_once(shards: Path) -> None:
    source = open_source("wds/images", "train-{0..3}.tar|24", root=str(shards))
    targets = Counter()
    for rank in range(2):
        loader = evaluation_loader(source, eval_transform(24), 4, rank=rank, world_size=2)
        targets.update(t for batch in loader for t in batch.targets.tolist() if t >= 0)
        loader.close()
    assert targets == {0: 12, 1: 12}

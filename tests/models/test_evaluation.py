"""Accuracy of a model and its branches, against sklearn, and over several processes."""

from __future__ import annotations

import math
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from crossvit import Config, CrossViT
from crossvit.evaluation import Accuracy, Evaluation, evaluate

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)


def tiny(num_classes: int = 7) -> CrossViT:
    torch.manual_seed(0)
    model = CrossViT(TINY, num_classes=num_classes, drop_path_rate=0.5, use_fused=True)
    for head in model.head:
        nn.init.normal_(head.weight)
    return model


def batches(images: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), targets.split(size), strict=True))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(23, 3, 48, 48), torch.randint(7, (23,))


class Given(nn.Module):
    """Returns the logits that it is given as images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_against_sklearn(data):
    metrics = pytest.importorskip("sklearn.metrics")
    images, targets = data
    model = tiny().eval()
    found = evaluate(model, batches(images, targets, 5))
    with torch.no_grad():
        logits = {
            "mean": model(images),
            **dict(zip(("small", "large"), model.forward_branches(images), strict=True)),
        }
    assert found.images == 23 and found.unreadable == 0
    for name, scores in logits.items():
        for k in (1, 5):
            expected = metrics.top_k_accuracy_score(targets, scores, k=k, labels=range(7))
            assert getattr(getattr(found, name), f"top{k}") == pytest.approx(100 * expected), name
    assert found.loss == pytest.approx(
        metrics.log_loss(targets, logits["mean"].double().softmax(1), labels=range(7)), rel=1e-5
    )
    assert len({found.mean, found.small, found.large}) == 3


def test_equal_logits_are_ranked_by_class():
    """A model that always says the same is right for one class only."""
    targets = torch.arange(8)
    found = evaluate(Given(), [(torch.zeros(8, 8), targets)])
    assert found.mean == Accuracy(100 / 8, 500 / 8)
    assert found.small is found.large is None
    assert found.loss == pytest.approx(math.log(8))


def test_fewer_than_five_classes():
    found = evaluate(Given(), [(torch.eye(3), torch.tensor([0, 1, 0]))])
    assert found.mean == Accuracy(pytest.approx(200 / 3), 100)


def test_images_that_do_not_count(data):
    images, targets = data
    expected = evaluate(tiny(), batches(images, targets, 23))
    padded = torch.cat([images, torch.full((2, 3, 48, 48), math.nan)])
    targets = torch.cat([targets, torch.tensor([-1, -1])])
    loader = [
        (*batch, ["a.png: truncated"] * (n == 0), torch.arange(4))
        for n, batch in enumerate(batches(padded, targets, 4))
    ]
    found = evaluate(tiny(), loader)
    assert found.unreadable == 1 and found.problems == ["a.png: truncated"]
    assert (found.images, found.mean, found.small) == (23, expected.mean, expected.small)
    assert found.loss == pytest.approx(expected.loss)


def test_the_model_is_left_as_it_was(data):
    model = tiny().train()
    model.norm.eval()
    before = [module.training for module in model.modules()]
    first, second = (evaluate(model, batches(*data, 8)) for _ in range(2))
    assert first == second
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="no labelled images"):
        evaluate(model, [])
    assert [module.training for module in model.modules()] == before


def test_autocast_and_wrappers(data):
    exact = evaluate(tiny(), batches(*data, 8))
    rounded = evaluate(tiny(), batches(*data, 8), dtype=torch.bfloat16)
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02) and rounded.loss != exact.loss
    assert evaluate(nn.DataParallel(tiny()), batches(*data, 8)) == exact
    assert evaluate(torch.compile(tiny(), backend="eager"), batches(*data, 8)) == exact
    eager = evaluate(tiny().set_fused(False), batches(*data, 8))
    assert eager.loss == pytest.approx(exact.loss, rel=1e-5)


def test_bad_input(data):
    images, targets = data
    with pytest.raises(ValueError, match="loader: has no labelled images; 2 could not be read"):
        evaluate(tiny(), [(images[:2], torch.tensor([-1, -1]), ["a", "b"])])
    for wrong in (7, -2):
        with pytest.raises(ValueError, match=f"target: expected .* from 0 to 6, or -1.* {wrong}"):
            evaluate(tiny(), [(images[:2], torch.tensor([0, wrong]))])
    with pytest.raises(ValueError, match="has no heads: num_classes is 0"):
        evaluate(CrossViT(TINY, num_classes=0), [(images, targets)])
    for bad in (math.nan, math.inf):
        logits = torch.eye(3)
        logits[1, 2] = bad
        with pytest.raises(ValueError, match="not finite for 1 of 3 images"):
            evaluate(Given(), [(logits, torch.arange(3))])


def share(rank: int, images: Tensor, targets: Tensor, size: int, padded: bool) -> list:
    """The batches of one of two processes, whose shares are of 17 and 6 images."""
    part = slice(17) if rank == 0 else slice(17, 23)
    loader = batches(images[part], targets[part], size)
    while padded and len(loader) < math.ceil(17 / size):
        loader.append((images[:1], torch.tensor([-1])))
    return loader


def worker(rank: int, store: str, expected: Evaluation, data: tuple[Tensor, Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        loader = share(rank, *data, 4, padded=False)
        check(evaluate(DistributedDataParallel(tiny()), loader), expected)
        check(evaluate(tiny(), loader if rank == 0 else [], distributed=True), None)
        alone = evaluate(tiny(), batches(*data, 4), distributed=False)
        check(alone, expected)
        sharded = tiny()
        mesh = init_device_mesh("cpu", (2,))
        for module in (*sharded.blocks, sharded):
            fully_shard(module, mesh=mesh)
        for _ in range(2):
            check(evaluate(sharded, share(rank, *data, 4, padded=True)), expected)
            sharded(data[0]).square().mean().backward()  # it can still be trained
        flat = FullyShardedDataParallel(tiny(), device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match="expected one sharded by fully_shard"):
            evaluate(flat, loader)
    finally:
        dist.destroy_process_group()


def check(found: Evaluation, expected: Evaluation | None) -> None:
    if expected is None:
        assert found.images == 17
        return
    assert found.images == expected.images
    for name in ("mean", "small", "large"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_count_each_image_once(data, cpu_backend: str) -> None:
    expected = evaluate(tiny(), batches(*data, 23))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(f"{folder}/store", expected, data), nprocs=2)

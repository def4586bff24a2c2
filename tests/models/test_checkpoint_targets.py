"""Loading into and saving from wrapped models."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from crossvit import Config, CrossViT, load_checkpoint, load_model, save_checkpoint

safetensors_torch = pytest.importorskip("safetensors.torch")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)


def tiny() -> CrossViT:
    return CrossViT(TINY, num_classes=5, cross_depth=2, reread_patches=True).eval()


def compiled_blocks(model: CrossViT) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0])
    return model


def checkpointed_blocks(model: CrossViT) -> nn.Module:
    model.blocks[0].blocks[1][0] = checkpoint_wrapper(model.blocks[0].blocks[1][0])
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


def sharded(model: CrossViT) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": checkpointed_blocks,
    "checkpointed": checkpoint_wrapper,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(compiled_blocks(model))),
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model)),
    "FSDP": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "FSDP2": sharded,
    "compiled FSDP2": lambda model: torch.compile(sharded(checkpointed_blocks(model))),
}


@contextlib.contextmanager
def one_process(folder: Path):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.filterwarnings("ignore")  # torch's own, of FSDP on a CPU
def test_wrapped_models(name, tmp_path):
    torch.manual_seed(0)
    model = tiny()
    with one_process(tmp_path) if "D" in name else contextlib.nullcontext():
        wrapped = WRAPPERS[name](tiny())
        assert load_checkpoint(wrapped, model.state_dict()) is wrapped
        save_checkpoint(wrapped, tmp_path / "a.safetensors")
        broken = {
            **model.state_dict(),
            "norm.0.weight": torch.zeros(3),
            "norm.1.bias": torch.ones(64),
        }
        with pytest.raises(ValueError, match=r"norm\.0\.weight: found \[3\]"):
            load_checkpoint(wrapped, broken)
        save_checkpoint(wrapped, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        saved = safetensors_torch.load_file(tmp_path / f"{name}.safetensors")
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(t, saved[key]) for key, t in model.state_dict().items())
    loaded = load_model(tmp_path / "a.safetensors")
    assert loaded.config == dataclasses.replace(TINY, cross_depth=2, reread_patches=True)


@pytest.mark.filterwarnings("ignore")
def test_dtensors_as_a_source(tmp_path):
    model = tiny()
    expected = {key: t.clone() for key, t in model.state_dict().items()}
    with one_process(tmp_path):
        state = sharded(model).state_dict()
        assert type(state["norm.0.weight"]).__name__ == "DTensor"
        loaded = load_checkpoint(tiny(), state)
    assert all(torch.equal(t, expected[key]) for key, t in loaded.state_dict().items())


class Lit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()


def test_what_is_no_crossvit():
    for model, message in (
        (nn.Linear(2, 2), "found torch.nn.modules.linear.Linear"),
        (Lit(), r"Lit, which has one at \.net"),
        (torch.compile(nn.Linear(2, 2)), "found torch._dynamo"),
        (tiny().state_dict(), "OrderedDict"),
        (CrossViT, "the class"),
        (None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"model: expected a CrossViT.*{message}|{message}"):
            load_checkpoint(model, {})
        with pytest.raises(TypeError, match=message):
            save_checkpoint(model, "a.safetensors")


@pytest.mark.parametrize("source", [None, 3, b"a.pth", ["a.pth"], tiny()])
def test_what_is_no_source(source):
    with pytest.raises(TypeError, match="source: expected a path, a URL, a hub id"):
        load_checkpoint(tiny(), source)
    with pytest.raises(TypeError, match="source: expected"):
        load_model(source)

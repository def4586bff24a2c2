"""Checkpoints in the three layouts, misfits, and damaged files."""

from __future__ import annotations

import http.server
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crossvit import Config, CrossViT, create_model, load_checkpoint, load_model, save_checkpoint
from crossvit import checkpoint_files as files

safetensors_torch = pytest.importorskip("safetensors.torch")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)


def tiny(**changes) -> CrossViT:
    return CrossViT(TINY, **{"num_classes": 5, **changes}).eval()


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert to the names of the official release."""
    return {re.sub(r"^(pos_embed|cls_token)_", r"\1.", key): t for key, t in state.items()}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CrossViT, Path]:
    model, path = tiny(), tmp_path / "model.safetensors"
    save_checkpoint(model, path)
    return model, path


def assert_same(a: CrossViT, b: CrossViT) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, t in a.state_dict().items():
        assert torch.equal(t, b.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("official.pth", lambda state: {"model": official(state)}),
        ("bare.pth", official),
        ("pytorch_model.bin", lambda state: state),
        (
            "training.pt",
            lambda s: {"state_dict": {f"module.{k}": s[k] for k in s}, "epoch": 3},
        ),
        ("compiled.pt", lambda state: {f"_orig_mod.{k}": t for k, t in state.items()}),
        (
            "indexed.pth",
            lambda s: {re.sub(r"(fusion\.[01])\.", r"\1.0.", k): t for k, t in s.items()},
        ),
    ],
)
def test_layouts_of_torch_files(name, wrap, tmp_path):
    model = tiny()
    torch.save(wrap(model.state_dict()), tmp_path / name)
    assert_same(load_checkpoint(tiny(), tmp_path / name), model)


def test_timm_safetensors(tmp_path):
    model = tiny()
    safetensors_torch.save_file(model.state_dict(), tmp_path / "timm.safetensors")
    assert_same(load_checkpoint(tiny(), str(tmp_path / "timm.safetensors")), model)


def test_a_state_dict_and_other_dtypes():
    model = tiny()
    loaded = load_checkpoint(tiny().bfloat16(), model.state_dict())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_same(loaded, model.bfloat16())


def test_our_own_file_describes_its_model(tmp_path):
    path = tmp_path / "model.safetensors"
    model = CrossViT(
        TINY, num_classes=0, in_chans=1, qkv_bias=False, cross_depth=2, reread_patches=True,
        img_size=((24, 36), (32, 48)),
    )  # fmt: skip
    save_checkpoint(model, path)
    loaded = load_model(path, use_fused=True)
    assert loaded.use_fused and loaded.config == model.config and loaded.in_chans == 1
    assert_same(loaded, model)
    assert load_model(path, num_classes=7, replace_head=True).num_classes == 7
    x = torch.randn(1, 1, 24, 36)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="does not describe"):
        load_model(tmp_path / "plain.pth")


def test_url_and_hub_id(saved, monkeypatch, tmp_path):
    model, path = saved
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert_same(load_checkpoint(tiny(), path.as_uri()), model)
    cached = list((tmp_path / "hub/checkpoints").iterdir())
    assert len(cached) == 1
    path.rename(tmp_path / "gone.safetensors")
    assert_same(load_checkpoint(tiny(), path.as_uri()), model)  # from the cache

    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError

    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        if name != "pytorch_model.bin":
            raise EntryNotFoundError("no such entry")
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert_same(load_checkpoint(tiny(), "hf_hub:timm/crossvit_tiny.in1k"), model)
    assert asked[0] == ("timm/crossvit_tiny.in1k", "model.safetensors")


class BreaksOff(http.server.BaseHTTPRequestHandler):
    """Sends half of the announced length."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(2 * len(self.server.half)))
        self.end_headers()
        self.wfile.write(self.server.half)

    def log_message(self, *args):
        pass


def test_half_a_download_is_not_kept(saved, monkeypatch, tmp_path):
    _, path = saved
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with http.server.HTTPServer(("127.0.0.1", 0), BreaksOff) as server:
        content = path.read_bytes()
        server.half = content[: len(content) // 2]
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ValueError, match="truncated, or no checkpoint"):
            load_checkpoint(tiny(), f"http://127.0.0.1:{server.server_port}/m.safetensors")
        thread.join()
    assert not list((tmp_path / "hub/checkpoints").iterdir())


def test_what_is_nowhere():
    with pytest.raises(FileNotFoundError, match="neither a URL nor a hub id"):
        load_checkpoint(tiny(), "weights/missing.pth")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.95])
def test_a_truncated_file_says_so(saved, tmp_path, suffix, keep):
    model, path = saved
    if suffix == "pth":
        path = tmp_path / "model.pth"
        torch.save(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match="truncated, or no checkpoint"):
        load_checkpoint(tiny(), path)


@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_page_is_no_checkpoint(tmp_path, text):
    (tmp_path / "page.pth").write_text(text)
    with pytest.raises(ValueError, match="truncated, or no checkpoint"):
        load_checkpoint(tiny(), tmp_path / "page.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_code_is_never_run(tmp_path):
    with (tmp_path / "evil.pth").open("wb") as file:
        pickle.dump({"model": Evil()}, file, protocol=2)
    torch.save({"model": Evil()}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        with pytest.raises(ValueError, match=r"could run code: posix\.system$"):
            load_checkpoint(tiny(), tmp_path / name)


def test_all_that_does_not_fit_is_listed():
    model = tiny()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    state = {key: torch.ones_like(t) for key, t in before.items()}
    del state["norm.0.weight"], state["pos_embed_1"]
    state["norm.1.bias"] = torch.zeros(3)
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, state)
    assert str(error.value).splitlines()[1:] == [
        "  missing: pos_embed_1",
        "  missing: norm.0.weight",
        "  unexpected: extra",
        "  norm.1.bias: found [3], expected [64]",
    ]
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.raises(ValueError, match="other things: epoch"):
        load_checkpoint(model, {**state, "epoch": 3})
    with pytest.raises(ValueError, match="nothing"):
        load_checkpoint(model, {})
    for key, t in (("pos_embed_0", torch.zeros(1, 1, 32)), ("head.0.weight", torch.tensor(1.0))):
        with pytest.raises(ValueError, match=rf"{key}: found"):
            load_checkpoint(model, {**before, key: t})


def test_heads():
    state = tiny(num_classes=3).state_dict()
    model = tiny()
    own = model.head[0].weight.clone()
    with pytest.raises(ValueError, match=r"3 classes, the model 5.*replace_head=True"):
        load_checkpoint(model, state)
    load_checkpoint(model, state, replace_head=True)
    assert torch.equal(model.head[0].weight, own)
    assert torch.equal(model.norm[0].weight, state["norm.0.weight"])
    load_checkpoint(tiny(num_classes=0), state)
    headless = tiny(num_classes=0).state_dict()
    with pytest.raises(ValueError, match=r"missing: head\.0\.weight"):
        load_checkpoint(tiny(), headless)
    load_checkpoint(tiny(), headless, replace_head=True)


def test_position_embeddings_are_resized(saved, tmp_path):
    model, path = saved
    larger = load_checkpoint(tiny(img_size=(96, 72)), path)
    x = torch.randn(1, 3, 96, 72)
    assert larger(x).isfinite().all()
    for b, (height, width) in enumerate(larger.grid_sizes):
        old = model.get_parameter(f"pos_embed_{b}")[:, 1:].unflatten(1, model.grid_sizes[b])
        expected = torch.nn.functional.interpolate(
            old.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True
        )
        new = larger.get_parameter(f"pos_embed_{b}")[:, 1:].unflatten(1, (height, width))
        torch.testing.assert_close(new.permute(0, 3, 1, 2), expected)
    # Non-square to non-square: our files and state dicts record their grid, others need grid_sizes.
    save_checkpoint(larger, tmp_path / "larger.safetensors")
    turned = load_checkpoint(tiny(img_size=(72, 96)), tmp_path / "larger.safetensors")
    assert not torch.equal(turned.pos_embed_0, larger.pos_embed_0)
    noted = load_checkpoint(tiny(img_size=(72, 96)), larger.state_dict())
    assert torch.equal(noted.pos_embed_0, turned.pos_embed_0)
    state = dict(larger.state_dict())
    with pytest.raises(ValueError, match="grid_sizes"):
        load_checkpoint(tiny(), state)
    told = load_checkpoint(tiny(img_size=(72, 96)), state, grid_sizes=larger.grid_sizes)
    assert torch.equal(told.pos_embed_0, turned.pos_embed_0)


def test_save_is_all_or_nothing(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(fd):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="safetensors"):
        save_checkpoint(model, path.with_suffix(".pth"))


def test_saved_files_have_ordinary_permissions(saved):
    _, path = saved
    (ordinary := path.with_name("ordinary")).touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_missing_packages_are_named(saved, monkeypatch):
    model, path = saved
    for module in ("safetensors", "huggingface_hub"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    for call in (
        lambda: load_checkpoint(model, path),
        lambda: save_checkpoint(model, path),
        lambda: files.locate("timm/crossvit_15_240.in1k"),
    ):
        with pytest.raises(ImportError, match=r"pip install 'crossvit-kernels\[checkpoints\]'"):
            call()


TIMM_MODELS = [
    *(f"crossvit_{n}_240" for n in ("tiny", "small", "base", "9", "15", "18")),
    *(f"crossvit_{n}_dagger_240" for n in ("9", "15", "18")),
    *(f"crossvit_{n}_dagger_408" for n in ("15", "18")),
]


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_agrees_with_timm(name, tmp_path):
    """Logits within 1e-5; gradients within 1e-4 of their RMS and 1e-5 of the median parameter's.

    From timm's own file in both of its formats.
    """
    timm = pytest.importorskip("timm")
    assert set(TIMM_MODELS) == set(timm.list_models("crossvit*"))
    theirs = timm.create_model(name).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    path = tmp_path / ("model.safetensors" if "dagger" in name else "pytorch_model.bin")
    if path.suffix == ".bin":
        torch.save(theirs.state_dict(), path)
    else:
        safetensors_torch.save_file(theirs.state_dict(), path)
    ours = load_checkpoint(create_model(name, use_fused=True), path).eval()
    x = torch.randn(1, 3, *ours.patch_embed[0].img_size)
    logits = [model(x) for model in (ours, theirs)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    upstream = torch.randn_like(logits[0])
    gradients = [
        torch.autograd.grad(y, list(model.parameters()), upstream)
        for y, model in zip(logits, (ours, theirs), strict=True)
    ]
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    typical = sorted(g.square().mean().sqrt().item() for g in gradients[1])[len(names) // 2]
    for name, ours, other in zip(names, *gradients, strict=True):
        # Both are float32, with rounding errors; a key bias's exact gradient is zero.
        difference = (ours - other).square().mean().sqrt().item()
        assert difference <= 1e-4 * other.square().mean().sqrt().item() + 1e-5 * typical, name

"""Heads, image sizes and pooling changed after a model is made; the hub; torch.hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import crossvit
import crossvit_kernels as ck
from crossvit import (
    Config,
    CrossViT,
    VisionTransformer,
    create_model,
    list_models,
    load_checkpoint,
    save_checkpoint,
)
from crossvit.configs import named_config
from crossvit.conventions import architecture

ROOT = Path(__file__).resolve().parents[2]
TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 2), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)


def test_versions():
    assert crossvit.__version__ == ck.__version__
    citation = ROOT / "CITATION.cff"
    if citation.exists():
        assert f"\nversion: {ck.__version__}\n" in citation.read_text()


def test_architectures():
    for name in list_models():
        assert architecture(named_config(name)) == name
    assert architecture(TINY) is None
    assert CrossViT("crossvit_9", img_size=96).pretrained_cfg["architecture"] == "crossvit_9_240"
    assert CrossViT("crossvit_tiny", num_heads=[3, 3]).pretrained_cfg["tag"] == "in1k"


@pytest.mark.parametrize("size", [96, (48, 96), ((96, 72), (64, 48))])
@pytest.mark.parametrize("use_fused", [True, False])
def test_another_input_size(size, use_fused):
    """As a model of that size with the same weights."""
    model = CrossViT(TINY, num_classes=5, use_fused=use_fused)
    model.pos_embed_1.requires_grad_(False)
    expected = CrossViT(TINY, num_classes=5, img_size=size, use_fused=use_fused)
    load_checkpoint(expected, model.state_dict())
    model.set_input_size(size)
    assert model.config == expected.config and model.grid_sizes == expected.grid_sizes
    assert not model.pos_embed_1.requires_grad and model.pos_embed_0.requires_grad
    x = torch.randn(2, 3, 60, 60)
    assert torch.equal(model(x), expected(x))
    with pytest.raises(ValueError, match="img_size"):
        model.set_input_size(0)
    assert model.config == expected.config and torch.equal(model(x), expected(x))


def test_another_input_size_of_a_vision_transformer():
    model = VisionTransformer("deit_tiny_patch16_224", depth=1)
    model.set_input_size((64, 96))
    assert model.grid_sizes == [(4, 6)] and model(torch.randn(1, 3, 64, 96)).shape == (1, 1000)
    with pytest.raises(ValueError, match="global_pool: expected 'token', found 'avg'"):
        model.reset_classifier(3, "avg")


@pytest.mark.parametrize("use_fused", [True, False])
def test_average_pooling(use_fused, tmp_path):
    pytest.importorskip("safetensors")
    model = CrossViT(TINY, num_classes=5, use_fused=use_fused).eval()
    x = torch.randn(2, 3, 48, 48)
    logits = model(x)
    model.reset_classifier(7, "avg")
    patches = [tokens[:, 1:] for tokens in model.forward_features(x)]
    heads = [head(t.mean(dim=1)) for head, t in zip(model.head, patches, strict=True)]
    torch.testing.assert_close(model(x), sum(heads) / 2)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    torch.testing.assert_close(sum(model.forward_branches(x)) / 2, model(x))
    save_checkpoint(model, tmp_path / "avg.safetensors")
    loaded = CrossViT.from_pretrained(tmp_path / "avg.safetensors", use_fused=use_fused)
    assert loaded.global_pool == "avg" and torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="global_pool: the checkpoint's is 'avg', the model's 'to"):
        load_checkpoint(CrossViT(TINY, num_classes=7), tmp_path / "avg.safetensors")
    model.reset_classifier(5, "token")
    assert model(x).shape == logits.shape
    with pytest.raises(ValueError, match="global_pool: expected 'token' or 'avg', found 'max'"):
        model.reset_classifier(5, "max")
    with pytest.raises(ValueError, match="global_pool: expected 'avg', found 'token'"):
        CrossViT(TINY, cls_token=False, global_pool="token")


def test_arguments_of_the_wrong_function():
    with pytest.raises(TypeError, match=r"CrossViT: pretrained is an argument of crossvit"):
        CrossViT("crossvit_9", pretrained=True)
    with pytest.raises(TypeError, match=r"unknown argument 'img_sizes'; did you mean img_size\?"):
        create_model("crossvit_9", img_sizes=96)
    with pytest.raises(TypeError, match="VisionTransformer: unknown argument 'dept'; did you mean"):
        create_model("deit_tiny_patch16_224", dept=3)
    for pretrained in (1, None):
        with pytest.raises(TypeError, match="pretrained: expected a bool or string"):
            create_model("crossvit_9", pretrained=pretrained)
    with pytest.raises(TypeError, match="pretrained: needs the name of a model, found Config"):
        create_model(TINY, pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        create_model(TINY, checkpoint_path="nowhere.pth")


# The hub


def test_a_repository(tmp_path, monkeypatch):
    """Uploaded, and loaded from a revision; the hub is a folder here."""
    pytest.importorskip("safetensors")
    hub = pytest.importorskip("huggingface_hub")
    model = CrossViT(TINY, num_classes=5).eval()
    calls = []

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append((repo_id, options["revision"]))
            for file in Path(folder_path).iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            return "https://huggingface.co/commit"

    def download(repository, name, **options):
        calls.append((repository, options))
        return tmp_path / name

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path))
    url = model.push_to_hub("mine", private=True, token="secret", branch="new")
    assert url == "https://huggingface.co/commit" and calls == [("me/mine", "new")]
    card = (tmp_path / "README.md").read_text()
    assert 'CrossViT.from_pretrained("me/mine")' in card and "48 x 48" in card
    loaded = CrossViT.from_pretrained("me/mine", revision="new", token="secret", use_fused=True)
    assert calls[1] == ("me/mine", {"revision": "new", "token": "secret"})
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert not loaded.training and loaded.use_fused
    with pytest.raises(ValueError, match="expected a VisionTransformer, found a CrossViT"):
        VisionTransformer.from_pretrained(tmp_path)


def test_timms_repositories_need_no_name(monkeypatch, tmp_path):
    """Their files do not describe the model; the hub id does."""
    safetensors = pytest.importorskip("safetensors.torch")
    from crossvit import checkpoint_files

    model = create_model("crossvit_tiny", img_size=48)
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(checkpoint_files, "locate", lambda *_, **__: path)
    loaded = CrossViT.from_pretrained("timm/crossvit_tiny_240.in1k", img_size=48)
    assert torch.equal(loaded.norm[1].weight, model.norm[1].weight)


def test_without_a_network(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"timm/crossvit_9_240\.in1k: not in the cache"):
        CrossViT.from_pretrained("timm/crossvit_9_240.in1k", cache_dir=tmp_path)


@pytest.mark.skipif(not (ROOT / "hubconf.py").exists(), reason="an installation without the source")
def test_torch_hub():
    found = {}
    exec((ROOT / "hubconf.py").read_text(), found)
    public = [name for name, thing in found.items() if callable(thing) and name[0] != "_"]
    assert public == list_models()
    model = torch.hub.load(
        str(ROOT), "crossvit_tiny_240", source="local", img_size=48, num_classes=3
    )
    assert isinstance(model, CrossViT) and model.num_classes == 3
    assert "pretrained: Load" in found["crossvit_9_240"].__doc__

"""Names and their aliases, released weights, and models of checkpoints."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from crossvit import (
    Config,
    CrossViT,
    create_model,
    list_models,
    load_model,
    official_url,
    read_class_names,
    save_checkpoint,
)
from crossvit import checkpoint_files as files
from crossvit.configs import canonical_name, named_config
from crossvit.pretrained import released_weights

pytest.importorskip("safetensors")

SIZES = {
    "dims": (32, 64),
    "num_heads": (2, 2),
    "depths": (1, 1),
    "mlp_ratios": (2.0, 2.0),
    "num_blocks": 1,
    "img_size": 48,
}
TINY = Config(**SIZES)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("crossvit_15", "crossvit_15_240"),
        ("crossvit_15_224", "crossvit_15_240"),
        ("crossvit_15_240.in1k", "crossvit_15_240"),
        ("crossvit_15_dagger_384", "crossvit_15_dagger_408"),
        ("crossvit_18_dagger_480", "crossvit_18_dagger_504"),
        ("timm/crossvit_9_dagger_240.in1k", "crossvit_9_dagger_240"),
        ("hf_hub:timm/crossvit_9_240.in1k", "crossvit_9_240"),
        ("hf-hub:timm/crossvit_tiny_240", "crossvit_tiny_240"),
        ("crossvit_small_class_224", "crossvit_small_class_240"),
        ("crossvit_small_patch8", "crossvit_small_patch8_224"),
        ("timm/deit_tiny_patch16_224.fb_in1k", "deit_tiny_patch16_224"),
        ("deit_base_patch16", "deit_base_patch16_224"),
    ],
)
def test_aliases(alias, name):
    assert canonical_name(alias) == name
    assert named_config(alias) is named_config(name)


def test_every_name_stands_for_itself():
    assert [canonical_name(name) for name in list_models()] == list_models()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("crossvit_15_dager_240", "crossvit_15_dagger_240"),
        ("CrossViT_18_224", "crossvit_18_240"),
        ("crossvit_9_240.in22k", "crossvit_9_240"),
        ("crosvit_small", "crossvit_small_240"),
    ],
)
def test_unknown_names_get_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"unknown model '{re.escape(name)}'") as raised:
        create_model(name)
    assert meant in str(raised.value).split("did you mean ")[1]


def test_names_that_resemble_none():
    with pytest.raises(ValueError, match=r"unknown model 'resnet50': crossvit\.list_mod"):
        create_model("resnet50")
    with pytest.raises(TypeError, match="name: expected a string, found int"):
        create_model(15)


def test_released_weights():
    assert official_url("crossvit_15_dagger_408").endswith("weights-0.1/crossvit_15_dagger_384.pth")
    assert official_url("crossvit_9_224").endswith("/crossvit_9_224.pth")
    assert released_weights("crossvit_9_224") == "timm/crossvit_9_240.in1k"
    assert released_weights("crossvit_9.in1k", "timm") == "timm/crossvit_9_240.in1k"
    with pytest.raises(ValueError, match=r"resize those of crossvit_tiny_240 with img_size=408"):
        official_url("crossvit_tiny_384")
    with pytest.raises(ValueError, match=r"those of crossvit_15_dagger_408 with img_size=504"):
        create_model("crossvit_15_dagger_504", pretrained=True)
    with pytest.raises(ValueError, match="pretrained: expected True, False, 'timm' or 'official'"):
        create_model("crossvit_9", pretrained="mine.pth")
    with pytest.raises(ValueError, match="in_chans: the pretrained weights are for 3, found 1"):
        create_model("crossvit_9", pretrained=True, in_chans=1)


def test_released_weights_are_those_of_timm():
    pytest.importorskip("timm")
    from timm.models import get_pretrained_cfg, list_pretrained

    theirs = set()
    deit = [f"{name}.fb_in1k" for name in list_models("deit*")]
    for name in (*list_pretrained("crossvit*"), *deit):
        theirs.add(get_pretrained_cfg(name).hf_hub_id)
        assert released_weights(name) == get_pretrained_cfg(name).hf_hub_id
    for name in deit:
        assert official_url(name) == get_pretrained_cfg(name).url
    ours = set()
    for name in list_models():
        with contextlib.suppress(ValueError):
            ours.add(released_weights(name))
    assert ours == theirs


@pytest.fixture
def served(monkeypatch, tmp_path):
    """The hub and the authors' server, which have one model's weights under any name."""
    sources = []
    path = tmp_path / "released.safetensors"
    model = CrossViT(TINY, num_classes=1000)
    save_checkpoint(model, path)

    def locate(source):
        if source != path:
            sources.append(source)
        return path

    monkeypatch.setattr(files, "locate", locate)
    return model, sources


def test_pretrained_models(served):
    released, sources = served
    model = create_model("crossvit_tiny_224", pretrained=True, **SIZES)
    assert sources == ["timm/crossvit_tiny_240.in1k"]
    for key, t in released.state_dict().items():
        assert torch.equal(t, model.state_dict()[key]), key
    create_model("crossvit_tiny_240.in1k", pretrained="official", **SIZES)
    assert sources[1] == official_url("crossvit_tiny")
    create_model("crossvit_tiny", pretrained=False, **SIZES)
    assert len(sources) == 2


def test_pretrained_models_of_other_sizes_and_classes(served):
    released, _ = served
    larger = {**SIZES, "img_size": 96}
    model = create_model("crossvit_tiny", True, pretrained=True, num_classes=3, **larger)
    assert model.use_fused and model.pos_embed_0.shape[1] == 1 + 8 * 8
    assert torch.equal(model.norm[0].weight, released.norm[0].weight)
    assert torch.equal(model.cls_token_0, released.cls_token_0)
    assert [len(head.weight) for head in model.head] == [3, 3]
    features = create_model("crossvit_tiny", pretrained=True, num_classes=0, **SIZES)
    assert torch.equal(features.cls_token_0, released.cls_token_0)


def test_pretrained_without_a_network(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"timm/crossvit_9_240\.in1k: not in the cache"):
        create_model("crossvit_9", pretrained=True)


# Models of checkpoints


def test_the_number_of_classes_is_the_checkpoints(tmp_path):
    """Also for files that do not describe their model."""
    model = CrossViT(TINY, num_classes=7)
    torch.save({"model": {f"module.{k}": t for k, t in model.state_dict().items()}}, tmp_path / "a")
    loaded = load_model(tmp_path / "a", name=TINY, use_fused=True)
    assert loaded.num_classes == 7 and loaded.use_fused
    assert torch.equal(loaded.head[1].weight, model.head[1].weight)
    with pytest.raises(ValueError, match="has 7 classes, the model 5"):
        load_model(tmp_path / "a", name=TINY, num_classes=5)
    assert load_model(tmp_path / "a", name=TINY, num_classes=5, replace_head=True).num_classes == 5
    with pytest.raises(ValueError, match=r'does not describe its model: .*name="crossvit_15_240"'):
        load_model(tmp_path / "a")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_model(tmp_path / "a", name=Config(**{**SIZES, "dims": (64, 64)}))
    headless = {k: t for k, t in model.state_dict().items() if not k.startswith("head.")}
    torch.save(headless, tmp_path / "b")
    assert load_model(tmp_path / "b", name=TINY).num_classes == 0


def test_a_name_comes_before_the_files_description(tmp_path):
    model = CrossViT(TINY, num_classes=7, in_chans=1)
    save_checkpoint(model, tmp_path / "a.safetensors")
    larger = Config(**{**SIZES, "img_size": 96})
    loaded = load_model(tmp_path / "a.safetensors", name=larger)
    assert loaded.config == larger and (loaded.num_classes, loaded.in_chans) == (7, 1)


def test_class_names(tmp_path):
    model, path = CrossViT(TINY, num_classes=3), tmp_path / "a.safetensors"
    save_checkpoint(model, path)
    assert read_class_names(path) is None
    names = ["café", "b,c", "d"]
    save_checkpoint(model, path, class_names=names)
    assert read_class_names(path) == names and load_model(path).num_classes == 3
    with pytest.raises(ValueError, match="class_names: expected 3, one for each class, found 2"):
        save_checkpoint(model, path, class_names=names[:2])
    from safetensors.torch import save_file

    for text in ("[1]", "{", "3"):
        save_file({"x": torch.ones(1)}, path, {"class_names": text})
        with pytest.raises(ValueError, match="the names of its classes are damaged"):
            read_class_names(path)


def test_equal_models_make_equal_files(tmp_path):
    model = CrossViT(TINY, num_classes=2)
    path = tmp_path / "a.safetensors"
    contents = set()
    for _ in range(8):
        save_checkpoint(model, path, class_names=["é", "b"])
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert int.from_bytes(contents.pop()[:8], "little") % 8 == 0
    assert read_class_names(path) == ["é", "b"]
    assert torch.equal(load_model(path).head[0].weight, model.head[0].weight)

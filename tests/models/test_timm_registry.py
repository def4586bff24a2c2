"""The models in timm's registry, optimizers and data configuration, against timm's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

timm = pytest.importorskip("timm")

from timm.models import _registry  # noqa: E402

import crossvit.timm  # noqa: E402
from crossvit import CrossViT, VisionTransformer, create_model, list_models  # noqa: E402

FUSED = "crossvit_9_240.fused_in1k"
SMALL = {"img_size": 48, "num_blocks": 1, "dims": (32, 64), "num_classes": 5}


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Our names, which leave timm's registry after these tests."""
    tables = [t for t in vars(_registry).values() if isinstance(t, (dict, set))]
    modules = [timm.models.crossvit, timm.models.deit]
    tables += [t for module in modules for t in (vars(module)["default_cfgs"],)]
    before = [copy.deepcopy(dict(t) if isinstance(t, dict) else set(t)) for t in tables]
    names = crossvit.timm.register()
    yield names
    for table, saved in zip(tables, before, strict=True):
        table.clear()
        table.update(saved)


def test_names(registered):
    assert crossvit.timm.register() == registered
    assert sorted(name.partition(".")[0] for name in registered) == sorted(list_models())
    assert set(registered) < set(timm.list_models(include_tags=True))
    pretrained = timm.list_pretrained("crossvit*")
    assert FUSED in pretrained and "crossvit_9_240.in1k" in pretrained
    assert "crossvit_small_class_240.fused" not in pretrained


def test_names_without_our_tag_stay_timms():
    for name in ("crossvit_9_240", "crossvit_9_240.in1k"):
        assert isinstance(timm.create_model(name), timm.models.crossvit.CrossVit)
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("crossvit_9_240.fused_x")
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("crossvit_10_240.fused")
    with pytest.raises(TypeError, match="unknown argument 'pos_drop'; did you mean pos_drop_rate"):
        timm.create_model(FUSED, pos_drop=0.1)


def test_equal_to_timms_model(monkeypatch):
    """With the weights of timm's hub id, which are timm's model here; its head and size changed."""
    theirs = timm.create_model("crossvit_9_240").eval()
    asked = []

    def download(hub_id, **options):
        asked.append(hub_id)
        return theirs.state_dict()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    ours = timm.create_model(FUSED, pretrained=True).eval()
    assert isinstance(ours, CrossViT) and ours.use_fused
    assert asked == ["timm/crossvit_9_240.in1k"]
    x = torch.randn(1, 3, 240, 240)
    for global_pool in ("token", "avg"):
        for model in (theirs, ours):
            model.global_pool = global_pool
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    other = timm.create_model(
        FUSED, pretrained=True, num_classes=3, in_chans=1, img_size=96, use_fused=False
    )
    assert not other.use_fused and other.head[0].weight.shape == (3, 128)
    assert other.pos_embed_0.shape == (1, 1 + 8 * 8, 128)
    torch.testing.assert_close(
        other.patch_embed[0].proj.weight,
        theirs.patch_embed[0].proj.weight.sum(dim=1, keepdim=True),
    )


def test_layer_decay_is_timms():
    """Every parameter gets timm's learning rate and weight decay."""
    from timm.optim import param_groups_layer_decay

    found = []
    for name in (FUSED, "crossvit_9_240"):
        model = timm.create_model(name)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = param_groups_layer_decay(
            model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
        )
        found.append(
            {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        )
    assert found[0] == found[1]
    assert found[0]["pos_embed_0"][0] < found[0]["blocks.2.fusion.0.attn.wq.weight"][0] < 1


def test_data_configuration():
    config = timm.data.resolve_model_data_config
    for name in ("crossvit_9_240", "crossvit_15_dagger_408", "deit_tiny_patch16_224"):
        with torch.device("meta"):
            ours = create_model(name)
        theirs = timm.models.get_pretrained_cfg(name).to_dict()
        assert config(ours) == config(SimpleNamespace(pretrained_cfg=theirs))
        for key in ("architecture", "tag", "hf_hub_id", "first_conv", "classifier"):
            assert ours.pretrained_cfg[key] == theirs[key], key
    model = CrossViT("crossvit_9", **{**SMALL, "img_size": (256, 320)}, in_chans=1)
    assert config(model)["input_size"] == (1, 264, 324)
    model.set_input_size(96)
    assert config(model)["input_size"] == (1, 96, 96)
    assert "hf_hub_id" not in model.pretrained_cfg


def test_backbones():
    theirs = timm.create_model("crossvit_9_240", features_only=True).eval()
    x = torch.randn(1, 3, 240, 240)
    for ours in (
        timm.create_model(FUSED, features_only=True),
        create_model("crossvit_9_240", use_fused=True, features_only=True),
    ):
        ours.eval().load_state_dict(theirs.state_dict())
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction()[0] == theirs.feature_info.reduction()[0]
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    ours = create_model("crossvit_9", features_only=True, out_indices=[0, 4], img_size=48)
    assert [list(f.shape[1:]) for f in ours(x)] == [[128, 4, 4], [256, 3, 3]]
    with pytest.raises(ValueError, match="out_indices=3: expected features_only=True"):
        create_model("crossvit_9", out_indices=3)


def test_architectures_that_timm_does_not_have():
    model = timm.create_model("crossvit_small_class_240", img_size=48, num_blocks=1)
    assert model.config.fusion == "class" and model.use_fused
    model = timm.create_model("crossvit_small_patch8_224.fused", num_blocks=1)
    assert model.config.img_size == ((224, 224), (224, 224))
    model = timm.create_model("deit_tiny_patch16_224.fused_fb_in1k", depth=1, dtype=torch.bfloat16)
    assert isinstance(model, VisionTransformer) and model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "qkv_bias": False, "global_pool": "avg"}])
def test_a_saved_model_in_timm(tmp_path, options):
    pytest.importorskip("safetensors")
    model = CrossViT("crossvit_9", **options).eval()
    model.save_pretrained(tmp_path, class_names=list("abcde"))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert loaded.use_fused and loaded.config == model.config
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    config = json.loads(Path(tmp_path, "config.json").read_text())
    assert config["label_names"] == list("abcde") and config["num_classes"] == 5


def test_checkpoints_of_timms_trainer(tmp_path):
    """Of its saver, with its Namespace; also by ``checkpoint_path``, of timm and of ours."""
    import argparse

    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model(FUSED, **SMALL)
    averaged = ModelEmaV3(model)
    with torch.no_grad():
        for p in averaged.parameters():
            p.add_(1)
    args = argparse.Namespace(model=FUSED, lr=0.1, mean=None, opt_betas=[0.9], model_kwargs={})
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        args=args,
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=0.5)
    for make in (timm.create_model, create_model):
        name = FUSED if make is timm.create_model else "crossvit_9"
        loaded = make(name, checkpoint_path=tmp_path / "last.pth.tar", **SMALL)
        assert torch.equal(loaded.norm[0].weight, model.norm[0].weight + 1)

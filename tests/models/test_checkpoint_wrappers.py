"""State dicts in containers of training scripts, and models inside wrappers."""

from __future__ import annotations

import argparse
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from crossvit import Config, CrossViT, create_model, load_checkpoint, save_checkpoint

pytest.importorskip("safetensors.torch")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)
State = dict[str, Tensor]


def tiny(**changes) -> CrossViT:
    return CrossViT(TINY, **{"num_classes": 5, **changes}).eval()


def under(prefix: str, state: State) -> State:
    return {prefix + key: t for key, t in state.items()}


def inside(component: str, state: State) -> State:
    return {key.replace("blocks.0.", f"blocks.0.{component}."): t for key, t in state.items()}


def assert_loads(content, expected: CrossViT, **options) -> None:
    """Assert that every tensor loads into a model of the same sizes."""
    state = load_checkpoint(tiny(), content, **options).state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, t in expected.state_dict().items():
        assert torch.equal(t, state[key]), key


def refusal(content, model: CrossViT | None = None, **options) -> str:
    """The error message; also asserts that the model is unchanged."""
    model = tiny() if model is None else model
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_checkpoint(model, content, **options)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    return str(error.value)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "crossvit")
    return caplog


# Prefixes, and names inside keys


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "module.",
        "_orig_mod.",
        "net.",
        "backbone.",
        "student.",
        "_forward_module.model._orig_mod.",
        "module._orig_mod.module.",
    ],
)
def test_prefixes(prefix, log, tmp_path):
    model = tiny()
    torch.save({"state_dict": under(prefix, model.state_dict()), "epoch": 3}, tmp_path / "a.ckpt")
    assert_loads(tmp_path / "a.ckpt", model)
    assert repr(prefix) in log.text and "'state_dict'" in log.text


@pytest.mark.parametrize(
    "component",
    ["_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._orig_mod"],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_inside_of_keys(component, prefix, log):
    model = tiny()
    assert_loads(under(prefix, inside(component, model.state_dict())), model)
    assert all(f"'{name}.'" in log.text for name in component.split("."))


def test_a_lightning_module_with_a_loss_and_metrics(log):
    model = tiny()
    state = {
        **under("model.", model.state_dict()),
        "loss.weight": torch.ones(5),
        "train_acc.total": torch.tensor(3),
        "train_acc._extra_state": {"count": 3},
    }
    assert_loads({"state_dict": state, "pytorch-lightning_version": "2.5"}, model)
    assert "left out, not the model's: loss.weight, train_acc.total" in log.text
    # Under the prefix, they would be the model's.
    assert "unexpected: loss.weight" in refusal({**state, "model.loss.weight": torch.ones(5)})
    del state["model.norm.0.weight"]
    message = refusal(state)
    assert "missing: norm.0.weight" in message and "'model.'" in message
    assert "loss.weight" in message


def test_a_training_checkpoint_with_arguments_and_numbers(tmp_path):
    """timm saves its arguments as a namespace, the ImageNet example a tensor with the weights."""
    model = tiny()
    content = {
        "args": argparse.Namespace(lr=0.1),
        "state_dict": under("module.", model.state_dict()),
        "best_acc1": torch.tensor(71.0),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []},
    }
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    assert_loads(tmp_path / "checkpoint.pth.tar", model)


@pytest.mark.parametrize("key", ["model_state_dict", "net", "weights", "anything"])
def test_containers_of_other_names(key, log):
    model = tiny()
    assert_loads({key: model.state_dict(), "step": 4}, model)
    assert repr(key) in log.text


def test_two_models_are_not_chosen_from_in_silence():
    a, b = tiny().state_dict(), tiny().state_dict()
    message = refusal({**under("student.", a), **under("teacher.", b)})
    assert "'student.', 'teacher.'" in message and "startswith" in message
    message = refusal({"student": a, "teacher": b})
    assert "student, teacher" in message
    message = refusal({**a, **under("module.", b)})
    assert "'', 'module.'" in message
    twice = inside("_orig_mod", a)
    key = "blocks.0.blocks.0.0.norm1.weight"
    assert f"both {key}, and differ" in refusal({**twice, key: a[key] + 1})


def test_a_model_that_is_there_twice_is_no_question():
    """As in a module that holds a model and its compiled version."""
    model = tiny()
    state = model.state_dict()
    copies = {key: t.clone() for key, t in state.items()}
    assert_loads({**under("net.", state), **under("compiled._orig_mod.", copies)}, model)


# Averaged weights


CONTAINERS = [
    ("model", "model_ema"),
    ("state_dict", "state_dict_ema"),
    ("model", "state_dict_ema"),
    ("state_dict", "ema_state_dict"),
]


@pytest.mark.parametrize(("trained", "averaged"), CONTAINERS)
def test_averaged_weights_in_a_container(trained, averaged, log, tmp_path):
    """The same choice as timm's."""
    model, ema = tiny(), tiny()
    content = {trained: model.state_dict(), averaged: ema.state_dict()}
    assert_loads(content, ema)
    assert repr(averaged) in log.text and "use_ema=False" in log.text
    assert_loads(content, model, use_ema=False)
    if averaged == "ema_state_dict":
        return  # timm does not know it
    load_state_dict = pytest.importorskip("timm.models").load_state_dict
    torch.save(content, path := tmp_path / "checkpoint.pth")
    for use_ema in (True, False):
        theirs = load_state_dict(str(path), use_ema=use_ema)
        ours = load_checkpoint(tiny(), path, use_ema=use_ema).state_dict()
        assert all(torch.equal(t, ours[key]) for key, t in theirs.items())


def test_an_average_that_is_none_yet():
    model = tiny()
    assert_loads({"state_dict": model.state_dict(), "state_dict_ema": None}, model)


def test_averaged_models_of_torch(log):
    model = tiny()
    average = AveragedModel(model)
    average.update_parameters(tiny())
    average.update_parameters(tiny())
    assert "n_averaged" in average.state_dict()
    assert_loads(average.state_dict(), average.module)
    assert "n_averaged" in log.text
    content = {"model": model.state_dict(), "model_ema": average.state_dict()}
    assert_loads(content, average.module)
    assert_loads(content, model, use_ema=False)


def test_averaged_weights_beside_others_in_one_state_dict(log):
    """As saved by ema_pytorch and modules with an AveragedModel."""
    model, ema = tiny(), tiny()
    for names in (("online_model.", "ema_model."), ("model.", "ema.module."), ("", "ema.module.")):
        state = {
            **under(names[0], model.state_dict()),
            **under(names[1], ema.state_dict()),
            "ema.n_averaged": torch.tensor(3),
        }
        assert_loads(state, ema)
        assert_loads(state, model, use_ema=False)
    assert "'ema.module.'" in log.text


def test_the_average_of_lightnings_callback():
    model, ema = tiny(), tiny()
    content = {
        "state_dict": under("model.", ema.state_dict()),
        "current_model_state": under("model.", model.state_dict()),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }
    assert_loads(content, ema)
    assert_loads(content, model, use_ema=False)


def test_averaged_weights_of_a_callback() -> None:
    """As saved by Lightning's callbacks."""
    model, ema = tiny(), tiny()
    content = {
        "state_dict": under("model.", model.state_dict()),
        "callbacks": {
            "ModelCheckpoint{}": {"best_model_path": "best.ckpt"},
            "EMA": {"ema_state_dict": under("model.", ema.state_dict()), "decay": 0.999},
        },
    }
    assert_loads(content, ema)
    assert_loads(content, model, use_ema=False)


def test_averaged_weights_alone():
    ema = tiny()
    for content in ({"model_ema": ema.state_dict()}, under("ema_model.", ema.state_dict())):
        assert_loads(content, ema)
        assert "averaged weights only" in refusal(content, use_ema=False)


# Grids


def wide() -> CrossViT:
    """A model with 2 x 8 and 1 x 9 patches: as many as the square model's 4 x 4 and 3 x 3."""
    return tiny(img_size=((24, 96), (16, 144)))


def resized(t: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    image = t[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    image = nn.functional.interpolate(image, new, mode="bicubic", antialias=True)
    return torch.cat([t[:, :1], image.flatten(2).transpose(1, 2)], 1)


@pytest.mark.parametrize("how", ["file", "state dict", "torch.save", "grid_sizes", "lightning"])
def test_a_square_grid_into_another_of_as_many_patches(how, tmp_path):
    model, target, options = tiny(), wide(), {}
    source: Path | dict = tmp_path / "a.safetensors"
    if how == "file":
        save_checkpoint(model, source)
    elif how == "torch.save":
        torch.save({"model": model.state_dict()}, source := tmp_path / "a.pth")
    elif how == "state dict":
        source = model.state_dict()
    elif how == "lightning":
        source = {"state_dict": nn.ModuleDict({"net": torch.compile(model)}).state_dict()}
    else:
        source, options = dict(model.state_dict()), {"grid_sizes": [(4, 4), (3, 3)]}
    load_checkpoint(target, source, **options)
    for b, side in enumerate((4, 3)):
        expected = resized(
            model.get_parameter(f"pos_embed_{b}"), (side, side), target.grid_sizes[b]
        )
        torch.testing.assert_close(target.get_parameter(f"pos_embed_{b}"), expected)


def test_grids_that_may_be_either():
    state = dict(tiny().state_dict())
    message = refusal(state, wide())
    assert "2 x 8 and 1 x 9" in message and "4 x 4 and 3 x 3" in message
    assert "grid_sizes=[(2, 8), (1, 9)]" in message and "grid_sizes=[(4, 4), (3, 3)]" in message
    target = load_checkpoint(wide(), state, grid_sizes=[(2, 8), (1, 9)])
    assert torch.equal(target.pos_embed_0, state["pos_embed_0"])
    # The other branch decides: 6 patches are not square, so neither are these 16.
    long = tiny(img_size=((24, 96), (32, 48)))
    assert torch.equal(
        load_checkpoint(tiny(img_size=((24, 96), (32, 48))), dict(long.state_dict())).pos_embed_0,
        long.pos_embed_0,
    )
    # And 9 patches are not the model's 6, so these are 3 x 3 and 4 x 4.
    target = load_checkpoint(tiny(img_size=((24, 96), (32, 48))), state)
    torch.testing.assert_close(target.pos_embed_0, resized(state["pos_embed_0"], (4, 4), (2, 8)))


def test_the_same_grid_loads_as_it_is(tmp_path):
    model = wide()
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    loaded = load_checkpoint(wide(), tmp_path / "wide.pth")
    assert torch.equal(loaded.pos_embed_0, model.pos_embed_0)


@pytest.mark.parametrize("grids", [3, [(4, 4)], [(4, 4), (0, 9)], [(4, 4), 9], "ab"])
def test_bad_grid_sizes(grids):
    assert "grid_sizes: expected (height, width)" in refusal(tiny().state_dict(), grid_sizes=grids)


# Misfits


def test_another_architecture_is_named_in_few_lines():
    state = create_model("crossvit_9_240").state_dict()
    message = refusal(under("model.", state), create_model("crossvit_15_240"))
    lines = message.splitlines()
    assert len([line for line in lines if ": found [" in line or "missing:" in line]) <= 10
    assert len(lines) <= 14
    assert "it looks like crossvit_9_240" in message and "keys begin with 'model.'" in message
    assert "in all" in message


def test_nothing_that_fits():
    foreign = {f"encoder.layers.{i}.weight": torch.zeros(2) for i in range(200)}
    message = refusal(foreign)
    assert "all keys begin with: encoder.layers.\n" in message + "\n"
    assert len(message.splitlines()) <= 13 and "200 in all" in message
    assert "all keys" not in refusal({"a.b": torch.zeros(2), "c.d": torch.zeros(2)})


def test_one_head_of_two_and_none():
    state = dict(tiny().state_dict())
    del state["head.1.weight"]
    assert refusal(state).splitlines()[1:] == ["  missing: head.1.weight"]
    for key in ("head.0.weight", "head.0.bias", "head.1.bias"):
        del state[key]
    assert "replace_head=True keeps" in refusal(state)
    model = tiny(num_classes=3)
    own = model.head[1].weight.clone()
    load_checkpoint(model, under("model.", state), replace_head=True)
    assert torch.equal(model.head[1].weight, own)


def test_adapters_are_named():
    state = inside("base_layer", tiny().state_dict())
    assert "merge_and_unload()" in refusal(under("base_model.model.", state))


# Values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_become_the_models(dtype, tmp_path):
    model = tiny().to(dtype)
    save_checkpoint(model, tmp_path / "a.safetensors")
    loaded = load_checkpoint(tiny(), tmp_path / "a.safetensors")
    for key, t in loaded.state_dict().items():
        assert t.dtype == torch.float32 and torch.equal(t, model.state_dict()[key].float())


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda t: t.to(torch.int8), "torch.int8"),
        (lambda t: t.to(torch.complex64), "torch.complex64"),
        (lambda t: t.to("meta"), "on meta"),
        (lambda t: t.to_sparse(), "sparse"),
        (lambda t: t > 0, "torch.bool"),
    ],
)
@pytest.mark.parametrize("key", ["norm.0.weight", "pos_embed_1"])
def test_values_that_are_no_weights(change, kind, key):
    state = tiny().state_dict()
    state[key] = change(state[key].detach())
    message = refusal(state)
    assert f"{key}: found" in message and kind in message


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(model, tiny().state_dict())
    with pytest.raises(ValueError, match="meta"):
        save_checkpoint(model, "model.safetensors")


def test_tied_parameters_are_saved(tmp_path):
    model = tiny()
    model.head[0].bias = model.head[1].bias
    save_checkpoint(model, tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.safetensors", model)


def test_a_model_with_tied_parameters_takes_no_two_values():
    model, state = tiny(), tiny().state_dict()
    model.norm[0].bias = model.norm[0].weight
    state["norm.0.bias"] = state["norm.0.weight"] + 1
    assert "norm.0.bias: differs from norm.0.weight, to which the model ties it" in refusal(
        state, model
    )


def test_odd_keys():
    assert "names as keys" in refusal({0: torch.zeros(1)})
    state = OrderedDict(tiny().state_dict())
    assert_loads(state, load_checkpoint(tiny(), state))

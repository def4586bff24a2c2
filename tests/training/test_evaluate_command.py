"""The command that measures accuracies, on generated folders of images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from crossvit import Config, CrossViT, VisionTransformer, VitConfig, create_model, save_checkpoint

pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("safetensors")
pytest.importorskip("rich")
Image = pytest.importorskip("PIL.Image")

from crossvit import checkpoint_files as files  # noqa: E402
from crossvit import command_line, configs, evaluate, imagenet  # noqa: E402
from crossvit.checkpoints import describe, load_model  # noqa: E402
from crossvit.training import sources  # noqa: E402
from crossvit.transforms import eval_transform  # noqa: E402

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)
COUNTS = {"cat": 9, "dog": 8, "eel": 6}


def tiny(num_classes: int = 3, **options: Any) -> CrossViT:
    torch.manual_seed(0)
    model = CrossViT(TINY, num_classes=num_classes, **options)
    for head in model.head:
        nn.init.normal_(head.weight)
    return model


def make_folder(folder: Path, counts: dict[str, int]) -> Path:
    """Images of noise around a colour of their own."""
    generator = torch.Generator().manual_seed(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = torch.randint(64, 192, (3,), generator=generator)
            noise = torch.randint(-64, 64, (56, 72, 3), generator=generator)
            image = Image.fromarray((colour + noise).to(torch.uint8).numpy())
            image.save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    make_folder(path / "val", COUNTS)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(tiny(), path, class_names=list(COUNTS))
    return path


@pytest.fixture
def run(tmp_path, capsys) -> Callable[..., dict[str, Any]]:
    """Runs the command and returns its JSON, with what it printed under "line" and "stderr"."""

    def command(data: Path | str, weights: Path | str, *options: str) -> dict[str, Any]:
        output = tmp_path / "result.json"
        arguments = ["--data", str(data), "--checkpoint", str(weights), "--workers", "0"]
        assert evaluate.main([*arguments, "--json", str(output), *options]) == 0
        printed = capsys.readouterr()
        return {**json.loads(output.read_text()), "line": printed.out, "stderr": printed.err}

    return command


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs the command and returns why it cannot be."""

    def command(data: Path | str, weights: Path | str, *options: str) -> str:
        arguments = ["--data", str(data), "--checkpoint", str(weights), "--workers", "0"]
        assert evaluate.main([*arguments, *options]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("crossvit.evaluate: ")
        return line

    return command


def accuracies(result: dict[str, Any]) -> list[float]:
    return [result[head][k] for head in ("mean", "small", "large") for k in ("top1", "top5")]


def test_accuracies_are_those_of_torchvisions_folder(folder, checkpoint, run):
    dataset = torchvision.datasets.ImageFolder(folder / "val", eval_transform(48))
    images, targets = (
        torch.stack(list(map(torch.as_tensor, x))) for x in zip(*dataset, strict=True)
    )
    model = tiny().eval()
    with torch.no_grad():
        scores = [model(images), *model.forward_branches(images)]
    expected = [100 * (s.argmax(1) == targets).double().mean().item() for s in scores]
    result = run(folder, checkpoint, "--batch-size", "5")
    assert accuracies(result)[::2] == pytest.approx(expected)
    assert len(set(expected)) > 1 and accuracies(result)[1::2] == [100] * 3
    assert (result["images"], result["unreadable"]) == (23, 0)
    line = (
        f"23 images: top-1 {expected[0]:.2f} % top-5 100.00 %; S branch top-1 {expected[1]:.2f} %"
    )
    assert line in result["line"] and result["line"].count("\n") == 1 and not result["stderr"]
    eager = run(folder, checkpoint, "--batch-size", "23", "--eager")
    assert accuracies(eager) == accuracies(result) and not eager["fused"]
    assert eager["loss"] == pytest.approx(result["loss"], rel=1e-5)
    rounded = run(folder, checkpoint, "--dtype", "bfloat16")
    assert rounded["loss"] == pytest.approx(result["loss"], rel=0.05)
    assert rounded["loss"] != result["loss"]


def test_json_on_standard_output(folder, checkpoint, capsys):
    arguments = ["--data", str(folder), "--checkpoint", str(checkpoint), "--workers", "0"]
    assert evaluate.main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 23


def test_data_by_name(folder, checkpoint, run):
    by_name = run("torch/image_folder", checkpoint, "--data-root", str(folder / "val"))
    assert accuracies(by_name) == accuracies(run(folder / "val", checkpoint))


# Classes


def test_classes_are_matched_by_name(folder, checkpoint, run, tmp_path):
    expected = accuracies(run(folder, checkpoint))
    order = [2, 0, 3, 1]  # and a class without images
    wider, model = tiny(4), tiny()
    with torch.no_grad():
        for mine, theirs in zip(wider.head, model.head, strict=True):
            mine.bias.fill_(-1e4)
            for number, old in zip(order, range(3), strict=False):
                mine.weight[number], mine.bias[number] = theirs.weight[old], theirs.bias[old]
    wider.load_state_dict({**model.state_dict(), **wider.head.state_dict(prefix="head.")})
    names = [dict(zip(order, [*COUNTS, "yak"], strict=True))[i] for i in range(4)]
    save_checkpoint(wider, tmp_path / "a.safetensors", class_names=names)
    assert accuracies(run(folder, tmp_path / "a.safetensors")) == expected
    save_checkpoint(wider, tmp_path / "b.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(names))
    labels = ("--labels", str(tmp_path / "names.txt"))
    assert accuracies(run(folder, tmp_path / "b.safetensors", *labels)) == expected


def test_classes_without_names_are_in_their_order(folder, checkpoint, run, tmp_path):
    save_checkpoint(tiny(), tmp_path / "a.safetensors")
    result = run(folder, tmp_path / "a.safetensors")
    assert accuracies(result) == accuracies(run(folder, checkpoint))
    assert "the checkpoint does not name the classes" in result["stderr"]


def test_images_without_class_names_are_in_their_order(folder, run, monkeypatch, tmp_path):
    save_checkpoint(tiny(), path := tmp_path / "a.safetensors", class_names=["eel", "cat", "dog"])
    by_name = run(folder, path)
    monkeypatch.setattr(sources.Source, "class_names", None)
    by_number = run(folder, path)
    assert "the images do not name the classes" in by_number["stderr"]
    save_checkpoint(tiny(), path)
    assert accuracies(by_number) == accuracies(run(folder, path)) != accuracies(by_name)


def test_targets_that_are_no_class(folder, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(sources.Source, "class_names", None)
    save_checkpoint(tiny(2), tmp_path / "a.safetensors")
    assert "target: expected a class of the model, from 0 to 1" in refused(
        folder, tmp_path / "a.safetensors"
    )


def test_some_classes_of_imagenet(run, tmp_path):
    ids = imagenet.wordnet_ids()
    chosen = {ids[i]: 2 for i in (1, 388, 999)}
    model = tiny(1000)
    with torch.no_grad():
        for head in model.head:
            head.weight.zero_()
            head.bias.copy_(torch.arange(1000) == 388)
    save_checkpoint(model, tmp_path / "a.safetensors")
    result = run(make_folder(tmp_path / "some", chosen), tmp_path / "a.safetensors")
    assert result["images"] == 6 and result["mean"]["top1"] == pytest.approx(100 / 3)
    assert result["mean"]["top5"] == pytest.approx(200 / 3)  # equal logits: the first classes


def test_classes_that_do_not_match(folder, checkpoint, refused, tmp_path):
    save_checkpoint(tiny(4), path := tmp_path / "a.safetensors")
    message = refused(folder, path)
    assert "has 3 classes (cat, dog, eel), the model 4: name the model's" in message
    save_checkpoint(tiny(2), path, class_names=["cat", "dog"])
    assert "has classes that the model does not: eel; the model's are cat, dog" in refused(
        folder, path
    )
    save_checkpoint(tiny(4), path, class_names=["cat", "dog", "eel", "cat"])
    assert "several classes of the model are called cat" in refused(folder, path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert "expected 3 lines" in refused(
        folder, checkpoint, "--labels", str(tmp_path / "names.txt")
    )


# Unreadable images


def test_unreadable_images(checkpoint, run, refused, tmp_path):
    data = make_folder(tmp_path / "data", COUNTS)
    expected = run(data, checkpoint)
    bad = data / "dog" / "z.png"
    bad.write_bytes((data / "dog" / "0.png").read_bytes()[:300])
    message = refused(data, checkpoint, "--batch-size", "4")
    assert str(bad) in message and "--skip-bad" in message
    result = run(data, checkpoint, "--batch-size", "4", "--skip-bad")
    assert (result["images"], result["unreadable"]) == (23, 1)
    assert accuracies(result) == accuracies(expected)
    assert ", 1 unreadable: " in result["line"] and f"skipped {bad}: " in result["stderr"]
    for path in data.glob("*/*.png"):
        path.write_bytes(b"")
    assert "has no labelled images; 24 could not be read" in refused(data, checkpoint, "--skip-bad")


# What else is wrong


@pytest.mark.parametrize(
    ("data", "weights", "options", "message"),
    [
        ("/no/folder", "{}", [], r"data: /no/folder does not exist"),
        ("{empty}", "{}", [], r"data: .*empty"),
        ("torch/nothing", "{}", [], r"data: cannot open torch/nothing"),
        ("{folder}", "/no/file.pth", [], r"/no/file\.pth: no such file"),
        ("{folder}", "timm", [], "--checkpoint timm: needs --model"),
        ("{folder}", "official", ["--model", "crossvit_tiny_384"], "no weights of 'crossvit_tiny_"),
        ("{folder}", "{}", ["--model", "crossvit_15_dager"], "did you mean crossvit_15_dagger_"),
        ("{folder}", "{}", ["--split", "train"], "no folder for the split 'train', only val"),
        ("{folder}", "{}", ["--crop-pct", "0"], "crop_pct: expected more than 0 and at most 1"),
        ("{folder}", "{}", ["--std", "1", "2"], "--std: expected 3, one for each channel, found 2"),
        ("{folder}", "{}", ["--device", "cuda:77"], "device: cuda:77"),
        ("{folder}", "{}", ["--workers", "-1"], "num_workers"),
    ],
)
def test_what_is_wrong(folder, checkpoint, refused, tmp_path, data, weights, options, message):
    (tmp_path / "empty").mkdir()
    data = data.format(folder=folder, empty=tmp_path / "empty")
    assert re.search(message, refused(data, weights.format(checkpoint), *options))


def test_other_architectures_and_files(folder, checkpoint, refused, tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "plain.pth")
    message = "does not describe its model: give its architecture, such as --model crossvit_15_240"
    assert message in refused(folder, tmp_path / "plain.pth")
    save_checkpoint(CrossViT(TINY, num_classes=0), tmp_path / "a.safetensors")
    assert "has no heads" in refused(folder, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    assert "truncated, or no checkpoint" in refused(folder, tmp_path / "cut.safetensors")


def test_wrong_options(folder, checkpoint, capsys):
    arguments = ["--data", str(folder), "--checkpoint", str(checkpoint)]
    for options in (["--json", "/no/folder/a.json"], ["--batch-size", "0"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main([*arguments, *options])
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        evaluate.main(arguments[:2])
    assert "required: --checkpoint" in capsys.readouterr().err


# Models and transforms


def test_released_weights(folder, run, monkeypatch, tmp_path):
    """--checkpoint timm is the hub's file of --model."""
    sources = []
    save_checkpoint(tiny(), path := tmp_path / "a.safetensors")

    def locate(source):
        sources.append(str(source))
        return path

    monkeypatch.setattr(files, "locate", locate)
    monkeypatch.setitem(configs._CONFIGS, "crossvit_9_240", TINY)
    assert run(folder, "timm", "--model", "crossvit_9_224")["model"] == "crossvit_9_224"
    assert sources[0] == "timm/crossvit_9_240.in1k"
    assert run(folder, "timm/crossvit_9_240.in1k")["images"] == 23
    torch.save(tiny().state_dict(), path := tmp_path / "a.pth")  # which does not describe its model
    assert run(folder, "timm/crossvit_9_240.in1k")["images"] == 23
    run(folder, "official", "--model", "crossvit_9_240.in1k")
    assert sources[-1].endswith("/weights-0.1/crossvit_9_224.pth")


@pytest.mark.parametrize(
    ("options", "resized", "crop"),
    [
        ([], 274, 240),
        (["--transform", "paper"], 256, 224),
        (["--model", "crossvit_9_408"], 466, 408),
        (["--model", "crossvit_9_408", "--crop-pct", "1.0"], 408, 408),
        (["--model", "crossvit_9_408", "--transform", "paper"], 438, 384),
    ],
)
def test_transforms_of_the_paper(options, resized, crop):
    arguments = ["--data", "x", "--checkpoint", "y", "--model", "crossvit_9_240", *options]
    chosen = evaluate._parser().parse_args(arguments)
    with torch.device("meta"):
        model = create_model(chosen.model)
    steps = command_line.make_transform(chosen, model).transforms
    assert steps[0].size == resized and list(steps[1].size) == [crop, crop]


def test_other_sizes_and_grey_images(folder, checkpoint, run, tmp_path):
    larger = run(folder, checkpoint, "--img-size", "96")
    assert larger["images"] == 23 and larger["loss"] != run(folder, checkpoint)["loss"]
    paper = run(folder, checkpoint, "--transform", "paper", "--crop-pct", "1.0")
    assert paper["loss"] != larger["loss"]
    grey = tiny(in_chans=1)
    save_checkpoint(grey, tmp_path / "grey.safetensors", class_names=list(COUNTS))
    default = run(folder, tmp_path / "grey.safetensors")
    shifted = run(folder, tmp_path / "grey.safetensors", "--mean", "0.1", "--std", "0.5")
    assert default["images"] == 23 and default["loss"] != shifted["loss"]


def test_the_checkpoint_says_how_images_were_normalized(folder, checkpoint, run, tmp_path):
    path = tmp_path / "own.safetensors"
    own = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    save_checkpoint(tiny(), path, class_names=list(COUNTS), normalization=own)
    recorded, default = run(folder, path), run(folder, checkpoint)
    mean_and_std = ["--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.6", "0.7"]
    given = run(folder, checkpoint, *mean_and_std)
    assert recorded["loss"] == given["loss"] != default["loss"]
    imagenets = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
    imagenets = run(folder, path, *imagenets)
    assert imagenets["loss"] == default["loss"]
    cfg = load_model(path).pretrained_cfg  # of which timm makes transforms
    assert (cfg["mean"], cfg["std"], cfg["input_size"][0]) == (*own, 3)
    with pytest.raises(ValueError, match="normalization: expected 3 means and as many dev"):
        save_checkpoint(tiny(), path, normalization=((0.5,), (0.5,)))


def test_checkpoints_of_the_trainer_describe_themselves(folder, run, tmp_path):
    """Their weights, averages, classes and normalization, without --model."""
    model = tiny()
    own = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    content = {
        "format": 1,
        "model": tiny().state_dict(),
        "ema": None,
        "metadata": describe(model, class_names=list(COUNTS), normalization=own),
    }
    torch.save(content, tmp_path / "step-00000001.pt")
    path = tmp_path / "same.safetensors"
    save_checkpoint(model, path, class_names=list(COUNTS), normalization=own)
    expected, found = run(folder, path), run(folder, tmp_path / "step-00000001.pt")
    assert found["loss"] == expected["loss"] and not found["stderr"]


def test_a_plain_vit_has_no_branches(folder, run, tmp_path):
    config = VitConfig(dim=32, num_heads=2, depth=1, img_size=48)
    model = VisionTransformer(config, num_classes=3)
    save_checkpoint(model, tmp_path / "a.safetensors", class_names=list(COUNTS))
    result = run(folder, tmp_path / "a.safetensors", "--transform", "paper")
    assert result["images"] == 23 and result["small"] is result["large"] is None
    assert "S branch" not in result["line"]


# Several processes


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", "2", "-m", "crossvit.evaluate", "--device", "cpu"]
    command = [*launcher, *options, "--workers", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_two_processes_count_each_image_once(folder, checkpoint, run, tmp_path):
    one = run(folder, checkpoint)
    output = tmp_path / "two.json"
    options = ["--data", str(folder), "--checkpoint", str(checkpoint), "--batch-size", "4"]
    done = torchrun(*options, "--json", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(", 23 images: ") == 1
    two = json.loads(output.read_text())
    assert (two["images"], two["processes"]) == (23, 2) and accuracies(two) == accuracies(one)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(checkpoint, tmp_path):
    data = make_folder(tmp_path / "data", {"cat": 2, "dog": 1, "eel": 1})
    (data / "cat" / "1.png").write_bytes(b"")  # of the second process
    done = torchrun("--data", str(data), "--checkpoint", str(checkpoint))
    assert done.returncode != 0
    assert re.search(r"crossvit\.evaluate: \[rank 1\] unreadable image: .*cat/1\.png", done.stderr)

"""The command that prints the classes of images."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from crossvit import Config, CrossViT, imagenet, predict, save_checkpoint

for package in ("torchvision", "safetensors"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")

TINY = Config(
    dims=(32, 64), num_heads=(2, 2), depths=(1, 1), mlp_ratios=(2.0, 2.0), num_blocks=1, img_size=48
)


def always(digit: int, num_classes: int = 10, **options) -> CrossViT:
    """A model that always predicts the same class, with probability e / (e + 9) of 10."""
    model = CrossViT(TINY, num_classes=num_classes, **options)
    with torch.no_grad():
        for head in model.head:
            head.weight.zero_()
            head.bias.copy_(torch.arange(num_classes) == digit)
    return model


@pytest.fixture
def image(tmp_path: Path) -> str:
    Image.linear_gradient("L").save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(always(7), path)
    return str(path)


def error(capsys) -> str:
    line = capsys.readouterr().err
    assert line.startswith("crossvit.predict: ") and line.count("\n") == 1
    return line


def test_labels(image, checkpoint, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    arguments = [image, "--checkpoint", checkpoint, "--labels", str(labels), "--top", "3"]
    assert predict.main(arguments) == 0
    path, best, *others = capsys.readouterr().out.splitlines()
    assert path == image and best.split() == ["23.2%", "h"] and len(others) == 2


def test_names_of_the_checkpoint(image, tmp_path, capsys):
    path = tmp_path / "named.safetensors"
    save_checkpoint(always(1, 2), path, class_names=["a cat", "a dog"])
    assert predict.main([image, "--checkpoint", str(path)]) == 0
    assert [line[10:] for line in capsys.readouterr().out.splitlines()[1:]] == ["a dog", "a cat"]


def test_batches_are_the_images_one_by_one(checkpoint, tmp_path, capsys):
    model = CrossViT(TINY, num_classes=4)
    for head in model.head:
        torch.nn.init.normal_(head.weight)
    save_checkpoint(model, tmp_path / "random.safetensors")
    paths = []
    for i in range(5):
        noise = torch.randint(0, 256, (60, 70 + i, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(path := tmp_path / f"{i}.png")
        paths.append(str(path))
    found = []
    for size in ("1", "2", "16"):
        arguments = ["--checkpoint", str(tmp_path / "random.safetensors"), "--batch-size", size]
        assert predict.main([*paths, *arguments, "--json", "-"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [entry["image"] for entry in found[0]["results"]] == paths
    rows, *others = ([entry["predictions"] for entry in one["results"]] for one in found)
    for other in others:
        for a, b in zip(itertools.chain(*rows), itertools.chain(*other), strict=True):
            assert a == {**b, "probability": pytest.approx(b["probability"], rel=1e-4)}
    assert all(sum(p["probability"] for p in row) == pytest.approx(1) for row in rows)
    assert len({str(row) for row in rows}) == 5


def test_unreadable_images_do_not_stop_the_others(image, checkpoint, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(image).read_bytes()[:-200])
    bad = [str(tmp_path / "missing.png"), str(tmp_path / "note.txt"), str(cut), str(tmp_path)]
    output = tmp_path / "out.json"
    arguments = [*bad, image, "--checkpoint", checkpoint, "--json", str(output)]
    assert predict.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(image)
    for line, path in zip(printed.err.splitlines(), bad, strict=True):
        assert line.startswith(f"crossvit.predict: {path}: ")
    content = json.loads(output.read_text())
    assert content["unreadable"] == bad and len(content["results"]) == 1
    assert content["results"][0]["predictions"][0]["class_index"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "missing.pth"], "missing.pth: no such file"),
        (["--model", "crossvit_16"], "unknown model 'crossvit_16': did you mean"),
        (["--model", "crossvit_15_504"], "no weights of 'crossvit_15_504' were released"),
        (["--checkpoint", "{}", "--crop-pct", "1.5"], "crop_pct: expected .* found 1.5"),
        (["--checkpoint", "{}", "--mean", "0.5"], "--mean: expected 3, one for each channel"),
        (["--checkpoint", "{}", "--labels", "{}"], "is no text in UTF-8"),
        (["--checkpoint", "{}", "--labels", "/no/labels"], "/no/labels"),
        (["--checkpoint", "{}", "--device", "tpu9"], "device: tpu9"),
    ],
)
def test_what_is_wrong(image, checkpoint, options, message, capsys):
    options = [option.format(checkpoint) for option in options]
    assert predict.main([image, *options]) == 1
    assert re.search(message, error(capsys))


def test_labels_that_do_not_fit(image, checkpoint, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("a\nb\n")
    arguments = [image, "--checkpoint", checkpoint, "--labels", str(tmp_path / "labels.txt")]
    assert predict.main(arguments) == 1
    assert "expected 10 lines, one for each class of the model, found 2" in error(capsys)


@pytest.mark.parametrize("options", [["--top", "0"], ["--json", "/no/folder/a.json"], []])
def test_wrong_options(image, options, capsys):
    with pytest.raises(SystemExit) as stopped:
        predict.main([image, *options] if options else [])
    assert stopped.value.code == 2
    assert "usage: python -m crossvit.predict" in capsys.readouterr().err


def test_headless_and_other_channels(image, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_checkpoint(CrossViT(TINY, num_classes=0), path)
    assert predict.main([image, "--checkpoint", str(path)]) == 1
    assert "has no heads" in error(capsys)
    save_checkpoint(CrossViT(TINY, num_classes=2, in_chans=4), path)
    assert predict.main([image, "--checkpoint", str(path)]) == 1
    assert "expected a model of 1 or 3 channels, found 4" in error(capsys)
    save_checkpoint(CrossViT(TINY, num_classes=2, in_chans=1), path)
    assert predict.main([image, "--checkpoint", str(path), "--dtype", "bfloat16"]) == 0


def test_logits_that_are_not_finite(image, tmp_path, capsys):
    model = always(7)
    with torch.no_grad():
        model.norm[0].weight.fill_(float("nan"))
    save_checkpoint(model, tmp_path / "nan.safetensors")
    assert predict.main([image, "--checkpoint", str(tmp_path / "nan.safetensors")]) == 1
    assert "logits are not finite" in error(capsys)


def test_without_torchvision(image, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert predict.main([image, "--checkpoint", checkpoint]) == 1
    assert "pip install torchvision" in error(capsys)


def test_images_are_upright_and_in_their_mode(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation
    Image.new("L", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = predict.open_image(tmp_path / "turned.jpg")
    assert image.size == (20, 30) and image.mode == "RGB"
    assert predict.open_image(tmp_path / "turned.jpg", "L").mode == "L"


def test_decompression_bombs(image, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=rf"{image}: Image size"):
        predict.open_image(Path(image))


def test_wide_images_keep_their_aspect(checkpoint, monkeypatch):
    """A square model crops the middle of an image and does not squeeze it."""
    seen = []
    monkeypatch.setattr(predict, "predict", lambda model, images, *args: seen.append(images) or [])
    wide = torch.zeros(48, 480, 3, dtype=torch.uint8)
    wide[:, 216:264] = 255
    monkeypatch.setattr(predict, "open_image", lambda path, mode: Image.fromarray(wide.numpy()))
    with pytest.raises(ValueError):  # zip: no predictions
        predict._command(predict._parser().parse_args(["x", "--checkpoint", checkpoint]))
    assert seen[0].min() > 2  # all of the crop is white


def test_imagenet_names(monkeypatch, image, tmp_path, capsys):
    pytest.importorskip("timm")
    names, ids = imagenet.class_names(), imagenet.wordnet_ids()
    assert len(names) == len(ids) == 1000
    assert names[0].startswith("tench") and ids == sorted(ids) and ids[0] == "n01440764"
    path = tmp_path / "imagenet.safetensors"
    save_checkpoint(always(0, 1000), path)
    assert predict.main([image, "--checkpoint", str(path), "--top", "1"]) == 0
    assert "tench" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "timm", None)
    assert predict.main([image, "--checkpoint", str(path), "--top", "1"]) == 0
    printed = capsys.readouterr()
    assert "class 0" in printed.out and "pip install timm" in printed.err

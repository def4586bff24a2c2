"""The example programs, on small inputs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def digits(monkeypatch) -> Iterator[ModuleType]:
    for package in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("digits")
    sys.modules.pop("digits", None)


@pytest.mark.slow
def test_digits_fused_and_eager_learn_alike(digits, tmp_path, capsys, restore_threads):
    picture = tmp_path / "curves.png"
    arguments = ["--epochs", "2", "--output", str(picture)]
    assert digits.main([*arguments, "--min-accuracy", "0.2"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "fused: " in printed and "eager, a rounding away: " in printed
    arguments += ["--epochs", "1", "--mode", "fused", "--min-accuracy", "1.01"]
    assert digits.main(arguments) == 1


@pytest.mark.slow
def test_digits_curves_are_the_same(digits, restore_threads):
    """In float64 rounding errors stay small for the length of a test."""
    options = digits.parse(["--epochs", "2", "--dtype", "float64"])
    torch.set_num_threads(options.threads)
    data = digits.load(0, torch.float64)
    torch.manual_seed(0)
    start = digits.CrossViT(digits.SMALL, in_chans=1, num_classes=10, drop_path_rate=0.1).double()
    runs = []
    for fused in (True, False):
        model = digits.copy.deepcopy(start).set_fused(fused)
        runs.append(digits.train(model, data, options, "test"))
    assert max(digits.apart(*runs)) < 1e-9
    assert runs[0].losses[-1] < 0.9 * runs[0].losses[0]


@pytest.fixture
def classify(monkeypatch) -> Iterator[ModuleType]:
    for package in ("torchvision", "PIL", "safetensors"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("classify")
    sys.modules.pop("classify", None)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """An image and a checkpoint that always predicts 7."""
    from PIL import Image

    from crossvit import create_model, save_checkpoint

    Image.linear_gradient("L").save(tmp_path / "image.png")
    model = create_model("crossvit_tiny", num_classes=10)
    with torch.no_grad():
        for head in model.head:
            head.weight.zero_()
            head.bias.copy_(torch.arange(10) == 7)
    save_checkpoint(model, tmp_path / "tiny.safetensors")
    return str(tmp_path / "image.png"), str(tmp_path / "tiny.safetensors")


def test_classify(classify, files, tmp_path, capsys):
    image, checkpoint = files
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    arguments = [image, "--checkpoint", checkpoint, "--model", "crossvit_tiny_240"]
    arguments += ["--num-classes", "10", "--labels", str(labels)]
    assert classify.main([*arguments, "--top", "3"]) == 0
    path, best, *others = capsys.readouterr().out.splitlines()
    assert path == image and best.split() == ["23.2%", "h"] and len(others) == 2


def test_classify_says_what_is_wrong(classify, files, tmp_path, monkeypatch, capsys):
    image, checkpoint = files
    (tmp_path / "note.txt").write_text("no image")
    tiny = ["--model", "crossvit_tiny_240"]
    for arguments, message in (
        ([image, "--checkpoint", str(tmp_path / "missing.pth"), *tiny], "no such file"),
        ([image, "--checkpoint", checkpoint, *tiny], "10 classes, the model 1000"),
        (
            [str(tmp_path / "note.txt"), "--checkpoint", checkpoint, *tiny, "--num-classes", "10"],
            "cannot identify",
        ),
    ):
        assert classify.main(arguments) == 1
        assert message in one_line(capsys)
    assert classify.main([image, "--checkpoint", checkpoint, "--num-classes", "10"]) == 1
    assert "does not fit the model" in one_line(capsys)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    assert classify.main([image, "--checkpoint", checkpoint, *tiny, "--num-classes", "10"]) == 1
    assert f"{image}: Image size" in one_line(capsys)


def one_line(capsys) -> str:
    line = capsys.readouterr().err
    assert line.startswith("classify.py: ") and line.count("\n") == 1
    return line


def test_classify_says_that_it_needs_torchvision(classify, files, monkeypatch, capsys):
    image, checkpoint = files
    monkeypatch.setitem(sys.modules, "torchvision", None)
    arguments = [image, "--checkpoint", checkpoint, "--model", "crossvit_tiny_240"]
    assert classify.main([*arguments, "--num-classes", "10"]) == 1
    assert "pip install torchvision" in one_line(capsys)


def test_classify_says_that_a_device_is_unusable(classify, files, capsys):
    image, checkpoint = files
    with pytest.raises(SystemExit) as stopped:
        classify.main([image, "--checkpoint", checkpoint, "--device", "tpu9"])
    assert stopped.value.code == 2
    assert "argument --device: " in capsys.readouterr().err


def test_images_are_upright_and_rgb(classify, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation
    Image.new("L", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = classify.open_image(tmp_path / "turned.jpg")
    assert image.size == (20, 30) and image.mode == "RGB"


def test_imagenet_has_its_names(classify):
    names = classify.class_names(None, 1000)
    assert len(names) == 1000 and names[0] == "tench"

"""What a user does wrong, or a disk: a message that says so, and the last checkpoint intact."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training_runs as runs
from PIL import Image

from crossvit import create_model, save_checkpoint
from crossvit.train import main
from crossvit.training import state
from crossvit.training.records import read_table

pytestmark = pytest.mark.usefixtures("trainer")

SHORT = "--workers 0 --epochs 1 --warmup-epochs 0"


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the trainer, which must fail, and return its message, one line."""

    def run(data: object, *more: str) -> str:
        assert main(runs.arguments(Path(str(data)), tmp_path / "run", SHORT, *more)) == 1
        message = capsys.readouterr().err
        assert message.startswith("crossvit.train: ") and "Traceback" not in message, message
        assert not list(tmp_path.glob("run/checkpoints/*.pt"))
        return message

    return run


def test_images_that_are_not_there(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in fails(tmp_path / "missing")
    (tmp_path / "empty/val").mkdir(parents=True)
    (tmp_path / "empty/train").mkdir()
    assert "0 images" in fails(tmp_path / "empty")
    file = tmp_path / "file.txt"
    file.write_text("no folder")
    assert "is no folder" in fails(file)
    assert "Unknown torchvision dataset" in fails("torch/nothing")


def test_folders_of_another_form(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 24))
    for name in ("flat/train/0.png", "flat/val/a/0.png", "unsplit/a/0.png", "new/train/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    for name in ("new/train/b/0.png", "new/val/c/0.png", "one/train/a/0.png", "one/val/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    assert "images in no class folder" in fails(tmp_path / "flat")
    assert "--val-split ''" in fails(tmp_path / "unsplit")
    assert "classes that the training images do not: c" in fails(tmp_path / "new")
    assert "1 class; expected at least 2" in fails(tmp_path / "one")
    assert "smaller --global-batch" in fails(data, "--global-batch 4096 --batch-size 8")
    assert "has 3 classes, found 2" in fails(data, "--num-classes 2")


def test_batches_that_cannot_be(fails: Callable[..., str], data: Path) -> None:
    assert "an even divisor of 8" in fails(data, "--batch-size 3")
    assert "in pairs" in fails(data, "--global-batch 7")
    assert "a divisor of 9" in fails(data, runs.PLAIN, "--global-batch 9 --batch-size 2")


def test_models_and_checkpoints(fails: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "unknown model 'vit'" in fails(data, "--model vit")
    assert "unknown argument 'depth'; did you mean depths" in fails(data, "--model-args depth=3")
    assert "dims: expected a pair, found 'abc'" in fails(data, "--model-args dims=abc")
    assert "depths: expected a pair, found 'a,b'" in fails(data, "--model-args depths=a,b")
    assert "no parameter is called" in fails(data, "--freeze nothing.*")
    assert "leaves nothing to train" in fails(data, "--freeze *")
    assert "opt: nothing" in fails(data, "--opt nothing")
    assert "auto_augment: 'nothing'" in fails(data, "--auto-augment nothing")
    save_checkpoint(create_model("crossvit_tiny", num_classes=3), tmp_path / "other.safetensors")
    tiny = create_model(
        "crossvit_tiny",
        num_classes=5,
        dims=(8, 16),
        num_heads=(2, 2),
        depths=(1, 1),
        num_blocks=1,
        mlp_ratios=(2.0, 2.0),
        img_size=24,
    )
    save_checkpoint(tiny, tmp_path / "five.safetensors")
    (tmp_path / "no.pth").write_bytes(b"no checkpoint")
    message = fails(data, f"--checkpoint {tmp_path}/other.safetensors")
    assert "num_heads: the checkpoint's is (3, 3), the model's (2, 2)" in message
    message = fails(data, f"--checkpoint {tmp_path}/five.safetensors")
    assert "has 5 classes, the model 3" in message and "--replace-head" in message
    assert "no checkpoint" in fails(data, f"--checkpoint {tmp_path}/no.pth")
    assert "no such file" in fails(data, f"--checkpoint {tmp_path}/missing.pth")


def test_plots_without_matplotlib(fails: Callable[..., str], data: Path, monkeypatch) -> None:
    """Before the training, not after it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "plots need matplotlib" in fails(data, "--data-root nowhere --plot")


def test_wrong_options_exit_with_2(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--recipe", "cooking"], "recipe: expected imagenet, finetune, transfer"),
        (["--lr", "-1"], "lr: expected a positive number"),
        (["--mixup-mode", "soup"], "one of batch, pair, elem"),
        (["--epochs", "5", "--warmup-epochs", "5"], "fewer than the 5 epochs"),
        (["--model-args", "img_size"], "expected NAME=VALUE"),
        (["--save-every", "0"], "expected at least 1"),
        (["--eager", "--backend", "cpu"], "expected one of them"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["--data", str(data), *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_unreadable_images_are_named_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.make_images(tmp_path / "images")
    (folder / "train/class0/2.png").write_bytes(b"no image")
    whole = (folder / "val/class1/1.png").read_bytes()
    (folder / "val/class1/1.png").write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "run"
    command = runs.arguments(folder, output, SHORT)
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "class0/2.png: cannot identify" in message or "class1/1.png: " in message
    assert main([*command, "--skip-bad"]) == 0
    row = read_table(output / "epochs.csv")[0]
    assert int(row["unreadable"]) in (1, 2)  # the order of an epoch may leave the first out
    assert "val/class1/1.png" in (output / "unreadable.txt").read_text()
    # 14 of 15 images are counted.
    right = float(row["val_top1"]) / 100 * 14
    assert right == pytest.approx(round(right))


def fill_disk(count: int) -> None:
    """Let the count-th checkpoint go to a device that is always full."""
    original, seen = state.Checkpoints.save, 0

    def save(self: state.Checkpoints, step: int, content: dict) -> Path:
        nonlocal seen
        seen += 1
        if seen == count:
            (self.folder / f".step-{step:08d}.pt.unfinished").symlink_to("/dev/full")
        return original(self, step, content)

    state.Checkpoints.save = save


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_left(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = runs.arguments(data, output, "--save-every 1", SHORT)
    assert runs.run(command, fill_disk, 3) == [1]
    printed = runs.printed(output)
    assert "no space left on the disk" in printed and "Traceback" not in printed, printed
    assert [path.name for path in state.Checkpoints(output / "checkpoints", 3).paths()] == [
        "step-00000002.pt",
        "step-00000001.pt",
    ]
    assert runs.run(command) == [0]
    assert "continues after step 2" in runs.printed(output)


def test_a_diverging_run_stops(data: Path, tmp_path: Path, capsys) -> None:
    """Steps without a finite gradient change nothing; after three in a row the run ends."""
    output = tmp_path / "run"
    more = (runs.PLAIN, "--lr 1e30 --lr-batch 0 --save-every 1 --max-bad-steps 3 --workers 0")
    assert main(runs.arguments(data, output, *more)) == 1
    message = capsys.readouterr().err
    assert "3 steps in a row" in message and "try a lower --lr" in message
    checkpoints = state.Checkpoints(output / "checkpoints", 3)
    latest = checkpoints.load_latest()
    assert latest is not None and f"the last checkpoint is {checkpoints.paths()[0]}" in message
    (spoilt,) = (output / "checkpoints").glob("diverged-*.pt")
    assert str(spoilt) in message and state.load(spoilt)["step"] == latest["step"] + 1
    for t in (*latest["model"].values(), *latest["ema"].values()):
        assert t.isfinite().all()


def test_a_run_that_diverges_later_keeps_what_was_before(
    data: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "run"
    more = (runs.PLAIN, "--save-every 1 --max-bad-steps 2 --workers 0")
    assert main(runs.arguments(data, output, *more, "--epochs 1")) == 0
    before = state.Checkpoints(output / "checkpoints", 3).paths()[0]
    again = "--epochs 2 --allow-changes --lr 1e30 --lr-batch 0"
    assert main(runs.arguments(data, output, *more, again)) == 1
    kept = state.Checkpoints(output / "checkpoints", 3).paths()
    assert kept[0] == before and f"the last checkpoint is {before}" in capsys.readouterr().err


def test_a_folder_with_another_run(data: Path, tmp_path: Path, capsys) -> None:
    command = runs.arguments(data, tmp_path / "run", SHORT)
    assert main(command) == 0
    for words, message in (
        ("--lr 1", "a run with lr = 0.0005, not 1.0"),
        ("--seed 3", "a run with seed = 0, not 3"),
    ):
        assert main([*command, *words.split()]) == 1
        assert message in capsys.readouterr().err
    for path in (tmp_path / "run/checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert main(command) == 1
    assert "no checkpoint in" in capsys.readouterr().err


def hold_lock(folder: str) -> None:
    """Stop this process when it has locked its folder, until it is killed."""
    from crossvit.training import setup

    def prepare(*arguments: object) -> None:
        Path(f"{folder}.locked").touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    setup.prepare = prepare


def test_a_folder_in_use(data: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    command = runs.arguments(data, output, SHORT)
    (process,) = runs.start(command, hold_lock, str(output))
    try:
        while not Path(f"{output}.locked").exists():
            assert process.is_alive(), runs.printed(output)
            time.sleep(0.05)
        assert main(command) == 1
        assert "another process trains in" in capsys.readouterr().err
    finally:
        process.kill()
        process.join()
    assert main(command) == 0  # the lock died with its process

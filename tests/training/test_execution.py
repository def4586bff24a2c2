"""Options that say how a run is computed change its losses by rounding only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_runs as runs

from crossvit import create_model, load_model, save_checkpoint
from crossvit.train import main
from crossvit.training.records import read_table

pytestmark = pytest.mark.usefixtures("trainer")


@pytest.fixture(autouse=True)
def _one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


def losses(data: Path, output: Path, *more: str) -> list[float]:
    command = runs.arguments(data, output, runs.TWO_STEPS, "--workers 0 --val-split=", *more)
    assert main(command) == 0
    return [float(row["loss"]) for row in read_table(output / "steps.csv")]


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(data, tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ("--eager", 1e-5),
        ("--batch-size 4", 1e-5),
        ("--keep lean --grad-checkpointing", 1e-6),
        ("--channels-last", 1e-5),
        ("--amp bf16", 2e-2),
    ],
)
def test_options(
    data: Path, tmp_path: Path, plain: list[float], more: str, tolerance: float
) -> None:
    assert losses(data, tmp_path / "run", more) == pytest.approx(plain, rel=tolerance)


@pytest.mark.slow
def test_compile(data: Path, tmp_path: Path, plain: list[float], monkeypatch) -> None:
    """The model is traced whole; tests/test_compile.py tests what the traces compile to."""
    compiled, original = [], torch.nn.Module.compile

    def trace_only(self: torch.nn.Module) -> None:
        compiled.append(self)
        original(self, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", trace_only)
    assert losses(data, tmp_path / "run", "--compile") == pytest.approx(plain, rel=1e-5)
    assert len(compiled) == 1


def test_sharding_in_one_process(data: Path, tmp_path: Path, plain: list[float]) -> None:
    output = tmp_path / "run"
    command = runs.arguments(data, output, runs.TWO_STEPS, "--workers 0 --val-split=", "--fsdp")
    assert runs.run(command) == [0], runs.printed(output)
    found = [float(row["loss"]) for row in read_table(output / "steps.csv")]
    assert found == pytest.approx(plain, rel=1e-6)


def test_without_validation(data: Path, tmp_path: Path) -> None:
    """There is no best; the last weights are exported."""
    losses(data, tmp_path / "run")
    assert read_table(tmp_path / "run/epochs.csv")[0]["val_top1"] == ""
    assert not (tmp_path / "run/best.safetensors").exists()
    assert load_model(tmp_path / "run/last.safetensors").num_classes == 3


def test_finetuning_at_another_size(data: Path, tmp_path: Path) -> None:
    """Position embeddings are resized, heads of other classes replaced."""
    sizes = {"dims": (8, 16), "num_heads": (2, 2), "depths": (1, 1), "mlp_ratios": (2.0, 2.0)}
    model = create_model("crossvit_tiny", num_classes=5, img_size=48, num_blocks=1, **sizes)
    save_checkpoint(model, tmp_path / "five.safetensors")
    more = f"--recipe finetune --replace-head --checkpoint {tmp_path}/five.safetensors --epochs 1"
    output = tmp_path / "run"
    command = runs.arguments(data, output, more, "--warmup-epochs 0 --workers 0")
    assert main([*command, "--lr", "1e-12", "--min-lr", "0"]) == 0
    tuned = load_model(output / "last.safetensors")
    assert tuned.num_classes == 3 and tuned.grid_sizes == [(2, 2), (2, 2)]
    torch.testing.assert_close(tuned.patch_embed[0].proj.weight, model.patch_embed[0].proj.weight)


@pytest.mark.parametrize(
    "model",
    [
        "deit_tiny_patch16_224 --model-args dim=16 num_heads=2 depth=2 img_size=32",
        f"crossvit_small_nocls_240 {runs.TINY}",
        f"crossvit_small_all_240 {runs.TINY} --fsdp",
    ],
)
def test_other_models(data: Path, tmp_path: Path, model: str) -> None:
    """DeiT, and variants of the paper, are trained like CrossViT."""
    output = tmp_path / "run"
    command = runs.arguments(data, output, runs.TWO_STEPS, "--workers 0 --model", model)
    assert runs.run(command) == [0], runs.printed(output)
    assert len(read_table(output / "steps.csv")) == 2
    load_model(output / "last.safetensors")


def test_plots(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command = runs.arguments(data, tmp_path / "a", runs.TWO_STEPS, "--workers 0")
    assert main([*command, "--plot"]) == 0
    assert (tmp_path / "a/curves.png").read_bytes().startswith(b"\x89PNG")
    losses(data, tmp_path / "b", "--eager")
    picture = tmp_path / "both.png"
    words = ["--plot", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(picture)]
    assert main(words) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert main(["--plot", str(tmp_path / "empty")]) == 1
    assert "has no records" in capsys.readouterr().err


def test_tensorboard(data: Path, tmp_path: Path) -> None:
    """Events are written where tensorboard is installed."""
    pytest.importorskip("tensorboard")
    losses(data, tmp_path / "run")
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


def test_sharded_parameters_with_images_in_channels_last(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = "--workers 0 --epochs 1 --warmup-epochs 0 --fsdp --channels-last"
    assert runs.run(runs.arguments(data, output, more)) == [0], runs.printed(output)

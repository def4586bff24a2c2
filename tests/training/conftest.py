"""The trainer is tested where its optional packages are installed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trainer() -> None:
    """Skip what needs the trainer's packages where they are missing."""
    for package in ("timm", "torchvision", "rich", "safetensors"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def data(trainer: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of three classes: 33 to train on, 15 to validate."""
    import training_runs as runs

    return runs.make_images(tmp_path_factory.mktemp("images"))

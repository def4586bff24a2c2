"""Accuracy of the rows of the paper's tables on ImageNet, with ``crossvit.evaluate``."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from paper_rows import Printed, is_ours

import crossvit

#: Sources of checkpoints besides a folder.
RELEASES = ("official", "timm")
SUFFIXES = (".safetensors", ".pth", ".bin", ".ckpt")


def find_checkpoint(printed: Printed, checkpoints: str) -> str | None:
    """Return what ``crossvit.evaluate --checkpoint`` takes for a row; None if there is none.

    Args:
        printed: The row.
        checkpoints: A folder with files named after the models, or one of ``RELEASES``.
    """
    name = printed["model"]
    if name is None or not is_ours(name):
        return None
    if checkpoints in RELEASES:
        try:
            crossvit.official_url(name)  # timm has the same
        except ValueError:
            return None
        return checkpoints
    files = (Path(checkpoints) / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((str(file) for file in files if file.is_file()), None)


def measure_accuracy(
    name: str, data: Path, checkpoint: str, batch: int, device: torch.device, dtype: str
) -> dict[str, Any]:
    """Return ``top1`` of a model in percent, of the mean of its heads and of each branch's.

    Args:
        name: Of the model.
        data: ImageNet's folder, with ``val`` in it, or its validation images.
        checkpoint: See ``find_checkpoint``.
        batch: Images in a batch.
        device: Where the model runs.
        dtype: "float32", or one in 16 bits for autocast.

    Raises:
        ValueError: ``crossvit.evaluate`` failed; it has printed why.
        ImportError: Its packages are not installed.
    """
    evaluate = importlib.import_module("crossvit.evaluate")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "accuracy.json"
        options = {
            "data": data,
            "model": name,
            "checkpoint": checkpoint,
            "batch-size": batch,
            "device": device,
            "dtype": dtype,
            "json": result,
        }
        code = evaluate.main([word for k, v in options.items() for word in (f"--{k}", str(v))])
        if code != 0:
            raise ValueError(f"{name}: crossvit.evaluate failed")
        found = json.loads(result.read_text())
    branches = {"mean": "top1", "large": "top1_l", "small": "top1_s"}
    measured = {key: found[name]["top1"] for name, key in branches.items() if found.get(name)}
    return {**measured, "images": found["images"], "checkpoint": checkpoint}

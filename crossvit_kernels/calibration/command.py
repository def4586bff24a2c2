"""``python -m crossvit_kernels.tune --model ...``: ``calibrate`` from the command line."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import torch
from torch import nn

from crossvit_kernels.calibration import store
from crossvit_kernels.calibration.calibrate import calibrate

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate a model; return 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m crossvit_kernels.tune", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="MODULE:EXPRESSION",
        help="such as \"crossvit:create_model('crossvit_15_240', use_fused=True)\"; run as Python",
    )
    add("--input", required=True, metavar="B,C,H,W", help="shape of its argument")
    add("--dtype", choices=_DTYPES, default="fp32", help="of model and argument")
    add("--training", action="store_true", help="forward and backward")
    add("--compile", action="store_true", help="compare with torch.compile, too")
    add("--budget", type=float, default=60.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    module, _, expression = options.model.partition(":")
    if not expression:
        parser.error(f"--model: expected MODULE:EXPRESSION, found {options.model!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = eval(expression, vars(importlib.import_module(module)).copy())
    if not isinstance(model, nn.Module):
        parser.error(f"--model: expected a torch.nn.Module, found {type(model).__name__}")
    dtype = _DTYPES[options.dtype]
    shape = [int(size) for size in options.input.split(",")]
    x = torch.randn(shape, dtype=torch.float32, device=device).to(dtype)
    try:
        calibrate(
            model.to(device, dtype),
            x,
            training=options.training,
            budget_s=options.budget,
            compare_compiled=options.compile,
        )
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {store.file()}")
        return 130
    print(f"written to {store.file()}")
    return 0

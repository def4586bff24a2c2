"""A model in the forms in which it leaves Python, beside the model itself.

    python bench/serving_bench.py --batch 1 8

measures inference of eager mode and of the fused model, in Python, as AOTInductor's packages, and
of eager mode in onnxruntime. Needs onnx, onnxscript and onnxruntime for the last, and a C++
compiler; compiling takes some minutes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import command_line
import report
import served
import torch
from command_line import DTYPES
from served import OWN
from torch.export import Dim

from crossvit import create_model

#: The other contenders, in the order of the table.
FUSED, PACKAGE, FUSED_PACKAGE, ONNX = "fused", "AOTInductor", "AOTInductor, fused", "onnxruntime"
_BATCH = Dim("batch", min=1, max=64)


def packaged(model: torch.nn.Module, x: torch.Tensor, path: Path) -> Callable[..., Any]:
    """Return a model's AOTInductor package, compiled and loaded."""
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: _BATCH},))
        written = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(written)
    return loaded


def in_onnxruntime(model: torch.nn.Module, x: torch.Tensor, path: Path) -> Callable[..., Any] | str:
    """Return a session of a model, with torch's number of threads, or why there is none."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        return str(error)
    torch.onnx.export(model, (x,), path, dynamic_shapes=({0: _BATCH},), verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0])

    return run


def points(options: argparse.Namespace, folder: Path) -> Iterator[list[report.Row]]:
    """Measure; yields the rows of each batch."""
    torch.manual_seed(0)
    eager: Any = create_model(options.model, num_classes=1000).eval()
    eager.to(options.device, DTYPES[options.dtype])
    fused = copy.deepcopy(eager).set_fused(True)
    size = eager.config.img_size
    x = served.tensors(2, 3, size, size, options=options)
    contenders: dict[str, Any] = {OWN: eager, FUSED: fused}
    if not options.no_compile:
        contenders[PACKAGE] = packaged(eager, x, folder / "eager.pt2")
        contenders[FUSED_PACKAGE] = packaged(fused, x, folder / "fused.pt2")
    if options.device.type == "cpu" and options.dtype == "float32":
        contenders[ONNX] = in_onnxruntime(eager, x, folder / "eager.onnx")
    for batch in options.batch:
        inputs = (served.tensors(batch, 3, size, size, options=options),)
        facts = {"model": options.model, "batch": batch, "size": size}
        yield served.time_contenders(contenders, inputs, False, options, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = command_line.benchmark_parser(
        __doc__, "serving", min_time=3.0, repeats=50, modes=("forward",), backends=False
    )
    parser.add_argument("--model", default="crossvit_9", help="of crossvit (crossvit_9)")
    served.add_options(parser)
    options = served.completed(parser, arguments)
    header = ["model", "eager", FUSED, PACKAGE, FUSED_PACKAGE, ONNX]
    with tempfile.TemporaryDirectory() as folder:
        return served.tabulate(options, header, points(options, Path(folder)), _line)


def _line(first: report.Row, by: served.ByContender) -> list[str]:
    names = (OWN, FUSED, PACKAGE, FUSED_PACKAGE, ONNX)
    cells = [served.cell(by[name]) if name in by else "-" for name in names]
    return [f"{first['model']}, batch {first['batch']}", *cells]


if __name__ == "__main__":
    sys.exit(main())

"""Whole CrossViT models: images per second and peak memory, inference and training step.

    python bench/model_bench.py --models crossvit_15_240 --batch 8

measures in one run our model fused, eager and eager under torch.compile, and, if timm is installed,
timm's eager and compiled. All have the same weights and images. A model is not timed if its logits
or the gradients of any parameter are wrong, judged by eager mode's own error against float64.

On a GPU small batches are also measured in a CUDA graph, and training with the "lean" setting.
16-bit inference runs models cast to that dtype; 16-bit training runs autocast over float32 weights.
A training step is forward, cross-entropy, backward and AdamW.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import command_line
import measure
import report
import torch
import torch.nn.functional as F
from command_line import DTYPES, positive
from contender import Contender
from contest import Contest
from report import Row
from torch import Tensor, nn

import crossvit
import crossvit_kernels as ck

MODES = {"inference": "inference", "train": "training"}
OURS = "ours, fused"
WORDS = {"timm, eager": "timm", "timm, compiled": "timm under torch.compile"}
WORDS |= {"ours, eager": "eager mode", "ours, compiled": "eager mode under torch.compile"}
#: Number of images in the correctness check: float64 is slow.
CHECKED = 2
#: Largest batch that is also measured in a CUDA graph.
GRAPHED = 8
PAPER = {"batch": 64, "repeats": 100, "min_time": float("inf")}

Contenders = dict[str, Callable[[], nn.Module]]


class Graphed(nn.Module):
    """Replays a CUDA graph of a model's inference, one per shape of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graphs: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.graphs:
            self.graphs[x.shape] = ck.make_graphed(self.model, x)
        return self.graphs[x.shape](x)


def contenders(
    name: str, mode: str, batch: int, options: argparse.Namespace, state: dict[str, Tensor]
) -> Contenders:
    """Name -> function that makes the model with these weights."""

    def ours(fused: bool, keep: str = "fast") -> nn.Module:
        model = crossvit.create_model(name, use_fused=fused, keep=keep, **size_option(options))
        model.load_state_dict(state)
        return model.to(options.device)

    def compiled(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: torch.compile(make(), mode=options.compile_mode, dynamic=False)

    makers: Contenders = {"ours, eager": lambda: ours(False), OURS: lambda: ours(True)}
    timm_model = timm_maker(name, options, state)
    if timm_model:
        makers = {"timm, eager": timm_model} | makers
    if options.device.type == "cuda" and mode == "train":
        makers["ours, fused, lean"] = lambda: ours(True, keep="lean")
    if options.device.type == "cuda" and mode == "inference" and batch <= GRAPHED:
        for contender in ("timm, eager", OURS):
            if contender in makers:
                make = makers[contender]
                makers[f"{contender}, graph"] = lambda make=make: Graphed(make())  # type: ignore[misc]
    if not options.no_compile:
        makers["ours, compiled"] = compiled(lambda: ours(False))
        if timm_model:
            makers["timm, compiled"] = compiled(timm_model)
    return makers


def timm_maker(
    name: str, options: argparse.Namespace, state: dict[str, Tensor]
) -> Callable[[], nn.Module] | None:
    """Return a maker of timm's model; None if timm lacks it or cannot run this size."""
    try:
        import timm
    except ImportError:
        return None
    if options.img_size or not timm.is_model(name):
        return None

    def make() -> nn.Module:
        model = timm.create_model(name)
        model.load_state_dict(state)
        return model.to(options.device)

    return make


def size_option(options: argparse.Namespace) -> dict[str, Any]:
    return {"img_size": options.img_size} if options.img_size else {}


class Runner:
    """Calls one model, for checking and timing."""

    def __init__(self, model: nn.Module, mode: str, dtype: torch.dtype, x: Tensor, y: Tensor):
        self.mode, self.dtype, self.x, self.y = mode, dtype, x, y
        self.training = mode == "train"
        self.model = model.train(self.training)
        if not self.training:
            self.model.to(dtype)
            self.x = x.to(dtype)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def loss(self, x: Tensor, y: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and the loss of the first ``count`` images."""
        autocast = self.dtype.itemsize == 2
        context = torch.autocast(x.device.type, self.dtype) if autocast else nullcontext()
        with context:
            logits = self.model(x)
            return logits, F.cross_entropy(logits[:count], y[:count])

    def results(self, count: int) -> list[Tensor]:
        """The first images' logits; in training also every gradient of their loss.

        All images pass through the model, as in the timed call.
        """
        if not self.training:
            with torch.no_grad():
                return [self.model(self.x)[:count]]
        logits, loss = self.loss(self.x, self.y, count)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return [logits[:count].detach(), *gradients]

    def __call__(self, _: int) -> object:
        if not self.training:
            with torch.no_grad():
                return self.model(self.x)
        _, loss = self.loss(self.x, self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def allowed(
    name: str, mode: str, options: argparse.Namespace, state: dict[str, Tensor], data: Any
) -> dict[str, measure.Tolerance]:
    """The exact results, and eager mode's error in the dtype of the run."""
    x, y = (t[:CHECKED] for t in data)
    results: list[list[Tensor]] = []
    parameters: list[str] = []
    for exact in (True, False):
        model = crossvit.create_model(name, **size_option(options))
        model.load_state_dict(state)
        model.to(options.device)
        parameters = [f"grad {key}" for key, _ in model.named_parameters()]
        dtype = torch.float64 if exact else DTYPES[options.dtype]
        if exact:  # from the weights and images of the run
            if mode == "inference":
                model.to(DTYPES[options.dtype])
                x = x.to(DTYPES[options.dtype])
            model.double()
        images = x.double() if exact else x
        results.append(Runner(model, mode, dtype, images, y).results(CHECKED))
    names = ["logits", *(parameters if mode == "train" else [])]
    return measure.tolerances(names, *results, DTYPES[options.dtype])


def measure_point(run: Contest, name: str, batch: int, mode: str) -> None:
    options = run.options
    torch.manual_seed(0)
    reference = crossvit.create_model(name, **size_option(options))
    state = reference.state_dict()
    embeds = reference.patch_embed
    height, width = (embeds[0] if isinstance(embeds, nn.ModuleList) else embeds).img_size
    gflop = 2e-9 * crossvit.count_macs(reference) * batch * (3 if mode == "train" else 1)
    matmul_gflops = run.ceilings.matmul_flops_per_second / 1e9

    def prepare() -> tuple[list[Contender], dict[str, measure.Tolerance]]:
        data = (
            torch.randn(batch, 3, height, width, device=options.device),
            torch.randint(1000, (batch,), device=options.device),
        )
        tolerances = allowed(name, mode, options, state, data)
        made = contenders(name, mode, batch, options, state)
        return [entry(key, make, mode, options, data) for key, make in made.items()], tolerances

    def complete(timed_rows: list[Row]) -> None:
        for row in timed_rows:
            row["images_per_second"] = batch / row["median_ms"] * 1e3
            row["mean_images_per_second"] = batch / row["mean_ms"] * 1e3
            row["gflops"] = gflop / row["median_ms"] * 1e3

    size = {"model": name, "img_size": [height, width], "batch": batch}
    run.point(
        MODES[mode],
        f"{name}, batch {batch}",
        prepare,
        {**size, "dtype": options.dtype, "mode": mode, "gflop": gflop},
        title=f"{name}, {height} x {width}, batch {batch}, {options.dtype}, {mode}: {gflop:.4g} "
        "GFLOP with keys and values in the fusions, "
        f"{gflop / matmul_gflops * 1e3:.4g} ms at the rate of matrix products",
        complete=complete,
    )


def entry(
    name: str, make: Callable[[], nn.Module], mode: str, options: argparse.Namespace, data: Any
) -> Contender:
    runner = Runner(make(), mode, DTYPES[options.dtype], *data)
    count = min(CHECKED, len(data[0]))
    return Contender(
        name,
        runner,
        results=lambda: runner.results(count),
        ours=name.startswith(OURS),
        captured=name.endswith("graph"),
        compiled=name.endswith("compiled"),
    )


def panels(rows: list[Row]) -> list[report.Panel]:
    plots = []
    points = dict.fromkeys((row["model"], row["batch"], row["mode"]) for row in rows)
    for model, batch, mode in points:
        series = {
            row["contender"]: [(float(batch), row["images_per_second"])]
            for row in rows
            if (row["model"], row["batch"], row["mode"]) == (model, batch, mode)
            and row["status"] == "ok"
        }
        title = f"{model}, batch {batch}, {mode}"
        plots.append(report.Panel(title, "batch", "images/s", series))
    return plots


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.benchmark_parser(
        __doc__,
        "models",
        min_time=20.0,
        repeats=100,
        modes=tuple(MODES),
        backends=False,
        plot=True,
        compile_mode="default",
        compile_budget=float("inf"),
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["crossvit_15_240"], help="names, or patterns of names")
    add("--batch", type=positive, nargs="+", default=[8])
    add("--img-size", type=positive, help="of the S branch; default: the model's own")
    add("--paper", action="store_true", help="the paper's protocol: batch 64, 100 iterations")
    options = command_line.completed(parser, arguments)
    names = [name for pattern in options.models for name in crossvit.list_models(pattern)]
    if not names:
        parser.error(f"--models: no model is called {' or '.join(options.models)}")
    options.models = list(dict.fromkeys(names))
    if options.paper:
        options.batch = [PAPER["batch"]]
        options.repeats, options.min_time = PAPER["repeats"], PAPER["min_time"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    def share_of_matmul(row: Row) -> str:
        return f"{row['gflops'] * 1e9 / run.ceilings.matmul_flops_per_second:.0%}"

    columns = {
        "images/s": lambda row: f"{row['images_per_second']:.4g}",
        "by mean": lambda row: f"{row['mean_images_per_second']:.4g}",
        "of matmul": share_of_matmul,
    }
    called = "CrossViT, fused"
    with Contest(options, called, columns, WORDS, panels=panels, headline=OURS) as run:
        for name in options.models:
            for batch in options.batch:
                for mode in command_line.modes_of(options, both=tuple(MODES)):
                    measure_point(run, name, batch, mode)
        return run.finish()


if __name__ == "__main__":
    sys.exit(main())

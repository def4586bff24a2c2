"""Whole CrossViT models: images a second and peak memory, inference and training step.

    python bench/model_bench.py --models crossvit_15_240 --batch 8

measures in one run our model fused, eager and eager under torch.compile, and, where timm is
installed, timm's eager and compiled. All have the same weights and see the same images. A model
whose logits or gradients are wrong, judged by eager mode's own error against float64, is not timed.

On a GPU small batches are measured in a CUDA graph as well, and training with the "lean" setting.
16-bit inference runs models cast to that dtype; 16-bit training runs autocast over float32 weights.
A training step is forward, cross-entropy, backward and AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import measure
import report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import crossvit
import crossvit_kernels as ck

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Images that correctness is checked with: float64 is slow.
CHECKED = 2
#: Largest batch that is measured in a CUDA graph as well.
GRAPHED = 8
PAPER = {"batch": 64, "repeats": 100, "min_time": float("inf")}

Contenders = dict[str, Callable[[], nn.Module]]


class Graphed(nn.Module):
    """Replays a CUDA graph of a model's inference, one for each shape of images."""

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
    """Name -> maker of the model with these weights."""

    def ours(fused: bool, keep: str = "fast") -> nn.Module:
        model = crossvit.create_model(name, use_fused=fused, keep=keep, **size_option(options))
        model.load_state_dict(state)
        return model.to(options.device)

    def compiled(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: torch.compile(make(), mode=options.compile_mode, dynamic=False)

    found: Contenders = {"ours, eager": lambda: ours(False), "ours, fused": lambda: ours(True)}
    timm_model = timm_maker(name, options, state)
    if timm_model:
        found = {"timm, eager": timm_model} | found
    if options.device.type == "cuda" and mode == "train":
        found["ours, fused, lean"] = lambda: ours(True, keep="lean")
    if options.device.type == "cuda" and mode == "inference" and batch <= GRAPHED:
        for contender in ("timm, eager", "ours, fused"):
            if contender in found:
                make = found[contender]
                found[f"{contender}, graph"] = lambda make=make: Graphed(make())  # type: ignore[misc]
    if not options.no_compile:
        found["ours, compiled"] = compiled(lambda: ours(False))
        if timm_model:
            found["timm, compiled"] = compiled(timm_model)
    return found


def timm_maker(
    name: str, options: argparse.Namespace, state: dict[str, Tensor]
) -> Callable[[], nn.Module] | None:
    """timm's model, where it is installed, has it, and can run this size."""
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
    """Calls of one model, as they are checked and timed."""

    def __init__(self, model: nn.Module, mode: str, dtype: torch.dtype, x: Tensor, y: Tensor):
        self.mode, self.dtype, self.x, self.y = mode, dtype, x, y
        self.training = mode == "train"
        self.model = model.train(self.training)
        if not self.training:
            self.model.to(dtype)
            self.x = x.to(dtype)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        autocast = self.dtype.itemsize == 2
        context = torch.autocast(x.device.type, self.dtype) if autocast else nullcontext()
        with context:
            logits = self.model(x)
            return logits, F.cross_entropy(logits, y)

    def results(self, count: int) -> list[Tensor]:
        """Logits; in training also all gradients, one after another."""
        if not self.training:
            with torch.no_grad():
                return [self.model(self.x[:count])]
        logits, loss = self.loss(self.x[:count], self.y[:count])
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return [logits.detach(), torch.cat([g.flatten() for g in gradients])]

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
    """The exact results, and what eager mode is off by in the dtype of the run."""
    x, y = (t[:CHECKED] for t in data)
    results = []
    for exact in (True, False):
        model = crossvit.create_model(name, **size_option(options))
        model.load_state_dict(state)
        model.to(options.device)
        dtype = torch.float64 if exact else DTYPES[options.dtype]
        if exact:  # from the weights and images that the run sees
            if mode == "inference":
                model.to(DTYPES[options.dtype])
                x = x.to(DTYPES[options.dtype])
            model.double()
        images = x.double() if exact else x
        results.append(Runner(model, mode, dtype, images, y).results(CHECKED))
    names = ("logits", "gradients")
    return {
        result: measure.Tolerance(exact, measure.error_of(eager, exact), DTYPES[options.dtype])
        for result, exact, eager in zip(names, *results, strict=False)
    }


def measure_point(
    name: str, batch: int, mode: str, options: argparse.Namespace, progress: measure.Progress
) -> list[dict[str, Any]]:
    """A row for each contender."""
    torch.manual_seed(0)
    reference = crossvit.create_model(name, **size_option(options))
    state = reference.state_dict()
    height, width = reference.patch_embed[0].img_size
    data = (
        torch.randn(batch, 3, height, width, device=options.device),
        torch.randint(1000, (batch,), device=options.device),
    )
    where = f"{name}, batch {batch}, {mode}"
    progress.stage(f"{where}: float64 reference")
    tolerances = allowed(name, mode, options, state, data)
    macs = crossvit.count_macs(reference)
    runners, rows = {}, {}
    for contender, make in contenders(name, mode, batch, options, state).items():
        progress.stage(f"{where}: {contender}: check")
        runner = Runner(make(), mode, DTYPES[options.dtype], *data)
        rows[contender] = {
            "model": name,
            "img_size": [height, width],
            "batch": batch,
            "dtype": options.dtype,
            "mode": mode,
            "contender": contender,
            "ours": contender.startswith("ours, fused"),
            "gflop": 2e-9 * macs * batch * (3 if mode == "train" else 1),
            **measure.judge(runner.results(min(CHECKED, batch)), tolerances),
        }
        if rows[contender]["status"] == "ok":
            runners[contender] = runner
    time_runners(runners, rows, where, options, progress)
    return list(rows.values())


def time_runners(
    runners: dict[str, Runner],
    rows: dict[str, dict[str, Any]],
    where: str,
    options: argparse.Namespace,
    progress: measure.Progress,
) -> None:
    """Adds what is measured to the rows."""
    for contender, runner in runners.items():
        progress.stage(f"{where}: {contender}: memory")
        runner(0)
        rows[contender]["extra_peak_bytes"] = measure.extra_peak_bytes(runner, options.device)
    progress.stage(f"{where}: timing")
    timings = measure.round_robin(
        runners,
        measure.Stopwatch(options.device),
        min_time=options.min_time,
        repeats=options.repeats,
        on_round=lambda index: progress.tick(f"{where}: round {index + 1}"),
    )
    baseline = timings.get("timm, eager", timings.get("ours, eager"))
    for contender, timing in timings.items():
        row = rows[contender]
        median = timing.quantile(0.5)
        row |= {
            "median_ms": median * 1e3,
            "mean_ms": statistics.fmean(timing.seconds) * 1e3,
            "p10_ms": timing.quantile(0.1) * 1e3,
            "p90_ms": timing.quantile(0.9) * 1e3,
            "rounds": len(timing.seconds),
            "images_per_second": row["batch"] / median,
            "mean_images_per_second": row["batch"] / statistics.fmean(timing.seconds),
            "gflops": row["gflop"] / median,
        }
        if baseline:
            row["speedup"] = timing.median_speedup(baseline)
        rows[contender] = row


def table(rows: list[dict[str, Any]], ceilings: measure.Ceilings) -> str:
    """One model at one batch in one mode."""
    first = rows[0]
    floor = first["gflop"] * 1e9 / ceilings.matmul_flops_per_second
    baseline = "timm" if any(row["contender"] == "timm, eager" for row in rows) else "eager"
    header = ["contender", "images/s", "by mean", "median ms", "10-90 %", f"vs {baseline}"]
    header += ["of matmul", "extra MiB", "error (eager's)"]
    lines = [
        [
            row["contender"],
            f"{row['images_per_second']:.4g}",
            f"{row['mean_images_per_second']:.4g}",
            f"{row['median_ms']:.4g}",
            f"{row['p10_ms']:.4g}-{row['p90_ms']:.4g}",
            f"{row['speedup']:.2f}x" if "speedup" in row else "-",
            f"{row['gflops'] * 1e9 / ceilings.matmul_flops_per_second:.0%}",
            f"{row['extra_peak_bytes'] / 2**20:.0f}",
            f"{row['error']:.1e} ({row['eager_error']:.1e})",
        ]
        for row in rows
        if row["status"] == "ok"
    ]
    wrong = [
        f"  {r['contender']}: {r['status']}: {r['reason']}" for r in rows if r["status"] != "ok"
    ]
    title = (
        f"\n{first['model']}, {first['img_size'][0]} x {first['img_size'][1]}, batch "
        f"{first['batch']}, {first['dtype']}, {first['mode']}: {first['gflop']:.4g} GFLOP with "
        f"keys and values in the fusions, {floor * 1e3:.4g} ms at the rate of matrix products"
    )
    return "\n".join([title, report.format_table(header, lines), *wrong])


def panels(rows: list[dict[str, Any]]) -> Iterator[report.Panel]:
    points = dict.fromkeys((row["model"], row["batch"], row["mode"]) for row in rows)
    for model, batch, mode in points:
        series = {
            row["contender"]: [(float(batch), row["images_per_second"])]
            for row in rows
            if (row["model"], row["batch"], row["mode"]) == (model, batch, mode)
            and row["status"] == "ok"
        }
        yield report.Panel(f"{model}, batch {batch}, {mode}", "batch", "images/s", series)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["crossvit_15_240"], help="names, or patterns of names")
    add("--batch", type=int, nargs="+", default=[8])
    add("--img-size", type=int, help="of the S branch, another than the models' own")
    add("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mode", choices=("inference", "train", "both"), default="both")
    add("--paper", action="store_true", help="the paper's protocol: batch 64, 100 iterations")
    add("--min-time", type=float, default=20.0, help="seconds to measure each mode for")
    add("--repeats", type=int, default=100, help="rounds at most")
    add("--compile-mode", help="of torch.compile")
    add("--no-compile", action="store_true", help="leave the compiled baselines out")
    add("--json", type=Path, metavar="PATH")
    add("--csv", type=Path, metavar="PATH")
    add("--plot", type=Path, metavar="PATH.png")
    add(
        "--save",
        action="store_true",
        help="write bench/results/<device>/<date>-models-<dtype>.json",
    )
    options = parser.parse_args(arguments)
    names = [name for pattern in options.models for name in crossvit.list_models(pattern)]
    if not names:
        parser.error(f"--models: no model is called {' or '.join(options.models)}")
    if min(options.batch) < 1:
        parser.error("--batch: expected at least 1")
    options.models = list(dict.fromkeys(names))
    options.device = torch.device(options.device)
    options.dtype = options.dtype or ("bfloat16" if options.device.type == "cuda" else "float32")
    if options.paper:
        options.batch = [PAPER["batch"]]
        options.repeats, options.min_time = PAPER["repeats"], PAPER["min_time"]
    return options


def save(
    options: argparse.Namespace, rows: list[dict[str, Any]], ceilings: measure.Ceilings
) -> None:
    facts = measure.environment(options.device)
    document = report.document("models", options, facts, ceilings, rows)
    if options.save:
        name = f"{facts['date'][:10]}-models-{options.dtype}.json"
        report.write_json(report.RESULTS / measure.device_slug(options.device) / name, document)
    if options.json:
        report.write_json(options.json, document)
    if options.csv:
        report.write_csv(options.csv, rows)
    if options.plot:
        report.plot(options.plot, list(panels(rows)), f"CrossViT on {facts['device']}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    progress = measure.Progress()
    progress.stage("speed of matrix products")
    ceilings = measure.measure_ceilings(options.device, DTYPES[options.dtype])
    modes = ("inference", "train") if options.mode == "both" else (options.mode,)
    rows: list[dict[str, Any]] = []
    verdicts: list[str] = []
    try:
        for name in options.models:
            for batch in options.batch:
                for mode in modes:
                    found = measure_point(name, batch, mode, options, progress)
                    rows += found
                    progress.clear()
                    print(table(found, ceilings), flush=True)
                    names = [row["contender"] for row in found]
                    eager = "timm, eager" if "timm, eager" in names else "ours, eager"
                    what = f"{name}, batch {batch}, {mode}"
                    verdicts.append(report.verdict(what, found, "speedup", eager))
    finally:  # what was measured before a fault or Ctrl-C is kept
        if rows:
            save(options, rows, ceilings)
    print("\n" + "\n".join(verdicts))
    wrong = [row for row in rows if row["ours"] and row["status"] != "ok"]
    for row in wrong:
        print(f"ERROR: {row['model']} {row['mode']}: {row['reason']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

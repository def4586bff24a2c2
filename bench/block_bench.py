"""A transformer block's two halves, LayerNorm-MSA and LayerNorm-FFN: ours against PyTorch.

    python bench/block_bench.py

measures in one run the reference (matmul, softmax, matmul), the composition of torch's LayerNorm,
matrix products and SDPA, both under torch.compile, and ours; forward, and forward with backward,
for both branches of a named model. The first row of ours is what users get: the form that the
tables choose, with keep="fast". Beside each time stand the floor (the time of its FLOP at the rate
of matrix products, or of reading x and writing y at the rate of a copy, whichever is longer) and
what a call allocates. A result that is wrong, output or any gradient, is reported and not timed.

    python bench/block_bench.py --frozen

trains with frozen weights, whose gradients nobody asks for, as when only heads are fine-tuned, and

    python bench/block_bench.py --preset few-rows

takes one image of few tokens at wide C.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
import report
import torch
import torch.nn.functional as F
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels.gpu import row_tiles
from crossvit_kernels.ops.layernorm_msa.op import BACKENDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-6
#: Model: width of S (L is twice as wide), heads, hidden units per channel.
WIDTHS = {
    "Ti": (96, 3, 4),
    "S": (192, 6, 4),
    "B": (384, 12, 4),
    "9": (128, 4, 3),
    "15": (192, 6, 3),
    "18": (224, 7, 3),
}
#: Contender: what runs it, forward and backward; the others run as the tables choose.
FORM_OF = {f"ours (triton, {form})": form for form in ("fused", "split", "library")}
TOKENS = {"S": 401, "L": 197}  # at 240 pixels, CLS counted in

Call = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One branch at one batch."""

    model: str
    branch: str
    batch: int
    tokens: int
    channels: int
    heads: int
    hidden: int

    def shapes(self, half: str) -> list[tuple[int, ...]]:
        """Of the weights."""
        c, f = self.channels, self.hidden
        rows = 3 * c if half == "msa" else f
        terms = c if half == "msa" else f
        return [(c,), (c,), (rows, c), (rows,), (c, terms), (c,)]

    def names(self, half: str) -> tuple[str, ...]:
        """Of the weights."""
        return ck.MsaWeights._fields if half == "msa" else ck.FfnWeights._fields

    def flop(self, half: str) -> float:
        """Of the matrix products, forward."""
        rows, c = self.batch * self.tokens, self.channels
        if half == "ffn":
            return 4.0 * rows * c * self.hidden
        return 8.0 * rows * c * c + 4.0 * rows * self.tokens * c

    def floor_seconds(self, half: str, train: bool, size: int, limits: measure.Ceilings) -> float:
        """Backward has twice the products of forward, and reads x and dy and writes dx."""
        token_matrix = self.batch * self.tokens * self.channels * size
        by_bytes = (5 if train else 2) * token_matrix / limits.copy_bytes_per_second
        return max(by_bytes, self.flop(half) * (3 if train else 1) / limits.matmul_flops_per_second)


def sdpa_msa(x: Tensor, weights: Sequence[Tensor], heads: int) -> Tensor:
    w = ck.MsaWeights(*weights)
    normed = F.layer_norm(x, x.shape[-1:], w.norm_weight, w.norm_bias, EPS)
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + F.linear(attended, w.out_weight, w.out_bias)


def contenders(half: str, sizes: Sizes, options: argparse.Namespace) -> dict[str, Call]:
    """Name -> y of x and weights; eager first."""

    def ours(backend: str, keep: str = "fast") -> Call:
        def call(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
            if half == "ffn":
                return ck.layernorm_ffn(x, ck.FfnWeights(*weights), EPS, backend=backend)
            w = ck.MsaWeights(*weights)
            return ck.layernorm_msa(x, w, sizes.heads, EPS, keep=keep, backend=backend)

        return call

    calls = {"eager": ours("reference")}
    if half == "msa":
        calls["SDPA"] = lambda x, w: sdpa_msa(x, w, sizes.heads)
    if not options.no_compile:
        for name, call in list(calls.items()):
            calls[f"{name}, compiled"] = torch.compile(
                call, mode=options.compile_mode, dynamic=False
            )
    for backend in options.backends:
        if backend == "triton":
            calls["ours (triton)"] = ours(backend)
            calls |= {name: ours(backend) for name in FORM_OF}
            if half == "msa":
                calls["ours (triton, lean)"] = ours(backend, keep="lean")
        else:
            calls[f"ours ({backend})"] = ours(backend)
    return calls


class Runner:
    """Calls of one contender, as they are checked and timed."""

    def __init__(
        self,
        call: Call,
        x: Tensor,
        weights: list[Tensor],
        dy: Tensor,
        train: bool,
        form: str = "auto",
    ) -> None:
        self.call, self.x, self.weights, self.dy = call, x, weights, dy
        self.train, self.form = train, form
        self.wanted = [t for t in (x, *weights) if t.requires_grad]

    def __call__(self, _: int) -> object:
        return self.results()

    def results(self) -> list[Tensor]:
        """y; in training also the gradients of x and of weights that are not frozen."""
        with row_tiles.FORMS.choose(self.form), torch.set_grad_enabled(self.train):
            y = self.call(self.x, self.weights)
            gradients = torch.autograd.grad(y, self.wanted, self.dy) if self.train else ()
            return [y, *gradients]


def measure_half(
    half: str, sizes: Sizes, mode: str, options: argparse.Namespace, limits: measure.Ceilings
) -> list[dict[str, Any]]:
    """A row for each contender."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x = random(sizes.batch, sizes.tokens, sizes.channels).requires_grad_()
    weights = [
        (random(*s) * (s[1] ** -0.5 if len(s) == 2 else 0.1)).requires_grad_(not options.frozen)
        for s in sizes.shapes(half)
    ]
    dy, train = random(*x.shape), mode == "train"
    calls = contenders(half, sizes, options)
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, *weights)]
    exact = Runner(calls["eager"], doubles[0], doubles[1:], dy.double(), train).results()
    eager = Runner(calls["eager"], x, weights, dy, train).results()
    tolerances = {
        name: measure.Tolerance(e, measure.error_of(result, e), dtype)
        for name, e, result in zip(("y", "dx", *sizes.names(half)), exact, eager, strict=False)
    }
    floor = sizes.floor_seconds(half, train, dtype.itemsize, limits)
    rows, runners = {}, {}
    for name, call in calls.items():
        runner = Runner(call, x, weights, dy, train, FORM_OF.get(name, "auto"))
        rows[name] = dataclasses.asdict(sizes) | {
            "half": half,
            "mode": mode,
            "dtype": options.dtype,
            "contender": name,
            "floor_ms": floor * 1e3,
            "frozen": options.frozen,
            **measure.judge([t.detach().clone() for t in runner.results()], tolerances),
        }
        if rows[name]["status"] == "ok":
            rows[name]["extra_peak_bytes"] = measure.extra_peak_bytes(runner, device)
            runners[name] = runner
    timings = measure.round_robin(
        runners,
        measure.Stopwatch(device),
        min_time=options.min_time,
        repeats=options.repeats,
    )
    for name, timing in timings.items():
        seconds = timing.quantile(0.5)
        rows[name] |= {
            "median_ms": seconds * 1e3,
            "p10_ms": timing.quantile(0.1) * 1e3,
            "p90_ms": timing.quantile(0.9) * 1e3,
            "host_us": sum(timing.host) / len(timing.host) * 1e6 if timing.host else None,
            "share_of_floor": floor / seconds,
            "times_eager": timing.median_speedup(timings["eager"]),
        }
    return list(rows.values())


_HEADER = ("branch", "batch", "half", "mode", "contender", "median ms", "floor ms", "of floor")
_HEADER += ("vs eager", "host us", "MiB")


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{r['model']} {r['branch']}",
        str(r["batch"]),
        r["half"],
        r["mode"],
        r["contender"],
        f"{r['median_ms']:.4g}",
        f"{r['floor_ms']:.4g}",
        f"{r['share_of_floor']:.0%}",
        f"{r['times_eager']:.2f}x",
        "-" if r["host_us"] is None else f"{r['host_us']:.0f}",
        f"{r['extra_peak_bytes'] / 2**20:.4g}",
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=WIDTHS, default=["15"], help="whose widths")
    add("--branches", nargs="+", choices=tuple(TOKENS), default=list(TOKENS))
    add("--batch", type=int, nargs="+", default=[256 if cuda else 16])
    add("--tokens", type=int, help="of both branches, rather than those at 240 pixels")
    add("--frozen", action="store_true", help="train without gradients of the weights")
    add("--preset", choices=("few-rows",), help="one image of 50 to 400 tokens at C = 768 and 1024")
    add("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    add("--device", default="cuda" if cuda else "cpu")
    add("--backends", nargs="+", choices=tuple(BACKENDS), help="all that suit the device")
    add("--mode", choices=("forward", "train", "both"), default="both")
    add("--min-time", type=float, default=3.0, help="seconds for each mode")
    add("--repeats", type=int, default=1000, help="rounds at most")
    add("--compile-mode", default="max-autotune" if cuda else "default")
    add("--no-compile", action="store_true", help="leave the compiled baselines out")
    add("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    if options.backends is None:
        usable, on_cpu = ck.backends(), options.device == "cpu"
        options.backends = [n for n in BACKENDS if usable[n] and (n == "cpu") == on_cpu]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    limits = measure.measure_ceilings(device, DTYPES[options.dtype])
    modes = ("forward", "train") if options.mode == "both" else (options.mode,)
    rows: list[dict[str, Any]] = []
    verdicts = []
    for sizes in all_sizes(options):
        for half in ("msa", "ffn"):
            for mode in modes:
                found = measure_half(half, sizes, mode, options, limits)
                rows += found
                what = f"{sizes.model} {sizes.branch}, batch {sizes.batch}, {half}, {mode}"
                verdicts.append(report.verdict(what, found, "times_eager"))
                save(options, device, limits, rows)
    print(f"{measure.device_name(device)}, torch {torch.__version__}, {options.dtype}")
    right = [r for r in rows if r["status"] == "ok"]
    print(report.format_table(_HEADER, [_row(r) for r in right]))
    print("\n" + "\n".join(verdicts))
    wrong = [r for r in rows if r["status"] != "ok"]
    for r in wrong:
        where = f"{r['model']} {r['branch']}, batch {r['batch']}, {r['half']} {r['mode']}"
        print(f"WRONG RESULT, not timed: {where}: {r['contender']}: {r['reason']}", file=sys.stderr)
    return 1 if any(r["contender"].startswith("ours") for r in wrong) else 0


def all_sizes(options: argparse.Namespace) -> Iterator[Sizes]:
    """What is to be measured."""
    if options.preset == "few-rows":
        for channels, heads in ((768, 12), (1024, 16)):
            for tokens in (50, 100, 200, 400):
                name = f"C {channels},"
                yield Sizes(name, f"N {tokens}", 1, tokens, channels, heads, 4 * channels)
        return
    for model in options.models:
        small, heads, ratio = WIDTHS[model]
        for branch in options.branches:
            channels = small if branch == "S" else 2 * small
            tokens = options.tokens or TOKENS[branch]
            for batch in options.batch:
                yield Sizes(model, branch, batch, tokens, channels, heads, ratio * channels)


def save(
    options: argparse.Namespace,
    device: torch.device,
    limits: measure.Ceilings,
    rows: list[dict[str, Any]],
) -> None:
    """After every point: what was measured is kept, whatever happens to the rest."""
    if options.json:
        document = report.document("blocks", options, measure.environment(device), limits, rows)
        report.write_json(options.json, document)


if __name__ == "__main__":
    sys.exit(main())

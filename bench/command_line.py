"""The command line that the benchmarks share."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    """Accepts only full option names, and suggests the closest match for an unknown one."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain(unknown))
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all options\n")

    def _explain(self, unknown: Sequence[str]) -> str:
        names = [name for action in self._actions for name in action.option_strings]
        text = f"unknown argument {' '.join(unknown)}"
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        return f"{text}; is {close[0]} meant?" if close else text


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}")
    return value


def benchmark_parser(
    description: str | None,
    benchmark: str,
    *,
    min_time: float,
    repeats: int,
    modes: Sequence[str] = ("forward", "train"),
    frozen: bool = False,
    backends: bool = True,
    plot: bool = False,
    compile_mode: str | None = None,
    compile_budget: float | None = None,
) -> Parser:
    """Return a parser with the options that all benchmarks share.

    Args:
        description: Text at the top of --help.
        benchmark: Name in results and their files.
        min_time: Default of --min-time.
        repeats: Default of --repeats.
        modes: Choices of --mode.
        frozen: Whether to add --frozen.
        backends: Whether to add --backends.
        plot: Whether to add --plot.
        compile_mode: Default of --compile-mode; None depends on the device.
        compile_budget: Default of --compile-budget, likewise.
    """
    parser = Parser(description)
    parser.set_defaults(benchmark=benchmark)
    add_modes(parser, modes, frozen)
    if backends:
        add_backends(parser)
    add = parser.add_argument_group("where and how").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")
    usual = compile_mode or "default on a CPU, max-autotune on a GPU"
    add("--compile-mode", default=compile_mode, help=f"of torch.compile: {usual}")
    timed = {"type": seconds, "metavar": "SECONDS"}
    text = "of compilation, after which no other starts"
    add("--compile-budget", default=compile_budget, help=text, **timed)
    add("--no-compile", action="store_true", help="leave the compiled baselines out")
    add("--min-time", default=min_time, help=f"measuring time of each mode ({min_time:g})", **timed)
    add("--repeats", type=positive, default=repeats, help=f"maximum number of rounds ({repeats})")
    add = add_files(parser)
    add("--csv", type=Path, metavar="PATH")
    if plot:
        add("--plot", type=Path, metavar="PATH.png")
    return parser


def add_files(parser: Parser) -> Callable[..., Any]:
    """Add the options of report.save; return the function that adds more to their group."""
    add = parser.add_argument_group("files").add_argument
    add("--json", type=Path, metavar="PATH", help="results and environment")
    name = f"<date>-{parser.get_default('benchmark')}-<dtype>.json"
    add("--save", action="store_true", help=f"write bench/results/<device>/{name}")
    return add


def add_modes(parser: Parser, modes: Sequence[str], frozen: bool) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--mode", choices=(*modes, "both"), default="both")
    if frozen:
        group.add_argument(
            "--frozen",
            action="store_const",
            const="frozen",
            dest="mode",
            default="both",
            help="fine-tuning with frozen weights: backward to the inputs, and to a head only",
        )


def modes_of(options: argparse.Namespace, both: Sequence[str] = ("forward", "train")) -> list[str]:
    """The modes selected by --mode or --frozen."""
    several = {"both": [*both], "frozen": ["frozen", "heads"]}
    return several.get(options.mode, [options.mode])


def add_backends(parser: Parser) -> None:
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help='of ours: "auto" is what a user gets who names none; all (auto, and each that suits '
        "the device), none, or names",
    )


def completed(
    parser: Parser, arguments: Sequence[str] | None, operation: Iterable[str] | None = None
) -> argparse.Namespace:
    """Parse and complete the options; ``operation`` lists the backends that have kernels for it."""
    options: argparse.Namespace = parser.parse_args(arguments)
    try:
        complete(options)
        if operation is not None:
            complete_backends(options, list(operation))
    except ValueError as error:
        parser.error(str(error))
    return options


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on the device; raise ValueError for options that do not fit it."""
    options.device = usable_device(options.device)
    on_gpu = options.device.type == "cuda"
    if on_gpu and options.device.index is not None:
        torch.cuda.set_device(options.device)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.compile_mode = options.compile_mode or ("max-autotune" if on_gpu else "default")
    if options.compile_budget is None:
        options.compile_budget = 300.0 if on_gpu else 60.0
    if getattr(options, "plot", None) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")


def usable_device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not has_cuda:
        raise ValueError(f"--device {name}: torch finds no CUDA device")
    if (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def complete_backends(options: argparse.Namespace, available: Sequence[str]) -> None:
    """Replace "all" and "none"; ``available`` are the backends that have kernels for the operation.

    ``options.named`` are those requested by name: it is a failure if they decline.
    """
    import crossvit_kernels as ck  # the suite parses before it builds it

    usable = ck.backends()
    names: list[str] = options.backends
    if names in (["all"], ["none"]):
        on_cpu = options.device.type == "cpu"
        # On a CPU the other backends are for tests: an interpreter is not a contender.
        unsuited = ("cuda", "triton") if on_cpu else ("cpu",)
        suited = [n for n in available if usable[_of(n)] and _of(n) not in unsuited]
        options.backends, options.named = ["auto", *suited] if names == ["all"] else [], []
        return
    for name in names:
        if name not in ("auto", *available, "reference"):
            expected = ", ".join(["all", "none", "auto", *available, "reference"])
            raise ValueError(f"--backends {name}: expected one of {expected}")
        if not usable.get(_of(name), True):
            raise ValueError(f"--backends {name}: {usable.reasons[_of(name)]}")
    options.named = options.backends = list(dict.fromkeys(names))


def _of(name: str) -> str:
    """The backend of a kernel variant such as triton:split."""
    return name.partition(":")[0]

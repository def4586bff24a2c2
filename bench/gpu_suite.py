"""All GPU tests and benchmarks in one command: ``python bench/gpu_suite.py OUT``.

Builds, then tests on the device and under a sanitizer, several at once, then every benchmark with
every baseline, one by one. Each stage writes its log and results to OUT. The most important stages
come first, and the command stops after ``--seconds``; rerun it to resume, as finished stages are
skipped. A stage that fails or times out does not stop the others. ``--dry-run`` runs all kinds of
stages on a CPU with tiny sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command_line
import report
from sizes import TOKENS, WIDTHS

ROOT = Path(__file__).resolve().parents[1]
BENCH = Path("bench")
MODELS = tuple(
    f"crossvit_{name}_240"
    for name in ("15", "tiny", "small", "base", "9", "18", "9_dagger", "15_dagger", "18_dagger")
)
#: Models whose widths are measured, in this order; CrossViT-S has those of 15.
WIDTH_NAMES = ("15", "Ti", "B", "9", "18")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command to run in the repository's root."""

    name: str
    command: tuple[str, ...]
    seconds: int  # timeout
    group: str = ""  # neighbours of a group run at the same time: nothing is timed in them


def stages(out: Path, dry: bool) -> list[Stage]:
    """All stages, the most important first."""
    python = sys.executable
    device = "cpu" if dry else "cuda"
    quick = "1" if dry else "0.5"
    build = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".")
    suite = [] if dry else [Stage("build", build, 120), *compilation()]
    return [
        *suite,
        *_tests(dry),
        *_benchmarks(out, device, quick, dry),
        _paper_tables(out, device, dry),
    ]


def _tests(dry: bool) -> list[Stage]:
    """Everything that says whether kernels are right; in a dry run one stage of each kind."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    spread = () if dry else ("-n", str(max(1, (os.cpu_count() or 1) // 3)))
    few = ("-k", "few_tokens or huge_scores or why_not") if dry else ()
    operations = ("attention_core_{}", "cross_attention_{}", "layernorm_blocks_{}")
    of_cuda = [f"tests/ops/test_{name.format('cuda')}.py" for name in operations]
    of_triton = [f"tests/ops/test_{name.format('triton')}.py" for name in operations[1:]]
    of_both = [
        f"tests/ops/test_{name}.py" for name in ("attention_core_gpu", "cross_attention_pair")
    ]
    suite = [
        Stage("imports", (sys.executable, "-m", "crossvit_kernels"), 60, "tests"),
        _verification(dry),
        Stage(
            "tests", (*pytest, *spread, *few, "tests/gpu", *(of_both if dry else ())), 200, "tests"
        ),
    ]
    if not dry:
        suite.append(Stage("tests-cuda", (*pytest, *spread, *of_cuda), 200, "tests"))
        suite.append(Stage("tests-triton", (*pytest, *spread, *of_both, *of_triton), 200, "tests"))
    if dry or shutil.which("compute-sanitizer"):
        tool = () if dry else ("compute-sanitizer", "--error-exitcode", "9")
        which = ("-k", "few_tokens") if dry else ()
        command = (*tool, *pytest, "-m", "sanitizer", *which, "tests/ops")
        suite.append(Stage("sanitizer", command, 200, "tests"))
    return suite


def _verification(dry: bool) -> Stage:
    """Compare every kernel with the reference, before anything is measured."""
    sizes = ("--channels", "16", "--batch", "1", "--tokens", "5") if dry else ()
    only = ("--backends", "cpu") if dry else ()
    return Stage(
        "verify", (sys.executable, "-m", "crossvit_kernels.verify", *sizes, *only), 200, "tests"
    )


def compilation() -> list[Stage]:
    """Compile Triton's kernels on all cores, into the cache that launches use."""
    import torch

    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    command = (sys.executable, "-m", "crossvit_kernels.inspect", "--arch", f"{major}{minor}")
    return [Stage("compile", (*command, "--processes", str(os.cpu_count())), 120)]


def _benchmarks(out: Path, device: str, quick: str, dry: bool) -> list[Stage]:
    """The benchmarks: CrossViT-15 with the compiled baselines first, then the rest."""
    python = sys.executable
    few = ("--min-time", quick, *(("--repeats", "3") if dry else ()))
    batches = ("1", "2") if dry else ("1", "8", "64", "256", "1024")

    def stage(name: str, program: str, seconds: int, *options: str) -> Stage:
        command = (python, str(BENCH / program), "--device", device, *few, *options)
        return Stage(name, (*command, "--json", str(out / f"{name}.json")), seconds)

    def core() -> Stage:
        small_widths = [WIDTHS[name].channels for name in WIDTH_NAMES]
        channels = dict.fromkeys(str(c) for small in small_widths for c in (small, 2 * small))
        sizes = ("--tokens", "9") if dry else ()
        options = ("--channels", *(("16",) if dry else channels), "--batch", *batches, *sizes)
        return stage("core", "core_bench.py", 90, *options, "--no-compile")

    def fusions(name: str, compiled: bool) -> list[Stage]:
        small, heads, _ = WIDTHS[name]
        shapes = []
        for branch, dim, own in (("S", small, 2 * small), ("L", 2 * small, small)):
            title = f"fusion-{name}-{branch}"
            options = (
                *("--dim", str(dim), "--own-dim", str(own), "--heads", str(heads)),
                *("--tokens", "9" if dry else str(TOKENS[branch])),
                *("--sweep", f"batch={','.join(batches)}"),
                *(("--compile-budget", "60") if compiled else ("--no-compile",)),
                *(() if dry else ("--plot", str(out / f"{title}.png"))),
            )
            shapes.append(stage(title, "fusion_bench.py", 110 if compiled else 30, *options))
        pair = (
            *("--dim", str(small), "--own-dim", str(2 * small), "--heads", str(heads)),
            *("--tokens", "9" if dry else str(TOKENS["S"])),
            *("--pair-tokens", "5" if dry else str(TOKENS["L"])),
            *("--sweep", f"batch={','.join(batches[:3])}", "--no-compile"),
        )
        return [*shapes, stage(f"fusion-{name}-pair", "fusion_bench.py", 30, *pair)]

    def blocks(name: str, compiled: bool) -> Stage:
        if dry:
            options = ("--branches", "S", "--tokens", "9", "--batch", "1", "--repeats", "1")
            options += ("--mode", "train", "--backends", "auto", "cpu", "triton", "--no-compile")
        elif compiled:
            options = ("--batch", "1", "64", "256")
        else:
            options = ("--batch", "256", "--no-compile")
        seconds = 120 if compiled else 30
        return stage(f"blocks-{name}", "block_bench.py", seconds, "--models", name, *options)

    def models(model: str, compiled: bool) -> list[Stage]:
        if dry:
            only = ("--models", model, "--batch", "1", "--img-size", "24", "--no-compile")
            return [stage(f"models-{model}", "model_bench.py", 90, *only)]
        modes = {"inference": ("1", "64", "256"), "train": ("256",)}
        return [
            stage(
                f"models-{model}-{mode}" if compiled else f"models-{model}-{mode}-first",
                "model_bench.py",
                150 if compiled else 40,
                *("--models", model, "--mode", mode, "--batch", *batch),
                *(("--compile-mode", "max-autotune") if compiled else ("--no-compile",)),
            )
            for mode, batch in modes.items()
        ]

    if dry:
        suite = [core(), *fusions("Ti", False), blocks("Ti", False)]
        return suite + models("crossvit_tiny_240", False)
    first, *others = WIDTH_NAMES
    times = (python, str(BENCH / "kernel_times.py"), "--json", str(out / "kernel-times.json"))
    suite = [Stage("kernel-times", times, 120)]
    suite += [core(), *fusions(first, True), blocks(first, True)]
    suite += models(MODELS[0], False) + models(MODELS[0], True)
    for name in others:
        suite += [*fusions(name, False), blocks(name, False)]
    for model in MODELS[1:]:
        suite += models(model, True)
    return suite


def _paper_tables(out: Path, device: str, dry: bool) -> Stage:
    """The paper's throughputs beside DeiT's; in a dry run only what is counted."""
    which = ("--tables", "1") if dry else ("--tables", "2,4", "--throughput")
    files = ("--json", str(out / "paper-tables.json"), "--markdown", str(out / "paper-tables.md"))
    program = str(BENCH / "paper_tables.py")
    return Stage("paper-tables", (sys.executable, program, "--device", device, *which, *files), 150)


def run(stage: Stage, out: Path, limit: float) -> tuple[int, float]:
    """Run a stage; return its exit status, 124 on timeout, and seconds.

    Interrupted programs save their rows.
    """
    began = time.monotonic()
    status = _wait(stage, out, limit)
    return status, round(time.monotonic() - began, 1)


#: What runs, each in a process group of its own, which Ctrl-C does not reach.
_running: set[subprocess.Popen[bytes]] = set()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Pass Ctrl-C on to what runs."""
    try:
        yield
    except KeyboardInterrupt:
        for process in [*_running]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        raise


def _wait(stage: Stage, out: Path, limit: float) -> int:
    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        _running.add(process)
        try:
            return _status(process, limit)
        finally:
            _running.discard(process)


def _status(process: subprocess.Popen[bytes], limit: float) -> int:
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    for sign, grace in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        os.killpg(process.pid, sign)
        try:
            process.wait(grace)
            break
        except subprocess.TimeoutExpired:
            continue
    return 124


def say(stage: Stage, what: str) -> None:
    print(f"{stage.name:28} {what}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line.Parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for logs and results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument(
        "--seconds", type=command_line.positive, default=515, help="for all stages together"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, even if done")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "stages.json"
    done: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    if options.dry_run:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    end = time.monotonic() + options.seconds
    for _, group in itertools.groupby(stages(out, options.dry_run), lambda s: s.group or s.name):
        todo = []
        for stage in group:
            if options.only is not None and stage.name not in options.only:
                continue
            if options.only is None and done.get(stage.name, {}).get("status") == 0:
                say(stage, "done before")
            elif time.monotonic() > end:
                say(stage, "no time left")
            else:
                todo.append(stage)
        if not todo:
            continue
        scale = 5 if options.dry_run else 1  # a CPU may be shared and busy
        left = end - time.monotonic()
        limits = [min(scale * stage.seconds, left) for stage in todo]
        with ThreadPoolExecutor(len(todo)) as pool, _interruptible():
            results = pool.map(run, todo, itertools.repeat(out), limits)
            for stage, (status, seconds) in zip(todo, results, strict=True):
                done[stage.name] = {"status": status, "seconds": seconds}
                report.write_json(path, done)
                say(stage, f"status {status:4} after {seconds:6.1f} s")
    return 0 if all(entry["status"] == 0 for entry in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

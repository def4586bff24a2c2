"""``calibrate``: measures the backends on the calls of a model, then the model as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels.backends import order
from crossvit_kernels.calibration import store
from crossvit_kernels.calibration.progress import Progress
from crossvit_kernels.calibration.store import Call, Signature
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.verify import state
from crossvit_kernels.verify.compare import map_tensors, tensors_of

#: A backend replaces the table's choice only if it is faster by this share.
MARGIN = 0.03
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50

Run = Callable[[], object]


@dataclasses.dataclass
class Measured:
    """A call's times.

    Attributes:
        signature: Of the calls.
        usual: The backend that the table chooses.
        choice: The backend that was kept.
        seconds: Median by backend, of those that passed verification.
    """

    signature: Signature
    usual: str
    choice: str
    seconds: dict[str, float]


@dataclasses.dataclass
class Calibration:
    """What ``calibrate`` found.

    Attributes:
        calls: Of each different call of the model.
        model: Median seconds of the model: "fused", "eager", and "compiled" if asked for.
        choice: How the model was set to run: the fastest of these.
        unmeasured: Different calls for which there was no time.
    """

    calls: list[Measured]
    model: dict[str, float]
    choice: str
    unmeasured: int = 0

    def __str__(self) -> str:
        lines = [f"{'call':58} {'times in ms':44} {'choice':10} gain"]
        for call in self.calls:
            s = call.signature
            name = f"{s.operation} {'train' if s.training else 'forward'} N {s.num_tokens} "
            name += f"{'x'.join(map(str, s.sizes))} class {s.batch_class}"
            gain = (
                call.seconds[call.usual] / call.seconds[call.choice]
                if call.usual in call.seconds
                else 1
            )
            lines.append(f"{name:58} {_shown(call.seconds):44} {call.choice:10} {gain:.2f}x")
        if self.unmeasured:
            lines.append(
                f"{self.unmeasured} more calls were not measured: the budget was too small"
            )
        if self.model:
            lines.append(f"{'the whole model':58} {_shown(self.model):44} {self.choice}")
        return "\n".join(lines)


def _shown(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {s * 1e3:.3f}" for name, s in seconds.items())


def calibrate(
    model: nn.Module,
    *example: Tensor,
    training: bool = False,
    budget_s: float = 60.0,
    compare_compiled: bool = False,
    quiet: bool = False,
) -> Calibration:
    """Measure what runs a model fastest on this machine, and set the model to it.

    The model runs once, and its calls of this library's operations are recorded. For each different
    one, all backends that pass verification and the reference are measured in turn and repeatedly.
    The fastest is written to a file that later calls and processes read (``store.file``): calls
    of these shapes, or of near ones, then run on it. Last, the fused model is compared with eager
    mode, and is set to the faster. Parameters, buffers, gradients, mode and random state are
    unchanged.

    Args:
        model: One with this library's modules, such as a CrossViT. Calls that name a backend are
            left alone.
        *example: Its arguments, in the sizes to optimise for.
        training: Measure forward and backward rather than inference.
        budget_s: Seconds for all measurements, besides verification and the first, recorded run.
        compare_compiled: Also compare with ``torch.compile`` of eager mode, compilation outside of
            the budget; if it is the fastest, the model is set to it (``model.compile()``).
        quiet: Print neither progress nor table.

    Returns:
        The measurements; ``print`` shows a table of them.

    Raises:
        TypeError: model is no module.
        ValueError: There is no example, or the budget is not positive.
        KeyboardInterrupt: As ever; what was measured so far is in the file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if not example:
        raise ValueError("example: expected the model's arguments, found none")
    if not budget_s > 0:
        raise ValueError(f"budget_s: expected seconds above 0, found {budget_s}")
    run_model = functools.partial(_run_model, model, example, training)
    with unchanged(model, training):
        set_fused(model, True)
        calls = _recorded(run_model)
        end = time.monotonic() + budget_s
        with Progress(len(calls) + 1, quiet) as progress:
            measured: list[Measured] = []
            for i, call in enumerate(calls):
                left = end - time.monotonic()
                if left <= 0:
                    break
                progress.step(call.signature.operation)
                measured.append(_measure_call(call, 0.6 * left / (len(calls) - i)))
            progress.step("the whole model")
            times = _measure_model(model, run_model, end, compare_compiled)
    choice = min(times, key=lambda name: times[name])
    set_fused(model, choice == "fused")
    if choice == "compiled":
        model.compile()
    result = Calibration(measured, times, choice, len(calls) - len(measured))
    if not quiet:
        print(result)
    return result


def set_fused(model: nn.Module, fused: bool) -> None:
    """Set a model's modules to the kernels, or to eager mode; named backends stay."""
    if hasattr(model, "set_fused"):
        keep = next((m.keep for m in model.modules() if hasattr(m, "keep")), "fast")
        switch: Any = model.set_fused
        switch(fused, getattr(model, "backend", None) if fused else None, keep=keep)
        return
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "backend")]
    for module in modules:
        if not fused and module.backend is None:
            module.backend = "reference"
        elif fused and module.backend == "reference":
            module.backend = None


@contextlib.contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """Restore modes, buffers and the random state; after an error also what the modules run."""
    modes = {module: module.training for module in model.modules()}
    settings = [
        (module, name, getattr(module, name))
        for module in modes
        for name in ("backend", "use_fused")
        if hasattr(module, name)
    ]
    buffers = {b: b.clone() for b in model.buffers()}
    devices = sorted({t.get_device() for t in (*model.parameters(), *buffers) if t.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            model.train(training)
            yield
    except BaseException:
        for module, name, value in settings:
            setattr(module, name, value)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _run_model(model: nn.Module, example: tuple[Tensor, ...], training: bool) -> object:
    with torch.set_grad_enabled(training):
        outputs = model(*example)
        return backward(outputs, list(model.parameters())) if training else outputs


def backward(outputs: Any, leaves: list[Tensor]) -> object:
    """Compute gradients without adding them to ``.grad``."""
    given = tensors_of(tuple(outputs) if isinstance(outputs, list) else outputs)
    outs = [t for t in given if t.requires_grad]
    wanted = [t for t in leaves if t.requires_grad]
    if not outs or not wanted:
        return None
    grads = [torch.ones_like(t) for t in outs]
    return torch.autograd.grad(outs, wanted, grads, allow_unused=True)


def _recorded(run_model: Run) -> list[Call]:
    """Return the different calls of a model, in their order."""
    found: dict[tuple[Signature, torch.device], Call] = {}

    def record(call: Call) -> None:
        key = call.signature, call.device
        if key not in found:
            values = map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), call.values)
            found[key] = call._replace(values=values)

    previous, store.recorder = store.recorder, record
    try:
        run_model()
    finally:
        store.recorder = previous
    return list(found.values())


def _measure_call(call: Call, budget_s: float) -> Measured:
    runs = {name: functools.partial(_run_call, call, name) for name in _contenders(call)}
    seconds = measure(runs, call.device, budget_s)
    usual = next(iter(runs))
    fastest = min(seconds, key=lambda name: seconds[name])
    kept = usual if seconds[usual] <= seconds[fastest] * (1 + MARGIN) else fastest
    store.add(call.device, call.signature, kept, seconds)
    return Measured(call.signature, usual, kept, seconds)


def _contenders(call: Call) -> list[str]:
    """Return the backends that pass verification for a call, in the table's order."""
    operation = OPERATIONS.get(call.signature.operation, OPERATIONS["attention_core"])
    names = [n for n in order(operation.name, call.device) if n in operation.backends]
    if call.device.type == "cpu":
        names = [name for name in names if name == "cpu"]  # the others are interpreted
    passed = []
    for name in names:
        before = len(state.retired)
        try:
            with state.verification("first", trust_evidence=False):
                _run_call(call, name)
        except ValueError:  # it cannot run the call
            continue
        if len(state.retired) == before and not _is_retired(call, name):
            passed.append(name)
    return [*passed, "reference"]


def _is_retired(call: Call, backend: str) -> bool:
    name = call.signature.operation
    kernels = name if name in OPERATIONS else "attention_core"
    return f"{kernels}/{backend}" in state.retired_names


def _run_call(call: Call, backend: str) -> None:
    context: Any = contextlib.nullcontext()
    if call.autocast is not None:
        context = torch.autocast(call.device.type, dtype=call.autocast)
    with torch.set_grad_enabled(call.signature.training), context:
        outputs = call.run(call.values, backend)
    if call.signature.training:
        backward(outputs, tensors_of(call.values))


def _measure_model(
    model: nn.Module, run_model: Run, end: float, compare_compiled: bool
) -> dict[str, float]:
    def run(fused: bool) -> object:
        set_fused(model, fused)
        return run_model()

    runs: dict[str, Run] = {
        "fused": functools.partial(run, True),
        "eager": functools.partial(run, False),
    }
    if compare_compiled:
        set_fused(model, False)
        runs["compiled"] = _compiled(model, run_model)
        runs["compiled"]()
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    return measure(runs, device, end - time.monotonic())


def _compiled(model: nn.Module, run_model: Any) -> Run:
    compiled = torch.compile(model)
    _, *rest = run_model.args

    def run() -> object:
        set_fused(model, False)
        return _run_model(compiled, *rest)  # type: ignore[arg-type]

    return run


def measure(runs: Mapping[str, Run], device: torch.device, budget_s: float) -> dict[str, float]:
    """Return the median seconds of each run, measured in turn and repeatedly.

    Args:
        runs: By name.
        device: Whose work is waited for.
        budget_s: Seconds for all; at least three rounds are measured, after one to warm up.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + budget_s
    for i in range(_MOST_ROUNDS):
        if i >= _LEAST_ROUNDS and time.monotonic() > end:
            break
        names = list(runs) if i % 2 else list(reversed(list(runs)))
        for name in names:
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""``calibrate``: measures the backends on the calls of a model, then the model as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

from crossvit_kernels.calibration import store, whole_model
from crossvit_kernels.calibration.measure import Run, kept, measure
from crossvit_kernels.calibration.progress import Progress
from crossvit_kernels.calibration.store import Call, Signature
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.ops.variants import Variant
from crossvit_kernels.verify import state
from crossvit_kernels.verify.compare import map_tensors, tensors_of


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
        model: Median seconds of the model: "fused", "eager", and "compiled" if asked for; on a GPU
            without training also in a CUDA graph, on two streams and on one.
        choice: How the model was set to run: the fastest of the first three.
        settings: What is faster, where it was measured: "graph" (than launching), "side_by_side"
            (than one stream), and the number of "threads" on a CPU, to which torch is set.
        unmeasured: Different calls for which there was no time.
    """

    calls: list[Measured]
    model: dict[str, float]
    choice: str
    settings: dict[str, int] = dataclasses.field(default_factory=dict)
    unmeasured: int = 0

    def __str__(self) -> str:
        rows = [("call", "times in ms", "choice", "gain")]
        for call in self.calls:
            s, seconds = call.signature, call.seconds
            name = f"{s.operation} {'train' if s.training else 'forward'} N {s.num_tokens} "
            name += f"{'x'.join(map(str, s.sizes))} class {s.batch_class}"
            gain = f"{seconds[call.usual] / seconds[call.choice]:.2f}x"
            rows.append((name, _shown(seconds), call.choice, gain))
        if self.model:
            rows.append(("the whole model", _shown(self.model), self.choice, ""))
        rows += [(name.replace("_", " "), "", str(v), "") for name, v in self.settings.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if self.unmeasured:
            lines.append(
                f"{self.unmeasured} more calls were not measured: the budget was too small"
            )
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
    one, all backends and kernel variants that pass verification, and the reference, are measured in
    turn and repeatedly. The fastest is written to a file that later calls and processes read
    (``store.file``): calls of these shapes, or of near ones, then run on it. Then the fused model
    is compared with eager mode, and is set to the faster. Last, on a CPU, torch is set to the
    number of threads on which the model is fastest (``use_calibrated_threads``). Parameters,
    buffers, gradients, mode and random state are unchanged.

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
    first = example[0]
    device, num_images = first.device, first.shape[0] if first.dim() else 1
    with whole_model.unchanged(model, training):
        whole_model.set_fused(model, True)
        calls = _recorded(lambda: whole_model.run(model, example, training))
        with Progress(2 * len(calls) + 2, quiet) as progress:
            contenders: list[list[str]] = []
            for call in calls:
                progress.step(f"verification of {call.signature.operation}")
                contenders.append(_contenders(call))
            end = time.monotonic() + budget_s
            measured: list[Measured] = []
            for i, call in enumerate(calls):
                left = end - time.monotonic()
                if left <= 0:
                    break
                progress.step(call.signature.operation)
                share = 0.6 * left / (len(calls) - i)
                measured.append(_measure_call(call, contenders[i], share))
            progress.step("the whole model")
            runs = whole_model.runs_of(model, example, training, compare_compiled)
            times = measure(
                runs,
                device,
                0.8 * (end - time.monotonic()),
                lambda name: whole_model.set_fused(model, name == "fused"),
            )
            choice = min((n for n in times if "graph" not in n), key=lambda name: times[name])
            settings: dict[str, int] = {**whole_model.decided(times)}
            whole_model.set_fused(model, choice == "fused")
            progress.step("threads")
            if device.type == "cpu":
                settings |= _measure_threads(runs[choice], end - time.monotonic())
    if choice == "compiled":
        model.compile()
    for name, value in settings.items():
        store.set_setting(device, name, num_images, value)
    result = Calibration(measured, times, choice, settings, len(calls) - len(measured))
    if not quiet:
        print(result)
    return result


def _measure_threads(run: Run, budget_s: float) -> dict[str, int]:
    """Set the number of threads to the fastest, and return it as a setting."""
    counts = whole_model.thread_counts()
    if len(counts) == 1:
        return {}
    seconds = measure(
        dict.fromkeys(counts, run), torch.device("cpu"), budget_s, torch.set_num_threads
    )
    fastest = kept(seconds, usual=counts[0])
    torch.set_num_threads(fastest)
    return {"threads": fastest}


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


def _measure_call(call: Call, contenders: list[str], budget_s: float) -> Measured:
    runs = {name: functools.partial(_run_call, call, name) for name in contenders}
    seconds = measure(runs, call.device, budget_s)
    usual = call.usual if call.usual in runs else next(iter(runs))
    choice = kept(seconds, usual)
    store.add(call.device, call.signature, choice, seconds)
    return Measured(call.signature, usual, choice, seconds)


#: On a CPU "cuda" and "triton" are for tests.
_SUITED = {"cpu": ("cpu", "library"), "cuda": ("cuda", "triton", "library")}


def _contenders(call: Call) -> list[str]:
    """Return the backends and variants that pass verification for a call, and the reference."""
    operation = OPERATIONS.get(call.signature.operation, OPERATIONS["attention_core"])
    suited = _SUITED.get(call.device.type, ())
    passed = []
    for name, module in operation.backends.items():
        if name.partition(":")[0] not in suited:
            continue
        if isinstance(module, Variant) and not module.is_proven(call.device):
            continue  # it could hang
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
        whole_model.backward(outputs, tensors_of(call.values))

"""The measured choice of backends, its file, and the guarantee for whole models."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import crossvit_kernels as ck
from crossvit_kernels import __main__ as program
from crossvit_kernels import functional, tune
from crossvit_kernels.calibration import calibrate as calibration
from crossvit_kernels.calibration import store
from crossvit_kernels.calibration.store import Signature
from crossvit_kernels.modules import MAPHead, TransformerBlock
from crossvit_kernels.modules import blocks as block_modules
from crossvit_kernels.ops.common.library import Figures, Step
from crossvit_kernels.ops.describe import describe
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs
from crossvit_kernels.ops.operator import OPERATIONS

pytestmark = pytest.mark.usefixtures("calibration_file")

C, HEADS = 16, 2
CPU = torch.device("cpu")


class Slow:
    """A backend that sleeps."""

    def __init__(self, module: Any) -> None:
        self._module, self.calls = module, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        time.sleep(0.2)
        return self._module.forward(*arguments)


class Wrong(Slow):
    def forward(self, *arguments: Any) -> Any:
        outputs, saved = self._module.forward(*arguments)
        return outputs + 1, saved


@pytest.fixture
def slow_ffn(monkeypatch: pytest.MonkeyPatch) -> Slow:
    backends = OPERATIONS["layernorm_ffn"].backends
    module = Slow(backends["cpu"])
    monkeypatch.setitem(backends, "cpu", module)
    return module


def model() -> nn.Module:
    return nn.Sequential(TransformerBlock(C, HEADS), MAPHead(C, HEADS))


def ffn(x: Tensor) -> Tensor:
    shapes = [(C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    return ck.layernorm_ffn(x, ck.FfnWeights(*(torch.ones(s) for s in shapes)))


@pytest.mark.parametrize("training", [False, True])
def test_a_slow_kernel_is_replaced(
    training: bool, slow_ffn: Slow, calibration_file: Path, capsys
) -> None:
    net, x = model(), torch.randn(2, 5, C)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    result = ck.calibrate(net, x, training=training, budget_s=60)
    (slow,) = [m for m in result.calls if m.signature.operation == "layernorm_ffn"]
    assert slow.usual == "cpu" and slow.choice in ("library", "reference")
    assert set(slow.seconds) == {"cpu", "library", "reference"}
    assert slow.seconds["cpu"] > 0.2
    assert "layernorm_ffn" in capsys.readouterr().out
    calls = slow_ffn.calls
    store.forget()  # as in another process
    with torch.set_grad_enabled(training):
        net(x.requires_grad_(training))
    assert slow_ffn.calls == calls
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    (entries,) = json.loads(calibration_file.read_text())["devices"].values()
    assert len(entries["entries"]) == len(result.calls) - result.unmeasured
    assert "layernorm_ffn" in program.report() and str(calibration_file) in program.report()


def test_never_slower_than_eager(monkeypatch) -> None:
    """Here the modules are slow, so no choice of a backend helps."""
    net, x = model(), torch.randn(2, 5, C)
    fast = functional.layernorm_ffn

    calls: list[int] = []

    def slow(*arguments: Any) -> Tensor:
        calls.append(1)
        time.sleep(0.3)
        return fast(*arguments)

    monkeypatch.setattr(block_modules.functional, "layernorm_ffn", slow)
    result = ck.calibrate(net, x, budget_s=60, quiet=True)
    assert result.choice == "eager" and result.model["eager"] < result.model["fused"]
    before = len(calls)
    with torch.no_grad():
        net(x)
    assert before > 0 and len(calls) == before
    monkeypatch.setattr(block_modules.functional, "layernorm_ffn", fast)
    monkeypatch.setattr(
        calibration, "measure", lambda runs, *_: {n: float(n != "fused") for n in runs}
    )
    monkeypatch.setattr(calibration, "_measure_call", lambda *_: None)
    assert ck.calibrate(net, x, quiet=True).choice == "fused"
    assert net[0].backend is None


def test_compiled_if_it_is_fastest(monkeypatch) -> None:
    net, x = model(), torch.randn(2, 5, C)
    monkeypatch.setattr(torch, "compile", lambda module: module)
    monkeypatch.setattr(
        calibration, "measure", lambda runs, *_: {n: float(n != "compiled") for n in runs}
    )
    monkeypatch.setattr(calibration, "_measure_call", lambda *_: None)
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    result = ck.calibrate(net, x, compare_compiled=True, quiet=True)
    assert result.choice == "compiled" and compiled == [net]
    assert net[0].backend == "reference"


def test_wrong_backends_do_not_take_part(monkeypatch) -> None:
    backends = OPERATIONS["layernorm_ffn"].backends
    monkeypatch.setitem(backends, "cpu", Wrong(backends["cpu"]))
    result = ck.calibrate(model(), torch.randn(2, 5, C), budget_s=60, quiet=True)
    (found,) = [m for m in result.calls if m.signature.operation == "layernorm_ffn"]
    assert set(found.seconds) == {"library", "reference"} and found.usual in found.seconds


def test_verification_is_not_part_of_the_budget(monkeypatch) -> None:
    """The clock starts after it: kernels are compiled there."""
    events: list[str] = []
    contenders, clock = calibration._contenders, time.monotonic
    monkeypatch.setattr(
        calibration, "_contenders", lambda call: events.append("verified") or contenders(call)
    )
    monkeypatch.setattr(time, "monotonic", lambda: events.append("clock") or clock())
    ck.calibrate(model(), torch.randn(2, 5, C), quiet=True)
    assert events[:4] == ["verified"] * 3 + ["clock"] and events.count("verified") == 3


def test_interrupted(slow_ffn: Slow, calibration_file: Path, monkeypatch) -> None:
    net, measure_call = model(), calibration._measure_call
    net[0].backend = "reference"
    done = []

    def interrupts(*arguments: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(measure_call(*arguments))
        return done[0]

    monkeypatch.setattr(calibration, "_measure_call", interrupts)
    with pytest.raises(KeyboardInterrupt):
        ck.calibrate(net, torch.randn(2, 5, C), budget_s=60, quiet=True)
    (entries,) = json.loads(calibration_file.read_text())["devices"].values()
    assert len(entries["entries"]) == 1
    assert net[0].backend == "reference" and net.training


def signature(**changes: Any) -> Signature:
    usual = Signature("layernorm_ffn", False, "float32 ++++++ float32 -", (C, 4 * C, C), 5, 1)
    return usual._replace(**changes)


def test_options_are_part_of_a_call_and_their_absence_is_not() -> None:
    x, w = torch.randn(2, 3, C), ck.FfnWeights(*(torch.ones(2, 2) for _ in range(6)))
    plain, *others = (
        describe(OPERATIONS["layernorm_ffn"], FfnInputs(x, w, None, *options), None).signature
        for options in ((), ("silu",), ("gelu", x[0, 0]), ("silu", x[0, 0]))
    )
    assert len({plain, *others}) == 4
    assert plain.kind == "float32 ++++++ float32 None"


def test_nearest_shapes(slow_ffn: Slow) -> None:
    with torch.no_grad():
        x = torch.randn(2, 5, C)
        recorded: list[Any] = []
        store.recorder = recorded.append
        ffn(x)
        store.recorder = None
        calls = slow_ffn.calls
        store.add(CPU, recorded[0].signature, "reference", {"reference": 1.0})
        ffn(x)
        ffn(torch.randn(8, 7, C))
        assert slow_ffn.calls == calls
        ffn(torch.randn(2, 400, C))  # too far: the table
        assert slow_ffn.calls == calls + 1
    table = {signature(): "reference", signature(num_tokens=40): "cpu"}
    for num_tokens, expected in ((5, "reference"), (7, "reference"), (30, "cpu"), (1000, None)):
        assert store._nearest(table, signature(num_tokens=num_tokens)) == expected
    assert store._nearest(table, signature(training=True)) is None
    assert store._nearest(table, signature(batch_class=2)) == "reference"


def test_batch_classes_and_invariance(slow_ffn: Slow) -> None:
    assert [store.batch_class(b) for b in (0, 1, 2, 8, 9, 64, 65, 512, 513, 4096)] == [
        *(0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    ]
    with torch.no_grad():
        recorded: list[Any] = []
        store.recorder = recorded.append
        images = torch.randn(4, 5, C)
        ffn(images)
        store.recorder = None
        store.add(CPU, recorded[0].signature, "reference", {"reference": 1.0})
        calls = slow_ffn.calls
        ffn(images)
        assert slow_ffn.calls == calls
        ck.batch_invariant(True)
        together = ffn(images)
        alone = torch.cat([ffn(images[i : i + 1]) for i in range(4)])
        assert slow_ffn.calls == calls + 5 and torch.equal(together, alone)
        step = Step({C: Figures(2.0, 1.0)})
        assert not step.by_library(1 << 20, C, 2) and not step.by_library(1 << 20, C, 4)
        ck.batch_invariant(False)
        assert step.by_library(1 << 20, C, 2) and step.by_library(1 << 20, C, 4)
        ffn(images)
        assert slow_ffn.calls == calls + 5


def test_compiled_functions_take_what_all_shapes_agree_on(slow_ffn: Slow) -> None:
    x = torch.randn(2, 5, C)
    store.add(CPU, signature(), "reference", {})
    torch.compiler.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        assert slow_ffn.calls == 0
        store.add(CPU, signature(num_tokens=50), "cpu", {})
        torch.compiler.reset()
        compiled(x)
        assert slow_ffn.calls == 1


CONTENTS = ["{", "[]", "null", '{"format": 99}', '{"format": 1, "devices": []}']


@pytest.mark.parametrize("content", [*CONTENTS, "of the key"])
def test_other_files_are_ignored(content: str, calibration_file: Path, caplog) -> None:
    calibration_file.parent.mkdir()
    if content == "of the key":
        key = store.identity.key(CPU)
        content = json.dumps({"format": 1, "devices": {key: {"entries": [{"choice": 3}]}}})
    calibration_file.write_text(content)
    with torch.no_grad():
        ffn(torch.randn(2, 5, C))
        ffn(torch.randn(2, 5, C))
    assert len(caplog.records) == 1 and "ignored" in caplog.text
    store.add(CPU, signature(), "reference", {})
    assert len(store.entries(CPU)) == 1


def test_another_device_or_software_has_other_choices(monkeypatch) -> None:
    store.add(CPU, signature(), "reference", {})
    key = store.identity.key(CPU)
    monkeypatch.setattr(store.identity, "key", lambda device: "another")
    assert store.entries(CPU) == []
    store.add(CPU, signature(), "cpu", {})
    store.add(CPU, signature(), "reference", {})
    assert [entry["choice"] for entry in store.entries(CPU)] == ["reference"]
    monkeypatch.setattr(store.identity, "key", lambda device: key)
    assert len(store.entries(CPU)) == 1


def _write(numbers: range) -> None:
    for number in numbers:
        store.add(CPU, signature(num_tokens=number), "cpu", {"cpu": 1.0})


def test_processes_write_at_once() -> None:
    context = multiprocessing.get_context("fork")
    ranges = [range(1, 16), range(101, 116)]
    processes = [context.Process(target=_write, args=(numbers,)) for numbers in ranges]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = {entry["num_tokens"] for entry in store.entries(CPU)}
    assert found == {*ranges[0], *ranges[1]}


def test_refused_input() -> None:
    with pytest.raises(TypeError, match="model: expected"):
        ck.calibrate(ffn, torch.randn(2, 5, C))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example: expected"):
        ck.calibrate(model())
    with pytest.raises(ValueError, match="budget_s: expected"):
        ck.calibrate(model(), torch.randn(2, 5, C), budget_s=0)


def test_the_command(calibration_file: Path, capsys) -> None:
    options = ["--model", "crossvit_kernels.modules:MAPHead(16, 2)", "--input", "2,5,16"]
    assert tune.main([*options, "--budget", "60"]) == 0
    assert "attention_pool" in capsys.readouterr().out
    assert calibration_file.exists()
    with pytest.raises(SystemExit):
        tune.main(["--model", "nothing", "--input", "2"])
    assert "MODULE:EXPRESSION" in capsys.readouterr().err

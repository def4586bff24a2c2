"""Kernel variants as contenders, and the measured settings: streams, graphs, threads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_kernels import CASES, assert_close, make_ffn, run
from torch import Tensor

import crossvit_kernels as ck
from crossvit_kernels import __main__ as program
from crossvit_kernels import functional, graphs
from crossvit_kernels.backends import watching
from crossvit_kernels.calibration import measure, store, whole_model
from crossvit_kernels.gpu.tables import Variants
from crossvit_kernels.modules import TransformerBlock
from crossvit_kernels.modules import blocks as block_modules
from crossvit_kernels.ops.operator import OPERATIONS
from crossvit_kernels.ops.variants import Variant, with_variants

pytestmark = pytest.mark.usefixtures("calibration_file")

C, HEADS = 16, 2
CPU = torch.device("cpu")


class InVariants:
    """A backend of two variants: "quick", and "slow", which sleeps."""

    def __init__(self, module: Any) -> None:
        self._module, self.variants, self.ran = module, Variants("slow", "quick"), list[str]()
        self.Saved, self.why_not = module.Saved, module.why_not
        self.empty_saved = module.empty_saved

    def forward(self, *arguments: Any) -> Any:
        self._run()
        return self._module.forward(*arguments)

    def backward(self, *arguments: Any) -> Any:
        self._run()
        return self._module.backward(*arguments)

    def _run(self) -> None:
        self.ran.append(self.variants.asked_for)
        if self.variants.asked_for != "quick":
            time.sleep(0.1)


@pytest.mark.parametrize("training", [False, True])
def test_the_fastest_variant_is_kept(training: bool, monkeypatch) -> None:
    kernels = OPERATIONS["layernorm_ffn"].backends
    module = InVariants(kernels["cpu"])
    for name, variant in with_variants("cpu", module, module.variants).items():
        monkeypatch.setitem(kernels, name, variant)
    monkeypatch.delitem(kernels, "library")
    monkeypatch.setattr(OPERATIONS["layernorm_ffn"], "reference", _slow_reference)
    net, x = TransformerBlock(C, HEADS), torch.randn(2, 5, C)
    result = ck.calibrate(net, x, training=training, quiet=True)
    (found,) = [m for m in result.calls if m.signature.operation == "layernorm_ffn"]
    assert set(found.seconds) == {"cpu", "cpu:slow", "cpu:quick", "reference"}
    assert found.choice == "cpu:quick" and found.usual == "cpu"
    assert "cpu:quick" in str(result) and "cpu:quick" in program.report()
    module.ran.clear()
    whole_model.set_fused(net, True)  # as a whole, eager mode may be as fast
    with torch.set_grad_enabled(training), watching() as ran:
        y = net(x)
    assert "layernorm_ffn: cpu:quick" in ran
    if training:
        y.sum().backward()
    assert module.ran == ["quick"] * (1 + training)


def _slow_reference(*arguments: Any) -> Tensor:
    from crossvit_kernels.ops.layernorm_ffn import op

    time.sleep(0.1)
    return op._reference(*arguments)


def test_a_wrong_variant_does_not_take_part(monkeypatch) -> None:
    kernels = OPERATIONS["layernorm_ffn"].backends
    module = InVariants(kernels["cpu"])

    class Wrong(Variant):
        def forward(self, *arguments: Any) -> Any:
            y, saved = super().forward(*arguments)
            return y + 1, saved

    monkeypatch.setitem(kernels, "cpu:quick", Wrong(module, module.variants, "quick"))
    result = ck.calibrate(TransformerBlock(C, HEADS), torch.randn(2, 5, C), quiet=True)
    (found,) = [m for m in result.calls if m.signature.operation == "layernorm_ffn"]
    assert set(found.seconds) == {"cpu", "library", "reference"}


@pytest.mark.parametrize("name", ["layernorm_ffn", "layernorm_msa"])
def test_variants_of_triton_by_name(name: str, triton_device: str) -> None:
    tensors, call = CASES[name]()
    expected = run(call, tensors, "reference")
    kernels = {}
    for variant in ("fused", "split", "library"):
        with watching() as kernels[variant]:
            assert_close(run(call, tensors, f"triton:{variant}"), expected)
    assert kernels["fused"] != kernels["split"]
    with pytest.raises(ValueError, match="'triton:two' cannot run this call"):
        call(*tensors, backend="triton:two")
    with pytest.raises(ValueError, match="unknown backend 'abacus:two'"):
        call(*tensors, backend="abacus:two")


def test_variants_of_threads() -> None:
    variants, seen = Variants("a", "b"), dict[str, str]()
    start = threading.Barrier(2)

    def work(name: str) -> None:
        with variants.in_this_thread(name):
            start.wait()
            seen[name] = variants.asked_for
            start.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": "a", "b": "b"} and variants.asked_for == "auto"
    with variants.choose("a"), variants.in_this_thread("b"):
        assert variants.asked_for == "b"


def test_hopeless_contenders_are_measured_twice() -> None:
    calls = {"fast": 0, "slow": 0}

    def run_of(name: str, seconds: float) -> measure.Run:
        def run() -> None:
            calls[name] += 1
            time.sleep(seconds)

        return run

    runs = {"fast": run_of("fast", 0.005), "slow": run_of("slow", 0.1)}
    seconds = measure.measure(runs, CPU, budget_s=0.01)
    assert calls == {"fast": 4, "slow": 3} and seconds["slow"] >= 0.1 > seconds["fast"]


def test_the_margin() -> None:
    assert measure.kept({"usual": 1.02, "other": 1.0}, "usual") == "usual"
    assert measure.kept({"usual": 1.05, "other": 1.0}, "usual") == "other"


def test_decisions_from_times() -> None:
    times = {"fused": 3.0, "eager": 5.0, "graph": 1.0, "graph, one stream": 2.0}
    assert whole_model.decided(times) == {"side_by_side": True, "graph": True}
    assert whole_model.decided(times | {"graph": 1.99}) == {"side_by_side": False, "graph": True}
    assert whole_model.decided(times | {"fused": 1.01}) == {"side_by_side": True, "graph": False}
    assert whole_model.decided({"fused": 3.0, "eager": 5.0}) == {}


def test_bounds() -> None:
    """What pays for some images pays for fewer; what does not, does not for more."""
    measured = {8: True, 64: False}
    found = {n: store.bounded(measured, n) for n in (1, 8, 9, 63, 64, 1000)}
    assert found == {1: True, 8: True, 9: None, 63: None, 64: False, 1000: False}
    assert store.bounded({}, 1) is None
    assert store.bounded({8: False, 64: True}, 16) is True


def test_streams(calibration_file: Path) -> None:
    few = graphs.FEW_IMAGES
    assert graphs.wants_two_streams(few, {}) and not graphs.wants_two_streams(few + 1, {})
    store.set_setting(CPU, "side_by_side", 4 * few, True)
    measured = store.settings(CPU, "side_by_side")
    assert graphs.wants_two_streams(3 * few, measured)
    assert not graphs.wants_two_streams(5 * few, measured)
    store.set_setting(CPU, "side_by_side", 2, False)
    measured = store.settings(CPU, "side_by_side")
    assert measured == {4 * few: True, 2: False}
    assert not graphs.wants_two_streams(2, measured)
    with graphs.streams(2):
        assert graphs.wants_two_streams(2, measured)
        with graphs.streams(1):
            assert not graphs.wants_two_streams(1, {})
    assert not graphs.wants_two_streams(2, measured)


def test_graphs_and_streams_are_measured(monkeypatch, capsys) -> None:
    """On tensors that claim to be on a GPU, with captures that only say what they are."""

    class Waits(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x

    net = torch.nn.Sequential(TransformerBlock(C, HEADS), Waits())
    x, waits = torch.randn(2, 5, C), {2: 0.0, 1: 0.01}

    def capture(model: Any, example: Any) -> Any:
        seconds = waits[graphs._streams]
        return lambda *_: time.sleep(seconds)

    monkeypatch.setattr(graphs, "make_graphed", capture)
    real = whole_model.runs_of
    monkeypatch.setattr(whole_model, "_are_cuda", lambda example: True)
    result = ck.calibrate(net, x)
    assert set(result.model) == {"fused", "eager", "graph", "graph, one stream"}
    assert result.choice in ("fused", "eager")
    assert result.settings["side_by_side"] is True and result.settings["graph"] is True
    assert store.settings(CPU, "graph") == {2: True}
    assert "side by side" in capsys.readouterr().out
    assert "side_by_side" in program.report()

    def fails(model: Any, example: Any) -> Any:
        raise RuntimeError("a graph cannot wait")

    monkeypatch.setattr(graphs, "make_graphed", fails)
    assert set(real(net, (x,), False, False)) == {"fused", "eager"}
    assert set(real(net, (x,), True, False)) == {"fused", "eager"}


def test_threads(monkeypatch, calibration_file: Path) -> None:
    """One thread is faster here."""
    torch.set_num_threads(2)
    fast = functional.layernorm_ffn

    def slow_on_two(*arguments: Any) -> Tensor:
        if torch.get_num_threads() == 2:
            time.sleep(0.1)
        return fast(*arguments)

    monkeypatch.setattr(block_modules.functional, "layernorm_ffn", slow_on_two)
    net = TransformerBlock(C, HEADS)
    runs_of = whole_model.runs_of
    with monkeypatch.context() as patch:  # eager mode would not be slow
        patch.setattr(whole_model, "runs_of", lambda *a: {"fused": runs_of(*a)["fused"]})
        result = ck.calibrate(net, torch.randn(4, 5, C), quiet=True)
    assert result.settings == {"threads": 1} and torch.get_num_threads() == 1
    torch.set_num_threads(2)
    store.forget()  # as in another process
    assert ck.use_calibrated_threads(6) == 1 == torch.get_num_threads()
    (entry,) = json.loads(calibration_file.read_text())["devices"].values()
    assert entry["settings"] == {"threads": {"4": 1}} and entry["entries"]
    torch.set_num_threads(2)
    store.set_setting(CPU, "threads", 64, 2)
    assert ck.use_calibrated_threads(100) == 2 and ck.use_calibrated_threads(1) == 1
    with pytest.raises(ValueError, match="num_images: expected at least 1, found 0"):
        ck.use_calibrated_threads(0)
    calibration_file.unlink()
    store.forget()
    assert ck.use_calibrated_threads(8) == 1


def test_threads_to_try() -> None:
    found = {}
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        found[count] = whole_model.thread_counts()
    assert found == {1: [1], 2: [2, 1], 8: [8, 4, 1]}


def test_settings_outlive_new_choices(caplog, calibration_file: Path) -> None:
    tensors, call = make_ffn()
    recorded: list[Any] = []
    store.recorder = recorded.append
    with torch.no_grad():
        call(*tensors)
    store.recorder = None
    store.set_setting(CPU, "graph", 8, True)
    store.add(CPU, recorded[0].signature, "library", {"library": 1.0})
    store.set_setting(CPU, "graph", 64, False)
    assert store.settings(CPU, "graph") == {8: True, 64: False}
    assert [entry["choice"] for entry in store.entries(CPU)] == ["library"]
    with torch.no_grad(), watching() as ran:
        call(*tensors)
    assert ran == {"layernorm_ffn: library"}
    content = json.loads(calibration_file.read_text())
    next(iter(content["devices"].values()))["settings"] = {"graph": {"many": 1}}
    calibration_file.write_text(json.dumps(content))
    store.forget()
    assert store.settings(CPU, "graph") == {} and "ignored" in caplog.text


def test_one_backend_for_all_batches() -> None:
    """With batch_invariant; without, a choice is that of a class of batches."""
    tensors, call = make_ffn()
    images = torch.randn(70, 5, C)
    recorded: list[Any] = []
    store.recorder = recorded.append
    with torch.no_grad():
        call(images[:1], *tensors[1:])
    store.recorder = None
    store.add(CPU, recorded[0].signature, "library", {"library": 1.0})
    ran: dict[bool, list[set[str]]] = {False: [], True: []}
    for invariant in ran:
        ck.batch_invariant(invariant)
        for count in (1, 8, 70):
            with torch.no_grad(), watching() as seen:
                call(images[:count], *tensors[1:])
            ran[invariant].append(seen)
    ck.batch_invariant(False)
    kernels, library = {"layernorm_ffn: cpu"}, {"layernorm_ffn: library"}
    assert ran == {False: [library, library, kernels], True: [kernels] * 3}

"""bench/paper_tables.py: its data and models agree, docs/paper.md is current, what it measures."""

from __future__ import annotations

import difflib
import json
import sys
import types
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_programs import FACTS, program

import crossvit

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "paper.md"
#: Rows whose printed figure is not ours rounded, and why.
NOT_ROUNDED = {
    ("All-Attention", "mparams"): "see its note",
    ("E", "mparams"): "the paper rounds down",
    ("Class Token", "gmacs"): "5.350 is printed as 5.4",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with program(monkeypatch, "paper_tables") as module:
        yield module


def ours(bench: ModuleType) -> list[tuple[str, dict]]:
    """The tables' names and rows of models of this library."""
    return [
        (name, printed)
        for name, table in bench.paper_rows.tables().items()
        for printed in table["rows"]
        if printed["model"] and bench.paper_rows.is_ours(printed["model"])
    ]


_measured: dict[str, tuple] = {}


def measured(bench: ModuleType) -> tuple[dict, str]:
    """The tables and the program's Markdown, without timm's models, which take long to make."""
    if not _measured:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "timm", None)
            options = bench.parse([])
            tables, *_ = bench.measure_rows(options)
            _measured["all"] = tables, bench.markdown(options, tables, "")
    return _measured["all"]


def assert_current(made: str) -> None:
    """Assert that docs/paper.md is what the program makes, up to rows that need timm."""
    written, lines = DOCUMENT.read_text(encoding="utf-8").splitlines(), made.splitlines()
    for i, line in enumerate(lines[: len(written)]):
        if "timm is not installed" in line and line.split("|")[1] == written[i].split("|")[1]:
            lines[i] = written[i]
    difference = list(difflib.unified_diff(written, lines, "docs/paper.md", "now", lineterm=""))
    advice = "run python bench/paper_tables.py --markdown docs/paper.md"
    assert not difference, "\n".join([advice, *difference])


def test_the_document_is_current(bench):
    assert_current(measured(bench)[1])


@pytest.mark.parametrize(
    "models",
    [
        {"resnet101", "regnety_080", "tf_efficientnet_b4", "vit_base_patch16_384"},
        pytest.param(None, marks=pytest.mark.slow, id="all"),
    ],
)
def test_rows_of_timm_are_current(bench, models):
    pytest.importorskip("timm")
    tables = {name: bench.paper_rows.tables()[name] for name in ("3", "4")}
    for table in tables.values():
        table["rows"] = [p for p in table["rows"] if models is None or p["model"] in models]
        table["measured"] = [bench.count(printed) for printed in table["rows"]]
        for printed, counted in zip(table["rows"], table["measured"], strict=True):
            if counted.get("missing") != "not in timm" and "note" not in printed:
                assert counted["mparams"] == pytest.approx(float(printed["mparams"]), rel=0.02)
                assert counted["gmacs"] == pytest.approx(float(printed["gmacs"]), rel=0.05)
    made = bench.markdown(bench.parse([]), tables, "").splitlines()
    rows = [line for line in made if line.startswith("| ") and "`" in line]
    written = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(rows) == (31 if models is None else 4)
    assert not [row for row in rows if row not in written]


def test_models_have_the_printed_sizes(bench):
    """Rounded as the paper does."""
    checked = 0
    for table in measured(bench)[0].values():
        for printed, counted in zip(table["rows"], table["measured"], strict=True):
            for key in ("mparams", "gmacs"):
                if key not in printed or "missing" in counted:
                    continue
                if (printed["row"], key) in NOT_ROUNDED:
                    continue
                digits = -Decimal(printed[key]).as_tuple().exponent
                found = f"{counted[key]:.{digits}f}"
                assert Decimal(found) == Decimal(printed[key]), (printed["row"], key, counted[key])
                checked += 1
    assert checked == 72 - len(NOT_ROUNDED)


def test_models_have_the_printed_architectures(bench):
    rows = [(name, printed) for name, printed in ours(bench) if "dims" in printed]
    assert {name for name, _ in rows} == {"1", "7"} and len(rows) == 16
    for _, printed in rows:
        architecture = bench.paper_rows.architecture(printed["model"])
        found = {key: value for key, value in architecture.items() if key in printed}
        assert found == {key: printed[key] for key in found} and len(found) >= 6, printed["row"]


def test_macs_are_those_that_torch_counts(bench):
    """FlopCounterMode sees the products of eager mode, one by one."""
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("crossvit_9_dagger_240", "crossvit_small_all_240"):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            crossvit.create_model(name).eval()(torch.empty(1, 3, 240, 240))
        counted = bench.count({"model": name})["macs"]
        assert counter.get_total_flops() / 2 == pytest.approx(counted, rel=1e-3), name


def test_the_document_names_the_command_that_wrote_it(bench):
    options = bench.parse(["--tables", "6,7", "--throughput"])
    text = " ".join(bench.paper_markdown.introduction(options, "cpu").split())
    assert "`python bench/paper_tables.py --tables 6,7 --throughput`" in text


# What is measured

TINY = {"row": "CrossViT-Ti", "model": "crossvit_tiny_240", "top1": Decimal("73.4")}
TINY |= {"gmacs": Decimal("1.6"), "mparams": Decimal("6.9"), "images_per_second": 1668}
TABLES = {
    "2": {
        "title": "Short",
        "rows": [
            {"row": "DeiT-Ti", "model": "deit_tiny_patch16_224", "images_per_second": 2557,
             "baseline": "DeiT-Ti"},
            {**TINY, "baseline": "DeiT-Ti"},
            {"row": "Rival", "model": None, "top1": 80, "baseline": "DeiT-Ti"},
        ],
    }
}  # fmt: skip
QUICK = ["--device", "cpu", "--batch", "1", "--iterations", "2"]


@pytest.fixture
def short(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program with a short table."""
    copied = {n: {**t, "rows": [dict(p) for p in t["rows"]]} for n, t in TABLES.items()}
    monkeypatch.setattr(bench.paper_rows, "tables", lambda: copied)
    return bench


@pytest.mark.slow
def test_throughput_is_measured_beside_deit(short, tmp_path, capsys):
    path = tmp_path / "tables.json"
    assert short.main([*QUICK, "--throughput", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert set(document["environment"]) >= FACTS
    timed = {(row["model"], row["contender"]): row for row in document["results"]}
    assert set(timed) == {
        (model, kind)
        for model in ("deit_tiny_patch16_224", "crossvit_tiny_240")
        for kind in ("eager", "fused")
    }
    for row in timed.values():
        assert row["status"] == "ok" and row["rounds"] == 2
        assert row["images_per_second"] == pytest.approx(1e3 / row["mean_ms"])
    _, tiny, rival = document["tables"]["2"]["rows"]
    speed = tiny["here"]["fused"]
    assert speed == timed["crossvit_tiny_240", "fused"]["images_per_second"]
    assert tiny["ratio"]["images_per_second"] == pytest.approx(speed / 1668)
    deit = timed["deit_tiny_patch16_224", "fused"]["images_per_second"]
    assert tiny["here"]["of_baseline"]["fused"] == pytest.approx(speed / deit)
    assert tiny["paper"]["of_baseline"] == pytest.approx(1668 / 2557)
    assert rival["here"]["missing"] == "not in timm" and rival["ratio"] == {}
    printed = capsys.readouterr().out
    assert "in float32" in printed and "mean over 2 batches of 1 images" in printed
    assert "| 0.652 | DeiT-Ti |" in printed


def test_a_wrong_model_is_not_timed(short, monkeypatch, capsys):
    fuse = crossvit.CrossViT.set_fused

    def spoiled(model, *arguments, **options):
        fuse(model, *arguments, **options)
        if model.use_fused:
            with torch.no_grad():
                model.norm[0].weight.mul_(1.01)
        return model

    monkeypatch.setattr(crossvit.CrossViT, "set_fused", spoiled)
    assert short.main([*QUICK, "--throughput"]) == 1
    output = capsys.readouterr()
    assert "crossvit_tiny_240, batch 1, inference: fused: wrong" in output.err
    (line,) = (line for line in output.out.splitlines() if line.startswith("| CrossViT-Ti"))
    assert line.count(" - ") >= 3


def test_accuracy_is_that_of_evaluate(short, monkeypatch, tmp_path, capsys):
    """With the checkpoints there are; the others have none."""
    calls = []

    def main(arguments):
        calls.append(dict(zip(arguments[::2], arguments[1::2], strict=True)))
        result = {name: {"top1": t} for name, t in (("mean", 73.1), ("large", 60.5))}
        Path(calls[-1]["--json"]).write_text(json.dumps({**result, "small": None, "images": 9}))
        return 0

    fake = types.SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "crossvit.evaluate", fake)
    (tmp_path / "crossvit_tiny_240.pth").touch()
    options = [*QUICK, "--accuracy", str(tmp_path), "--checkpoints", str(tmp_path)]
    path = tmp_path / "tables.json"
    assert short.main([*options, "--json", str(path)]) == 0
    (call,) = calls
    assert call["--model"] == "crossvit_tiny_240" and call["--data"] == str(tmp_path)
    assert call["--checkpoint"] == str(tmp_path / "crossvit_tiny_240.pth")
    assert (call["--batch-size"], call["--device"], call["--dtype"]) == ("1", "cpu", "float32")
    deit, tiny, _ = json.loads(path.read_text())["tables"]["2"]["rows"]
    assert deit["here"]["no_accuracy"] == "no checkpoint" and "top1" not in deit["here"]
    assert tiny["here"]["top1"] == 73.1 and tiny["here"]["top1_l"] == 60.5
    assert tiny["ratio"]["top1"] == pytest.approx(73.1 / 73.4)
    printed = capsys.readouterr().out
    assert printed.count("no checkpoint") == 2 and "| 73.10 | 73.4 | 0.996 |" in printed
    fake.main = lambda arguments: 1
    assert short.main(options) == 1
    assert "crossvit_tiny_240: crossvit.evaluate failed" in capsys.readouterr().err


def test_accuracy_of_images_with_timm(bench, tmp_path):
    """crossvit.evaluate on a folder in ImageNet's layout."""
    for package in ("timm", "torchvision", "rich", "PIL"):
        pytest.importorskip(package)
    from PIL import Image

    name = "crossvit_tiny_240"
    model = crossvit.create_model(name)
    with torch.no_grad():
        for b, shift in enumerate((3.0, 1.0)):  # class 0 from S, class 1 from L: 0 of the mean
            model.head[b].weight.zero_()
            model.head[b].bias.zero_()[b] = shift
    torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    for number, wordnet_id in enumerate(("n01440764", "n01443537")):
        folder = tmp_path / "val" / wordnet_id
        folder.mkdir(parents=True)
        for i in range(2 * number + 1):
            Image.new("RGB", (50, 40), (90 * i, 60, 30)).save(folder / f"{i}.png")
    measure = bench.paper_accuracy.measure_accuracy
    checkpoint = bench.paper_accuracy.find_checkpoint({"model": name}, str(tmp_path))
    found = measure(name, tmp_path / "val", checkpoint, 4, torch.device("cpu"), "float32")
    assert found["images"] == 4 and found["checkpoint"] == checkpoint
    assert (found["top1"], found["top1_s"], found["top1_l"]) == (25.0, 25.0, 75.0)


def test_official_checkpoints_are_the_released_ones(bench):
    find = bench.paper_accuracy.find_checkpoint
    found = {printed["model"]: find(printed, "official") for _, printed in ours(bench)}
    assert sum(source == "official" for source in found.values()) == 11 + 3
    assert found["crossvit_18_dagger_504"] is None and found["crossvit_small_all_240"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "2,5"], "--tables 5: expected some of 1,2,3,4,6,7,text"),
        (["--accuracy", "."], "expected both or neither"),
        (["--accuracy", "missing", "--checkpoints", "timm"], "--accuracy missing: no such folder"),
        (["--accuracy", ".", "--checkpoints", "missing"], "--checkpoints missing: no such folder"),
        (["--markdown", "missing/a.md"], "--markdown missing/a.md: no such folder"),
        (["--batch", "0"], "expected a positive whole number"),
        (["--table", "2"], "is --tables meant?"),
    ],
)
def test_bad_arguments_are_refused(bench, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

"""The paper's tables: what it prints, and what the models here have and do.

    python bench/paper_tables.py                                    # parameters and MACs
    python bench/paper_tables.py --tables 2,4 --throughput          # and images/s
    python bench/paper_tables.py --accuracy IMAGENET --checkpoints official

prints Tables 1, 2, 3, 4, 6 and 7, and what section 4.3 says in the text, as Markdown. Models that
the paper compares with are timm's, if timm is installed.

Throughput follows the paper: the mean over 100 batches of 64 images. Each model is measured eager
and fused; one whose logits are wrong, judged by eager mode's error against float64, is not timed.
The paper's claim is about speed beside DeiT, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import measure
import model_bench
import paper_accuracy
import paper_markdown
import paper_rows
import report
import torch
from command_line import DTYPES, positive
from contender import Contender
from contest import Contest
from paper_markdown import EAGER, FUSED, Measured
from paper_rows import Printed
from torch import Tensor, nn

#: The row that throughputs of tables without DeiT are compared with.
BASELINE = "DeiT-S"
CHANNELS = 3

#: (model, "eager" or "fused") -> images/s.
Speeds = dict[tuple[str, str], float]


def count(printed: Printed) -> Measured:
    """Count parameters and MACs; only ``missing``, the reason, for a row without a model."""
    reason = paper_rows.why_missing(printed)
    if reason is not None:
        return {"missing": reason}
    size = paper_rows.size_of(printed)
    left_out = 0 if printed.get("pos_embed", True) else size.position_embeddings
    counted = {
        "parameters": size.parameters,
        "position_embeddings": size.position_embeddings,
        "macs": size.macs,
        "mparams": (size.parameters - left_out) / 1e6,
        "gmacs": size.macs / 1e9,
    }
    if "dims" in printed:
        counted |= paper_rows.architecture(printed["model"])
    return counted


# Throughput


def contenders(
    printed: Printed, model: nn.Module, options: argparse.Namespace
) -> tuple[list[Contender], dict[str, measure.Tolerance]]:
    """The model eager, and if it is ours fused; and the tolerance of their logits."""
    dtype, device = DTYPES[options.dtype], options.device
    size = paper_rows.image_size(printed, model)
    model.to(device, dtype)
    x = torch.randn(options.batch, CHANNELS, *size, device=device).to(dtype)
    checked = min(options.batch, model_bench.CHECKED)

    def runner(model: nn.Module, x: Tensor) -> model_bench.Runner:
        return model_bench.Runner(model, "inference", x.dtype, x, torch.empty(0))

    def contender(kind: str, model: nn.Module) -> Contender:
        timed = runner(model, x)
        return Contender(kind, timed, lambda: timed.results(checked), ours=kind == FUSED)

    exact = runner(copy.deepcopy(model).double(), x[:checked].double()).results(checked)
    eager = runner(model, x[:checked]).results(checked)
    made = [contender(EAGER, model)]
    if paper_rows.is_ours(printed["model"]):
        fused: Any = copy.deepcopy(model)
        made.append(contender(FUSED, fused.set_fused()))
    return made, measure.tolerances(["logits"], exact, eager, dtype)


def time_model(run: Contest, printed: Printed) -> None:
    options, name = run.options, printed["model"]
    torch.manual_seed(0)
    model = paper_rows.make_model(name)
    height, width = paper_rows.image_size(printed, model)

    def complete(timed_rows: list[report.Row]) -> None:
        for row in timed_rows:
            row["images_per_second"] = options.batch / row["mean_ms"] * 1e3

    run.point(
        "inference",
        f"{name}, batch {options.batch}",
        lambda: contenders(printed, model, options),
        {"model": name, "img_size": [height, width], "batch": options.batch},
        title=f"{name}, {height} x {width}, batch {options.batch}, {options.dtype}",
        complete=complete,
    )


def time_models(run: Contest, rows: Sequence[Printed]) -> Speeds:
    """Time the model of each row once."""
    for printed in {p["model"]: p for p in rows if not paper_rows.why_missing(p)}.values():
        time_model(run, printed)
    timed = report.timed(run.rows)
    return {(row["model"], row["contender"]): row["images_per_second"] for row in timed}


def add_throughput(printed: Printed, measured: Measured, speeds: Speeds, baseline: Printed) -> None:
    """Add a row's images/s, and as a share of its baseline's."""
    shares = {}
    for kind in (EAGER, FUSED):
        speed, base = (speeds.get((p["model"], kind)) for p in (printed, baseline))
        if speed is not None:
            measured[kind] = speed
            if base is not None:
                shares[kind] = speed / base
    measured["of_baseline"] = shares


def add_baselines(tables: dict[str, Any]) -> dict[str, Printed]:
    """Add to each row its baseline's name, and the paper's throughput as a share of its.

    Returns:
        Row's name -> row, of all rows that are baselines.
    """
    deit = {p["row"]: p for p in tables["2"]["rows"] if p["row"].startswith("DeiT")}
    for printed in (printed for table in tables.values() for printed in table["rows"]):
        base = deit[printed.setdefault("baseline", BASELINE)]
        if "images_per_second" in printed:
            printed["of_baseline"] = printed["images_per_second"] / base["images_per_second"]
    return deit


# Accuracy


def add_accuracy(printed: Printed, measured: Measured, options: argparse.Namespace) -> None:
    """Add a row's accuracy, or that there is no checkpoint."""
    checkpoint = paper_accuracy.find_checkpoint(printed, options.checkpoints)
    if checkpoint is None:
        measured["no_accuracy"] = "no checkpoint"
        return
    measured |= paper_accuracy.measure_accuracy(
        printed["model"], options.accuracy, checkpoint, options.batch, options.device, options.dtype
    )


# The program


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(__doc__)
    nothing_compiled = {"no_compile": True, "compile_mode": "default", "compile_budget": 0.0}
    parser.set_defaults(benchmark="paper-tables", min_time=float("inf"), **nothing_compiled)
    names = list(paper_rows.tables())
    add = parser.add_argument
    add("--tables", default=",".join(names), metavar="LIST", help=f"of {', '.join(names)}")
    add("--throughput", action="store_true", help="measure images/s")
    add("--accuracy", type=Path, metavar="DIR", help="folder of ImageNet's validation images")
    add(
        "--checkpoints",
        metavar="SOURCE",
        help="official, timm, or a folder with files called as the models, e.g. "
        "crossvit_15_240.safetensors",
    )
    add = parser.add_argument_group("where and how").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU")
    paper = model_bench.PAPER
    add("--batch", type=positive, default=paper["batch"], help=f"images ({paper['batch']})")
    add(
        "--iterations",
        dest="repeats",
        type=positive,
        default=paper["repeats"],
        help=f"timed batches ({paper['repeats']})",
    )
    add = command_line.add_files(parser)
    add("--markdown", type=Path, metavar="PATH.md", help="write the tables instead of printing")
    options = command_line.completed(parser, arguments)
    options.tables = options.tables.split(",")
    for name in options.tables:
        if name not in names:
            parser.error(f"--tables {name}: expected some of {','.join(names)}")
    if (options.accuracy is None) != (options.checkpoints is None):
        parser.error("--accuracy and --checkpoints: expected both or neither")
    if options.accuracy and not options.accuracy.is_dir():
        parser.error(f"--accuracy {options.accuracy}: no such folder")
    if options.markdown and not options.markdown.parent.is_dir():
        parser.error(f"--markdown {options.markdown}: no such folder")
    releases = (None, *paper_accuracy.RELEASES)
    if options.checkpoints not in releases and not Path(options.checkpoints).is_dir():
        parser.error(f"--checkpoints {options.checkpoints}: no such folder")
    return options


def measure_rows(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the tables with what was measured, the document to save, and the exit code."""
    tables = paper_rows.tables()
    baselines = add_baselines(tables)
    tables = {name: tables[name] for name in options.tables}
    for table in tables.values():
        table["measured"] = [count(printed) for printed in table["rows"]]
    document, code, speeds = None, 0, {}
    rows = [printed for table in tables.values() for printed in table["rows"]]
    if options.throughput:
        columns = {"images/s": lambda row: f"{row['images_per_second']:.4g}"}
        with Contest(options, "CrossViT, fused", columns, headline=FUSED) as run:
            needed = [baselines[name] for name in dict.fromkeys(p["baseline"] for p in rows)]
            speeds = time_models(run, [*needed, *rows])
            code = run.finish()
        document = run.document
    for table in tables.values():
        for printed, measured in zip(table["rows"], table["measured"], strict=True):
            if options.throughput:
                add_throughput(printed, measured, speeds, baselines[printed["baseline"]])
            if options.accuracy:
                add_accuracy(printed, measured, options)
    document = document or report.new_document(options)
    return tables, document | {"tables": plain(tables)}, code


def plain(tables: dict[str, Any]) -> dict[str, Any]:
    """Return the tables for JSON: of each row what the paper has, what is here, and ratios."""
    return {
        name: {
            "title": table["title"],
            "rows": [
                paper_rows.plain(*pair)
                for pair in zip(table["rows"], table["measured"], strict=True)
            ],
        }
        for name, table in tables.items()
    }


def markdown(options: argparse.Namespace, tables: dict[str, Any], device: str) -> str:
    groups = ["counted"]
    groups += ["throughput"] if options.throughput else []
    groups += ["accuracy"] if options.accuracy else []
    texts = [
        paper_markdown.table(name, table["title"], table["rows"], table["measured"], groups)
        for name, table in tables.items()
    ]
    return "\n".join([paper_markdown.introduction(options, device), *texts])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        tables, document, code = measure_rows(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"paper_tables.py: {error}", file=sys.stderr)
        return 1
    report.save(options, document)
    text = markdown(options, tables, document["environment"]["device"])
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())

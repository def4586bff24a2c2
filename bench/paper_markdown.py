"""The paper's tables as Markdown: what was measured, what the paper prints, and the ratio."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import paper_rows
from paper_rows import Printed

Measured = dict[str, Any]
NO_VALUE = "-"
WIDTH = 120  # of lines of text
EAGER, FUSED = "eager", "fused"

INTRODUCTION = """
What [CrossViT](https://arxiv.org/abs/2103.14899) (ICCV 2021) prints, beside the models here and,
where the paper compares with others, those of timm. Written by `python
bench/paper_tables.py{chosen}`. Ratios are ours to the paper's, which it has rounded.

Parameters are exact. Beside them they are in millions as the paper counts them: it leaves position
embeddings out of rows with an asterisk. MACs, which the paper calls FLOPs, are those of one image
in eager mode, with attention's two products and without those of other operations;
`FlopCounterMode` counts timm's models."""
THROUGHPUT = """

Throughput is the mean over {repeats} batches of {batch} images on {device}, in {dtype}; the paper's
is over 100 batches of 64 on a V100, in a dtype that it does not state. Shares are of DeiT's
throughput in the same mode and the same run."""
ACCURACY = """

Accuracy is top-1 in percent, of the mean of both heads unless a branch is named, by
`crossvit.evaluate` with the released code's transform."""


def introduction(options: argparse.Namespace, device: str) -> str:
    """Return the title, and how the columns were measured."""
    every = list(paper_rows.tables())
    chosen = "" if options.tables == every else f" --tables {','.join(options.tables)}"
    chosen += " --throughput" * options.throughput
    if options.accuracy:
        chosen += f" --accuracy {options.accuracy} --checkpoints {options.checkpoints}"
    text = INTRODUCTION + THROUGHPUT * options.throughput + ACCURACY * bool(options.accuracy)
    text = text.format(**vars(options) | {"chosen": chosen, "device": device})
    paragraphs = (textwrap.fill(part.strip(), WIDTH) for part in text.split("\n\n"))
    return "\n\n".join(["# The paper's tables", *paragraphs]) + "\n"


class Column(NamedTuple):
    """A column of a table: its header, and its cell of what a row prints and what was measured."""

    header: str
    cell: Callable[[Printed, Measured], str]


def number(value: float | None, template: str) -> str:
    return NO_VALUE if value is None else template.format(value)


def printed_number(value: Decimal | int | None) -> str:
    return NO_VALUE if value is None else str(value)


def ratio(ours: float | None, papers: Decimal | int | None) -> str:
    return NO_VALUE if ours is None or papers is None else f"{ours / float(papers):.3f}"


def beside_paper(header: str, key: str, template: str) -> list[Column]:
    """What was measured, the paper's value, and their ratio."""
    return [
        Column(header, lambda p, m: number(m.get(key), template)),
        Column("paper", lambda p, m: printed_number(p.get(key))),
        Column("ratio", lambda p, m: ratio(m.get(key), p.get(key))),
    ]


def architecture_columns(rows: Sequence[Printed]) -> list[Column]:
    """The models' own, with the paper's value in brackets where it differs."""
    headers = {"embedding": "patch embedding", "patches": "patches S, L", "dims": "width S, L"}

    def column(key: str) -> Column:
        def cell(printed: Printed, measured: Measured) -> str:
            found, expected = (_text(source[key]) for source in (measured, printed))
            return found if found == expected else f"{found} (paper: {expected})"

        return Column(headers.get(key, key), cell)

    return [column(key) for key in paper_rows.ARCHITECTURE if key in rows[0]]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def counted_columns(rows: Sequence[Printed]) -> list[Column]:
    """Parameters and MACs; the paper's, unless it prints none."""

    def as_paper(printed: Printed, measured: Measured) -> str:
        mark = "" if printed.get("pos_embed", True) else " *"
        return number(measured.get("mparams"), "{:.3f}" + mark)

    parameters = beside_paper("as counted there, M", "mparams", "{:.3f}")
    parameters[0] = parameters[0]._replace(cell=as_paper)
    macs = beside_paper("MACs, G", "gmacs", "{:.3f}")
    return [
        Column("parameters", lambda p, m: number(m.get("parameters"), "{:,}")),
        *(parameters if any("mparams" in p for p in rows) else []),
        *(macs if any("gmacs" in p for p in rows) else macs[:1]),
    ]


def throughput_columns(rows: Sequence[Printed]) -> list[Column]:
    """Images/s, and as a share of DeiT's in the same mode and run."""

    def of_baseline(kind: str) -> Column:
        return Column(
            f"{kind}, of DeiT's", lambda p, m: number(m.get("of_baseline", {}).get(kind), "{:.3f}")
        )

    papers = [
        Column("paper, V100", lambda p, m: printed_number(p.get("images_per_second"))),
        Column(f"{FUSED} / paper", lambda p, m: ratio(m.get(FUSED), p.get("images_per_second"))),
    ]
    papers_share = Column("paper's, of DeiT's", lambda p, m: number(p.get("of_baseline"), "{:.3f}"))
    printed = any("images_per_second" in p for p in rows)
    return [
        Column(f"{EAGER}, images/s", lambda p, m: number(m.get(EAGER), "{:.1f}")),
        Column(f"{FUSED}, images/s", lambda p, m: number(m.get(FUSED), "{:.1f}")),
        *(papers if printed else []),
        of_baseline(EAGER),
        of_baseline(FUSED),
        *([papers_share] if printed else []),
        Column("DeiT", lambda p, m: p["baseline"]),
    ]


def accuracy_columns(rows: Sequence[Printed]) -> list[Column]:
    """Top-1 accuracy in percent, of the branches alone where the paper has them."""
    headers = {"top1": "top-1, %", "top1_l": "L branch alone", "top1_s": "S branch alone"}
    columns = [
        column
        for key, header in headers.items()
        if any(key in printed for printed in rows)
        for column in beside_paper(header, key, "{:.2f}")
    ]
    if columns:
        first = columns[0].cell
        columns[0] = columns[0]._replace(cell=lambda p, m: m.get("no_accuracy") or first(p, m))
    return columns


def table(
    name: str,
    title: str,
    rows: Sequence[Printed],
    measured: Sequence[Measured],
    groups: Sequence[str],
) -> str:
    """Return a table with its title and notes.

    Args:
        name: "2", or "text" for what the paper only says in the text.
        title: As in the paper.
        rows: What the paper prints.
        measured: What was measured of each row.
        groups: Which columns: "counted", "throughput", "accuracy".
    """
    columns = [
        Column("", lambda p, m: p["row"]),
        Column("model", lambda p, m: f"`{p['model']}`" if "missing" not in m else m["missing"]),
    ]
    if "dims" in rows[0]:
        columns += architecture_columns(rows)
    makers = {
        "counted": counted_columns,
        "throughput": throughput_columns,
        "accuracy": accuracy_columns,
    }
    columns += [column for group in groups for column in makers[group](rows)]
    cells = [[c.cell(p, m) for c in columns] for p, m in zip(rows, measured, strict=True)]
    heading = title if name == "text" else f"Table {name}. {title}"
    lines = [f"## {heading}", "", _line(c.header for c in columns)]
    lines += [_line(["---", "---", *["---:"] * (len(columns) - 2)]), *map(_line, cells)]
    notes = [f"- {p['row']}: {p['note']}" for p in rows if "note" in p]
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"

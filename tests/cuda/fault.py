"""Faults of copies of the CUDA kernels: changes of their sources, and what reports them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

Change = tuple[str, str, str]  # file, text that occurs in it once, replacement

RACE, OVERFLOW = "ThreadSanitizer: data race", "AddressSanitizer: heap-buffer-overflow"


@dataclasses.dataclass(frozen=True)
class Build:
    sanitizer: str | None = None

    def __str__(self) -> str:
        return self.sanitizer or "plain"


BUILDS = PLAIN, THREAD, ADDRESS = Build(), Build("thread"), Build("address")


@dataclasses.dataclass(frozen=True)
class Fault:
    """Changes that apply if FAULT is true, and the report of a run of a case."""

    changes: Sequence[Change]
    case: str
    says: str
    build: Build = PLAIN


def race(case: str, *changes: Change) -> Fault:
    return Fault(changes, case, RACE, THREAD)


def overflow(case: str, *changes: Change) -> Fault:
    return Fault(changes, case, OVERFLOW, ADDRESS)


def wrong(case: str, result: str, *changes: Change) -> Fault:
    return Fault(changes, case, f"wrong result: {result}, error")


def depends_on_batch(case: str, result: str, *changes: Change) -> Fault:
    return Fault(changes, case, f"wrong result: {result}, bits that depend on the batch")


def left_out(file: str, text: str, context: str | None = None) -> Change:
    """Remove a text that occurs once in the context."""
    context = context or text
    before, after = context.split(text)
    return file, context, f"{before}if (!FAULT) {text}{after}"


BARRIER, WARP_BARRIER, CLUSTER_BARRIER = "__syncthreads();", "__syncwarp();", "cluster_sync();"


def no_barrier(file: str, context: str) -> Change:
    return left_out(file, BARRIER, context)


def no_warp_barrier(file: str, context: str) -> Change:
    return left_out(file, WARP_BARRIER, context)


def barrier_of_a_block(file: str, context: str) -> Change:
    """Replace a cluster's barrier by the block's: harder to catch than removing it."""
    before, after = context.split(CLUSTER_BARRIER)
    return file, context, f"{before}{{ if (FAULT) {BARRIER} else {CLUSTER_BARRIER} }}{after}"


def barriers_of_blocks(file: str, arrival: str, wait: str) -> tuple[Change, Change]:
    """Do the same where arrival and wait are apart: contexts with the place of each as {}."""
    at, then = (f"{barrier};" for barrier in ("cluster_arrive()", "cluster_wait()"))
    return (
        (file, arrival.format(at), arrival.format(f"if (!FAULT) {at}")),
        (file, wait.format(then), wait.format(f"if (FAULT) {BARRIER} else {then}")),
    )

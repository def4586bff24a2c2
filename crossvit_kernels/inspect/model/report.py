"""Model every launch of an operation, and print or keep the results: ``inspect --model``."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from crossvit_kernels import supported
from crossvit_kernels.inspect.ahead_of_time import DTYPES
from crossvit_kernels.inspect.model.estimate import Estimate, estimate
from crossvit_kernels.inspect.model.gpus import GPUS, Gpu
from crossvit_kernels.inspect.model.workloads import Workload, workloads


@dataclasses.dataclass(frozen=True)
class Row:
    """A launch and its estimate.

    Attributes:
        backend: "triton", "cuda", or a variant as "triton:gluon".
        model: The model's name.
        operation: The operation's name.
        direction: "forward", "training" or "backward": see Workload.
        channels: Channels of a token.
        tokens: Tokens of an image.
        batch: Images.
        dtype: As on the command line.
        kernel: The kernel's name.
        config: The configuration that was chosen for it.
        modelled: The estimate; never a measurement.
    """

    backend: str
    model: str
    operation: str
    direction: str
    channels: int
    tokens: int
    batch: int
    dtype: str
    kernel: str
    config: str
    modelled: Estimate

    @property
    def instructions_per_token(self) -> dict[str, float]:
        """Instructions of warps per token, by the pipe they take."""
        tokens = self.batch * self.tokens
        return {pipe: count / tokens for pipe, count in self.modelled.instructions.items()}


class Job(NamedTuple):
    """One direction of an operation, described so that another process can model it.

    Attributes:
        backend: "triton", "cuda", or a variant as "triton:gluon".
        gpu: The GPU's name.
        model: The model's name.
        dtype: As on the command line.
        batch: Images.
        workload_index: The workload's, among the model's.
        kernel: Text that the kernels' names contain.
    """

    backend: str
    gpu: str
    model: str
    dtype: str
    batch: int
    workload_index: int
    kernel: str

    @property
    def workload(self) -> Workload:
        return list(workloads(self.model, DTYPES[self.dtype], self.batch))[self.workload_index]

    @property
    def key(self) -> tuple[Any, ...]:
        """What its rows have in common, and no other job's."""
        w = self.workload
        shape = w.operation.name, w.direction, w.channels
        return (self.backend, self.model, *shape, self.batch, self.dtype)

    def rows(self) -> list[Row]:
        gpu, workload = GPUS[self.gpu], self.workload
        return [
            Row(
                backend=self.backend,
                model=self.model,
                operation=workload.operation.name,
                direction=workload.direction,
                channels=workload.channels,
                tokens=workload.tokens,
                batch=self.batch,
                dtype=self.dtype,
                kernel=launch.kernel.name,
                config=config,
                modelled=estimate(launch, gpu),
            )
            for launch, config in workload.launches(self.backend, gpu)
            if self.kernel in launch.kernel.name
        ]


def jobs(
    backends: Sequence[str],
    gpu: Gpu,
    models: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[int],
    channels: Container[int] | None = None,
    kernel: str = "",
) -> list[Job]:
    """Return all directions of the models' operations.

    Args:
        backends: See Row.
        gpu: The GPU.
        models: The models' names.
        dtypes: As on the command line.
        batches: Images.
        channels: Widths of tokens; None for all.
        kernel: Text that kernels' names contain.
    """
    return [
        Job(backend, gpu.name, model, dtype, batch, index, kernel)
        for model in models
        for backend in backends
        for dtype in dtypes
        for batch in batches
        for index, workload in enumerate(workloads(model, DTYPES[dtype], batch))
        if backend in workload.operation.backends
        if channels is None or workload.channels in channels
    ]


def rows(pending: Sequence[Job], processes: int) -> Iterator[list[Row]]:
    """Yield each job's rows, in order."""
    if processes == 1 or len(pending) < 2:
        yield from map(Job.rows, pending)
        return
    with ProcessPoolExecutor(min(processes, len(pending))) as pool:
        yield from pool.map(Job.rows, pending)


def document(gpu: Gpu, rows_as_json: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return rows with what they depend on, to be kept as JSON."""
    return {
        "what": "a model of machine code, not a measurement",
        "gpu": dataclasses.asdict(gpu),
        "date": datetime.date.today().isoformat(),
        "versions": {name: supported.installed_version(name) for name in ("torch", "triton")},
        "rows": list(rows_as_json),
    }


def _a_line_each(of_rows: dict[str, Any]) -> str:
    """Return a document as JSON with a line for each row."""
    lines = ",".join(f"\n  {json.dumps(row)}" for row in of_rows["rows"])
    head = json.dumps({**of_rows, "rows": []}, indent=1)
    return head.replace('"rows": []', f'"rows": [{lines}\n ]') + "\n"


def as_json(row: Row) -> dict[str, Any]:
    modelled = {name: _rounded(value) for name, value in vars(row.modelled).items()}
    del modelled["instructions"]
    modelled["instructions_per_token"] = _rounded(row.instructions_per_token)
    return {**vars(row), "modelled": modelled}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return value


def keep(path: Path, gpu: Gpu, todo: Sequence[Job], processes: int) -> None:
    """Write the rows of jobs to a JSON file, which is complete after each; go on with a part.

    Raises:
        ValueError: The file is of another GPU or other versions.
    """
    kept: list[dict[str, Any]] = []
    if path.exists():
        earlier, now = json.loads(path.read_text()), document(gpu, [])
        for name in ("versions", "gpu"):
            if earlier[name] != json.loads(json.dumps(now[name])):
                raise ValueError(f"{path}: its {name} differ, found {earlier[name]}")
        kept = earlier["rows"]
    names = ("backend", "model", "operation", "direction", "channels", "batch", "dtype")
    done = {tuple(row[name] for name in names) for row in kept}
    pending = [job for job in todo if job.key not in done]
    for number, job_rows in enumerate(rows(pending, processes), 1):
        kept += map(as_json, job_rows)
        part = path.with_suffix(".part")
        part.write_text(_a_line_each(document(gpu, kept)))
        os.replace(part, path)
        print(f"inspect: {number} of {len(pending)}", file=sys.stderr, flush=True)


def show(gpu: Gpu, rows_by_job: Iterable[list[Row]]) -> None:
    """Print rows as a table, and below it the sums over the kernels of an operation."""
    print(f"A cycle model of the {gpu.name}, not a measurement: docs/cycle_model.md.")
    print(_HEADER, flush=True)
    sums: dict[tuple[Any, ...], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for row in (row for job_rows in rows_by_job for row in job_rows):
        print(_line(row), flush=True)
        name = f"{row.operation} {row.direction}, C = {row.channels}, {row.dtype}"
        total = sums[row.backend, row.model, name, row.batch]
        total[0] += row.modelled.microseconds
        total[1] += row.modelled.floor
    for (backend, model, name, batch), of_half in [*sums.items()]:
        operation, _, rest = name.partition(" ")
        other = backend, model, f"layernorm_ffn {rest}", batch
        if operation == "layernorm_msa" and other in sums:
            both = [a + b for a, b in zip(of_half, sums[other], strict=True)]
            sums[backend, model, f"a block, {rest}", batch] = both
    print(
        f"\n{'backend':12} {'model':5} {'operation':50} {'images':>6} {'us':>9} {'floor':>8} share"
    )
    for (backend, model, name, batch), (microseconds, floor) in sums.items():
        print(
            f"{backend:12} {model:5} {name:50} {batch:6} {microseconds:9.1f} {floor:8.1f} "
            f"{floor / microseconds:5.0%}"
        )
    sys.stdout.flush()


_HEADER = (
    f"{'backend':12} {'model':5} {'kernel':24} {'C':>4} {'images':>6} {'us':>8} {'floor':>7} "
    f"{'share':>6} {'blocks':>6} {'waves':>5} {'per token':>9}  bound by; busy; configuration"
)


def _line(row: Row) -> str:
    m = row.modelled
    busiest = sorted(m.busy.items(), key=lambda item: -item[1])[:3]
    busy = ", ".join(f"{name} {share:.0%}" for name, share in busiest)
    line = (
        f"{row.backend:12} {row.model:5} {row.kernel:24} {row.channels:4} {row.batch:6} "
        f"{m.microseconds:8.1f} {m.floor:7.1f} {m.share_of_floor:6.0%} {m.blocks_per_sm:6} "
        f"{m.waves:5.1f} {sum(row.instructions_per_token.values()):9.1f}  "
        f"{m.bound_by}; {busy}; {row.config}"
    )
    if m.bank_conflicts > 0.05:
        line += f"\n    bank conflicts: {m.bank_conflicts:.0%} of shared memory's passes, "
        line += f"most at {m.conflicts_at}"
    waits = ", ".join(f"{share:.0%} at {source}" for source, share in m.waits_at.items())
    line += f"\n    waits: {waits}"
    for source, times in m.unknown_branches.items():
        line += f"\n    guessed: the branch at {source}, {times} times"
    return line

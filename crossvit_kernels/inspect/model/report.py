"""Print what the model says of every launch of an operation: ``inspect --model``."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
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
        backend: "triton" or "cuda".
        operation: Of the launch.
        direction: "forward" or "backward".
        channels: Of the tokens.
        tokens: Of an image.
        batch: Images.
        dtype: As on the command line.
        kernel: Its name.
        config: The configuration that was chosen for it.
        modelled: Never a measurement.
    """

    backend: str
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
    def instructions_of_token(self) -> dict[str, float]:
        """Instructions of a warp for each token, by the pipe they take."""
        tokens = self.batch * self.tokens
        return {name: n / tokens for name, n in self.modelled.instructions.items()}


class Job(NamedTuple):
    """A pass of an operation, as another process finds it.

    Attributes:
        backend: "triton" or "cuda".
        gpu: The GPU's name.
        model: The model's name.
        dtype: As on the command line.
        batch: Images.
        place: Of the workload among the model's.
        kernel: What the kernels' names contain.
    """

    backend: str
    gpu: str
    model: str
    dtype: str
    batch: int
    place: int
    kernel: str

    def rows(self) -> list[Row]:
        gpu, found = GPUS[self.gpu], []
        workload = [*workloads(self.model, DTYPES[self.dtype], self.batch)][self.place]
        for launch, config in workload.launches(self.backend, gpu):
            name = launch.kernel.name
            if self.kernel in name:
                modelled = estimate(launch, gpu)
                found.append(_row(self.backend, workload, self.dtype, name, config, modelled))
        return found


def jobs(
    backends: Sequence[str],
    gpu: Gpu,
    model: str,
    dtypes: Sequence[str],
    batches: Sequence[int],
    channels: Container[int] | None = None,
    kernel: str = "",
) -> list[Job]:
    """All passes of a model's operations.

    Args:
        backends: Of "triton" and "cuda".
        gpu: The GPU.
        model: The model's name.
        dtypes: As on the command line.
        batches: Images.
        channels: Only tokens of these widths.
        kernel: Only kernels whose names contain this.
    """
    return [
        Job(backend, gpu.name, model, dtype, batch, place, kernel)
        for backend in backends
        for dtype in dtypes
        for batch in batches
        for place, workload in enumerate(workloads(model, DTYPES[dtype], batch))
        if backend in workload.operation.backends
        if channels is None or workload.channels in channels
    ]


def rows(found: Sequence[Job], processes: int) -> Iterator[Row]:
    """Their rows in order, by several processes."""
    if processes == 1 or len(found) < 2:
        for job in found:
            yield from job.rows()
        return
    with ProcessPoolExecutor(min(processes, len(found))) as pool:
        for of_job in pool.map(Job.rows, found):
            yield from of_job


def _row(
    backend: str, workload: Workload, dtype: str, kernel: str, config: str, modelled: Estimate
) -> Row:
    return Row(
        backend,
        workload.operation.name,
        workload.direction,
        workload.channels,
        workload.tokens,
        workload.batch,
        dtype,
        kernel,
        config,
        modelled,
    )


def document(gpu: Gpu, found: Iterable[Row]) -> dict[str, Any]:
    """The rows with what they depend on, to be kept as JSON."""
    return {
        "what": "a model of machine code, not a measurement",
        "gpu": dataclasses.asdict(gpu),
        "date": datetime.date.today().isoformat(),
        "versions": {name: supported.installed_version(name) for name in ("torch", "triton")},
        "rows": [_as_json(row) for row in found],
    }


def _as_json(row: Row) -> dict[str, Any]:
    of_token = {name: _rounded(n) for name, n in row.instructions_of_token.items()}
    modelled = {name: _rounded(value) for name, value in vars(row.modelled).items()}
    modelled["instructions_of_token"] = of_token
    del modelled["instructions"]
    return {**vars(row), "modelled": modelled}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return value


def show(gpu: Gpu, found: Iterable[Row], as_json: bool) -> None:
    """Print rows, as a table with the passes' sums or as JSON."""
    if as_json:
        print(json.dumps(document(gpu, found), indent=1))
        return
    print(f"A cycle model of the {gpu.name}, not a measurement: docs/cycle_model.md.")
    print(_HEADER, flush=True)
    sums: dict[tuple[Any, ...], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for row in found:
        print(_line(row), flush=True)
        key = row.backend, row.operation, row.direction, row.channels, row.dtype, row.batch
        sums[key][0] += row.modelled.microseconds
        sums[key][1] += row.modelled.floor
    print(f"\n{'backend':7} {'pass':50} {'images':>6} {'us':>9} {'floor':>8} {'share':>6}")
    for (backend, operation, direction, channels, dtype, batch), (total, floor) in sums.items():
        name = f"{operation} {direction}, C = {channels}, {dtype}"
        print(f"{backend:7} {name:50} {batch:6} {total:9.1f} {floor:8.1f} {floor / total:6.0%}")
    sys.stdout.flush()


_HEADER = (
    f"{'backend':7} {'kernel':24} {'C':>4} {'images':>6} {'us':>8} {'floor':>7} {'share':>6} "
    f"{'blocks':>6} {'waves':>5} {'per token':>9}  bound by; busy; configuration"
)


def _line(row: Row) -> str:
    m = row.modelled
    busiest = sorted(m.busy.items(), key=lambda item: -item[1])[:3]
    busy = ", ".join(f"{name} {share:.0%}" for name, share in busiest)
    of_token = sum(row.instructions_of_token.values())
    line = (
        f"{row.backend:7} {row.kernel:24} {row.channels:4} {row.batch:6} {m.microseconds:8.1f} "
        f"{m.floor:7.1f} {m.share_of_floor:6.0%} {m.blocks_per_sm:6} {m.waves:5.1f} "
        f"{of_token:9.1f}  {m.bound_by}; {busy}; {row.config}"
    )
    if m.bank_conflicts > 0.05:
        line += f"\n    bank conflicts: {m.bank_conflicts:.0%} of shared memory's passes, "
        line += f"most at {m.conflicts_at}"
    waits = ", ".join(f"{share:.0%} at {at}" for at, share in m.waits_at.items())
    line += f"\n    waits: {waits}"
    for source, times in m.unknown_branches.items():
        line += f"\n    guessed: the branch at {source}, {times} times"
    return line

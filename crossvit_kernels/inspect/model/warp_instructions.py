"""Translate instructions that concern a warp as a whole: uniform registers, votes, shuffles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crossvit_kernels.inspect.model.lanes import Value, broadcast_lanes
from crossvit_kernels.inspect.model.sass import Instruction
from crossvit_kernels.inspect.model.translator import (
    Function,
    Registers,
    Translator,
    builds,
    is_predicate,
    write,
)


@builds("R2UR")
def _to_uniform(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """The first active lane's value; a predicate, if there is one, says which lanes differ."""
    *differs, destination, source = operands
    read = t.reader(source)

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        value = read(registers)
        chosen = _of_first_lane(value, mask)
        write(registers, destination, chosen, mask)
        for name in differs:
            write(registers, name, None if value is None else value != chosen, mask)

    return run


def _of_first_lane(value: Value, mask: Value) -> Value:
    """The value in the first lane that takes part, [warps, 1]."""
    if not isinstance(value, np.ndarray) or value.shape[1] == 1:
        return value
    if not isinstance(mask, np.ndarray) or mask.shape[1] == 1:
        return value[:, :1]
    count = max(len(value), len(mask))
    first = broadcast_lanes(mask, count).argmax(axis=1)
    return broadcast_lanes(value, count)[np.arange(count), first][:, None]


@builds("SHFL")
def _shuffle(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """Of one lane to all, which leaves what is the same in all lanes as it is."""
    if i.modifiers != ("IDX",) or not is_predicate(operands[0]):
        return None
    source, lane = t.reader(operands[2]), t.reader(operands[3])

    def run(registers: Registers, mask: Value) -> None:
        value, index = source(registers), lane(registers)
        if isinstance(value, np.ndarray) and value.shape[1] > 1:
            value = value[:, index : index + 1] if isinstance(index, int) else None
        write(registers, operands[0], None if value is None else True, mask)
        write(registers, operands[1], value, mask)

    return run


@builds("ELECT")
def _elect(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """The first of the lanes that take part."""

    def run(registers: Registers, mask: Value) -> None:
        lane = registers.special["SR_LANEID"]
        if mask is None or mask is False:
            return
        first = broadcast_lanes(mask, len(lane)).argmax(axis=1)[:, None]
        write(registers, operands[0], lane == first, mask)

    return run


@builds("VOTE", "VOTEU")
def _vote(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """A predicate of the lanes that take part: as bits, and whether any or all of them have it."""
    *written, source = operands
    read, of_all = t.reader(source), "ALL" in i.modifiers

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        value, bits, holds = read(registers), None, None
        if value is not None and mask is not None:
            lane = registers.special["SR_LANEID"]
            active = broadcast_lanes(mask, len(lane))
            votes = broadcast_lanes(value, len(lane)) & active
            bits = (votes.astype(np.int64) << lane).sum(axis=1, keepdims=True)
            holds = (votes == active).all(axis=1) if of_all else votes.any(axis=1)
            holds = holds[:, None]
        for name in written:
            write(registers, name, holds if is_predicate(name) else bits, mask)

    return run


@builds("UTCATOMSWS")
def _allocate(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """There are as many columns of tensor memory as a block asks for."""
    if "FIND_AND_SET" not in i.modifiers:
        return None
    allocated, column = operands[:2]

    def run(registers: Registers, mask: Value) -> None:
        write(registers, allocated, True, mask)
        write(registers, column, 0, mask)

    return run

"""Translate moves, comparisons, conversions and what else decides trip counts and addresses."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from crossvit_kernels.inspect.model import lanes
from crossvit_kernels.inspect.model.lanes import WORD, Value, broadcast_lanes
from crossvit_kernels.inspect.model.sass import Instruction
from crossvit_kernels.inspect.model.translator import (
    Function,
    Registers,
    Translator,
    builds,
    is_predicate,
    word_function,
    write,
)


@builds("MOV", "R2UR", "S2R", "S2UR", "CS2R")
def _move(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    destination, source = operands[0], operands[1]
    if source == "SRZ":
        return word_function(lambda: 0, destination, count=1 if "32" in i.modifiers else 2)
    if source.startswith("SR_"):
        return word_function(lambda value: value, destination, lambda r: r.special.get(source))
    if i.opcode == "R2UR":
        return _to_uniform(t, operands)
    return word_function(lambda value: value, destination, t.reader(source))


def _to_uniform(t: Translator, operands: Sequence[str]) -> Function:
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


@builds("LDC", "LDCU")
def _load_constant(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if operands[1].endswith("+0x2cc]"):  # behind SR_CgaSize: the blocks of a cluster
        return word_function(lambda value: value, operands[0], t.reader("c[0x0][0x2cc]"))
    if "R" in operands[1].replace("[RZ", "["):
        return None
    if i.access_bytes == 1:
        return word_function(
            lambda value: value, operands[0], t.byte(operands[1], signed="S8" in i.modifiers)
        )
    count = i.access_bytes // 4
    if count > 2:
        low = word_function(
            lanes_pair,
            operands[0],
            t.reader(operands[1]),
            t.reader(_beyond(operands[1], 4)),
            count=2,
        )
        high = word_function(
            lanes_pair,
            _beyond(operands[0], 2),
            t.reader(_beyond(operands[1], 8)),
            t.reader(_beyond(operands[1], 12)),
            count=2,
        )
        return lambda registers, mask: (low(registers, mask), high(registers, mask))[0]
    if count == 2:
        return word_function(lambda value: value, operands[0], t.pair(operands[1]), count=2)
    return word_function(lambda value: value, operands[0], t.reader(operands[1]))


def lanes_pair(low: Value, high: Value) -> Value:
    return lanes.pair(low, high)


def _beyond(operand: str, distance: int) -> str:
    """The constant so many bytes, or the register so many registers, further on."""
    head, number, tail = re.fullmatch(r"(.*?)(0x\w+|\d+)(\]?)", operand).groups()  # type: ignore
    if tail:
        return f"{head}{int(number, 16) + distance:#x}]"
    return f"{head}{int(number) + distance}"


@builds("ISETP")
def _compare(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    readers = [t.reader(operand) for operand in operands[2:]]
    if len(readers) == 3:
        readers.append(lambda _: False)

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        a, b, other, lower_result = (reader(registers) for reader in readers)
        known = all(value is not None for value in (a, b, other, lower_result))
        result = lanes.compare(i.modifiers, a, b, lower_result) if known else None
        for name, value in zip(operands[:2], (result, lanes.invert(result)), strict=True):
            combined = None if value is None else lanes.combine(i.modifiers, value, other)
            write(registers, name, combined, mask)

    return run


@builds("SEL")
def _select(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    a, b, condition = (t.reader(operand) for operand in operands[1:4])

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        chosen = condition(registers)
        value = None if chosen is None else lanes.select(chosen, a(registers), b(registers))
        write(registers, operands[0], value, mask)

    return run


@builds("VIMNMX", "IMNMX", "VIADDMNMX")
def _minimum_or_maximum(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    *values, least = operands[1:]
    if not is_predicate(least) or len(values) != (3 if i.opcode == "VIADDMNMX" else 2):
        return None
    readers = [t.reader(operand) for operand in values]
    chooses = t.reader(least)

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        read = [reader(registers) for reader in (*readers, chooses)]
        if any(value is None for value in read):
            value = None
        else:
            *added, b, smaller = read
            value = lanes.minimum_or_maximum(i.modifiers, sum(added) & WORD, b, bool(smaller))
        write(registers, operands[0], value, mask)

    return run


@builds("I2F", "I2FP")
def _to_float(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if "U64" in i.modifiers or "S64" in i.modifiers or "F64" in i.modifiers:
        return None
    return word_function(
        lambda a: lanes.to_float(i.modifiers, a), operands[0], t.reader(operands[1])
    )


@builds("F2I")
def _from_float(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if "U64" in i.modifiers or "S64" in i.modifiers or "F64" in i.modifiers:
        return None
    return word_function(
        lambda a: lanes.from_float(i.modifiers, a), operands[0], t.reader(operands[1])
    )


@builds("MUFU")
def _reciprocal(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if i.modifiers != ("RCP",):
        return None
    return word_function(lanes.reciprocal, operands[0], t.reader(operands[1]))


@builds("HFMA2")
def _halves(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """A constant that is moved on the pipe of 16-bit arithmetic: two halves times zero."""
    if operands[1].lstrip("-") != "RZ" or operands[2] != "RZ" or len(operands) != 5:
        return None
    upper, lower = (int(np.float16(float(o)).view(np.uint16)) for o in operands[3:5])
    return word_function(lambda: upper << 16 | lower, operands[0])


@builds("P2R")
def _pack_predicates(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if i.modifiers or not operands[3].startswith("0x"):
        return None
    selected, base = int(operands[3], 16), t.reader(operands[2])

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        bits = [registers.banks["P"][n] for n in range(7)]
        value: Value = base(registers)
        for number, bit in enumerate(bits):
            if selected >> number & 1:
                known = value is not None and bit is not None
                value = (value & ~(1 << number)) | (bit * 1) << number if known else None
        write(registers, operands[0], value, mask)

    return run


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


@builds("POPC")
def _population(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    def count(a: Value) -> Value:
        return sum((a >> bit) & 1 for bit in range(32))

    return word_function(count, operands[0], t.reader(operands[1]))


@builds("FCHK")
def _check_division(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """Whether a quotient needs the slow path, of denormal or huge numbers: it does not."""
    return lambda registers, mask: write(registers, operands[0], False, mask)


@builds("SYNCS")
def _try_wait(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """A wait for a barrier in shared memory succeeds: the timing says when."""
    if "TRYWAIT" not in i.modifiers:
        return None
    return lambda registers, mask: write(registers, operands[0], True, mask)

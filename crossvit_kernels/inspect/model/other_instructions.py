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
    following,
    is_predicate,
    word_function,
    write,
)


@builds("MOV", "S2R", "S2UR", "CS2R")
def _move(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    destination, source = operands[0], operands[1]
    if source == "SRZ":
        return word_function(lambda: 0, destination, count=1 if "32" in i.modifiers else 2)
    if source.startswith("SR_"):
        return word_function(lambda value: value, destination, lambda r: r.special.get(source))
    return word_function(lambda value: value, destination, t.reader(source))


@builds("LDC", "LDCU")
def _load_constant(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if operands[1].endswith("+0x2cc]"):  # behind SR_CgaSize: the blocks of a cluster
        return word_function(lambda value: value, operands[0], t.reader("c[0x0][0x2cc]"))
    if table := re.fullmatch(r"c\[0x2\]\[(R\d+)\]", operands[1]):
        words = np.frombuffer(t.jump_table, np.uint32).astype(np.int64)
        return word_function(lambda at: words[at // 4], operands[0], t.reader(table[1]))
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


@builds("POPC")
def _population(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    def count(a: Value) -> Value:
        return sum((a >> bit) & 1 for bit in range(32))

    return word_function(count, operands[0], t.reader(operands[1]))


@builds("STS")
def _to_shared(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """Keep words that are known and the same for all lanes of a warp: what roles are told by."""
    if i.access_bytes < 4:
        return None
    address = t.address(operands[0])
    readers = [t.reader(following(operands[1], n)) for n in range(max(i.access_bytes // 4, 1))]

    def run(registers: Registers, mask: Value) -> None:
        if registers.shared is None or mask is False or mask is None:
            return
        at = _of_warps(address(registers))
        if at is None:
            return
        blocks = registers.special["block"][:, 0]
        places = np.broadcast_to(at, (len(blocks), 1))[:, 0]
        executes = broadcast_lanes(mask, len(blocks)).any(axis=1)
        for n, read in enumerate(readers):
            word = _of_warps(read(registers))
            words = None if word is None else np.broadcast_to(word, (len(blocks), 1))[:, 0]
            for row in np.flatnonzero(executes):
                place = int(blocks[row]), int(places[row]) + 4 * n
                registers.shared[place] = None if words is None else int(words[row])

    return run


def _of_warps(value: Value) -> Value:
    """A value that is the same in all lanes of a warp, [warps, 1]; None where it is not."""
    if not isinstance(value, np.ndarray) or value.shape[1] == 1:
        return value
    return value[:, :1] if (value == value[:, :1]).all() else None


@builds("LDS")
def _from_shared(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """Load what _to_shared has kept."""
    address, size = t.address(operands[1]), i.access_bytes
    names = [following(operands[0], n) for n in range(max(size // 4, 1))]

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        at = None if registers.shared is None else _of_warps(address(registers))
        for n, name in enumerate(names):
            word = None if at is None else _kept(registers, at + 4 * n, size)
            write(registers, name, word, mask)

    return run


def _kept(registers: Registers, address: Value, size: int) -> Value:
    """The word or byte at an address, by warp."""
    shared, blocks = registers.shared, registers.special["block"][:, 0]
    assert shared is not None
    found = []
    for block, at in zip(blocks, np.broadcast_to(address, (len(blocks), 1))[:, 0], strict=True):
        word = shared.get((int(block), int(at) & ~3))
        if word is None:
            return None
        found.append(word >> 8 * (int(at) & 3) & (1 << 8 * min(size, 4)) - 1)
    return np.array(found, np.int64)[:, None]


@builds("SETMAXREG")
def _registers_of_warps(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    """A request for registers succeeds: the timing says when."""
    if "TRY_ALLOC" not in i.modifiers:
        return None
    return lambda registers, mask: write(registers, operands[0], True, mask)


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

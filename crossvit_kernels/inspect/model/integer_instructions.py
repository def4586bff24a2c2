"""Translate the integer arithmetic that decides trip counts and addresses."""

from __future__ import annotations

from collections.abc import Sequence

from crossvit_kernels.inspect.model import lanes
from crossvit_kernels.inspect.model.lanes import WORD, Value
from crossvit_kernels.inspect.model.sass import Instruction
from crossvit_kernels.inspect.model.translator import (
    Function,
    Reader,
    Registers,
    Translator,
    builds,
    is_predicate,
    word_function,
    write,
)


def _split(operands: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Destination, the predicates that are written after it, and the sources."""
    rest = list(operands[1:])
    written = []
    while rest and is_predicate(rest[0]):
        written.append(rest.pop(0))
    return operands[0], written, rest


@builds("IADD3", "IADD")
def _add(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if "64" in i.modifiers:
        readers = [_pair_with_sign(t, operand) for operand in operands[1:4]]
        return word_function(lambda *values: sum(values), operands[0], *readers, count=2)
    destination, carries, rest = _split(operands)
    extended = "X" in i.modifiers
    values = [t.reader(o, carried=not extended) for o in rest if not is_predicate(o)]
    carried = [t.reader(o) for o in rest if is_predicate(o)] if extended else []

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        read = [reader(registers) for reader in (*values, *carried)]
        known = all(value is not None for value in read)
        total = sum(value * 1 for value in read) if known else None
        write(registers, destination, None if total is None else total & WORD, mask)
        for number, name in enumerate(carries, 1):
            write(registers, name, None if total is None else total >> 32 >= number, mask)

    return run


def _pair_with_sign(t: Translator, operand: str) -> Reader:
    read = t.pair(operand.lstrip("-"))
    if not operand.startswith("-"):
        return read
    return lambda registers: None if (value := read(registers)) is None else -value


@builds("VIADD")
def _add_two(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    return word_function(lambda a, b: a + b, operands[0], *map(t.reader, operands[1:3]))


@builds("IMAD")
def _multiply_add(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    destination, written, rest = _split(operands)
    modifiers = i.modifiers
    wide = bool({"WIDE", "HI"} & {*modifiers})
    a, b = map(t.reader, rest[:2])
    c = t.pair(rest[2]) if wide else t.reader(rest[2])
    if rest[0] in ("RZ", "URZ") or rest[1] in ("RZ", "URZ"):
        a = b = lambda _: 0  # also where the other factor is not known
    carry = t.reader(rest[3]) if len(rest) > 3 else (lambda _: 0)

    def compute(a: Value, b: Value, c: Value, carry: Value) -> Value:
        total = lanes.multiply_add(modifiers, a, b, c) + carry * 1
        return total >> 32 if "HI" in modifiers else total

    if written:
        return None
    count = 2 if "WIDE" in modifiers else 1
    return word_function(compute, destination, a, b, c, carry, count=count)


@builds("LEA")
def _scaled_add(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    destination, carries, rest = _split(operands)
    carry: Reader = lambda _: False  # noqa: E731
    if is_predicate(rest[-1]):
        carry = t.reader(rest.pop())
    amount = int(rest.pop(), 16)
    readers = [t.reader(operand, carried="HI" not in i.modifiers) for operand in rest]
    upper: Reader = readers[2] if len(readers) > 2 else (lambda _: 0)

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        read = [reader(registers) for reader in (*readers[:2], upper, carry)]
        if any(value is None for value in read):
            total = None
        else:
            a, b, c, carry_in = read
            total = lanes.scaled_add(i.modifiers, a & WORD, b, c, amount, carry_in * 1)
        write(registers, destination, None if total is None else total & WORD, mask)
        for name in carries:
            write(registers, name, None if total is None else total >> 32 >= 1, mask)

    return run


@builds("LOP3", "PLOP3")
def _lookup(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if i.opcode.endswith("PLOP3"):
        return _lookup_predicates(t, operands)
    rest = list(operands)
    predicate = rest.pop(0) if is_predicate(rest[0]) else None
    destination, *sources = rest
    table = int(sources[3], 16)
    readers = [t.reader(operand) for operand in sources[:3]]
    used = [_depends(table, bit) for bit in (4, 2, 1)]
    readers = [read if uses else (lambda _: 0) for read, uses in zip(readers, used, strict=True)]
    last = t.reader(sources[4])

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        read = [reader(registers) for reader in readers]
        known = all(value is not None for value in read)
        value = lanes.lookup(table, *read) if known else None
        write(registers, destination, value, mask)
        if predicate is not None:
            other = last(registers)
            nonzero = None if value is None or other is None else (value != 0) | other
            write(registers, predicate, nonzero, mask)

    return run


def _depends(table: int, bit: int) -> bool:
    return any((table >> n & 1) != (table >> (n ^ bit) & 1) for n in range(8))


def _lookup_predicates(t: Translator, operands: Sequence[str]) -> Function:
    readers = [t.reader(operand) for operand in operands[2:5]]
    tables = [int(operand, 16) for operand in operands[5:7]]

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        read = [reader(registers) for reader in readers]
        for name, table in zip(operands[:2], tables, strict=False):
            used = [
                v if _depends(table, b) else False for v, b in zip(read, (4, 2, 1), strict=True)
            ]
            known = all(value is not None for value in used)
            write(registers, name, lanes.lookup_predicates(table, *used) if known else None, mask)

    return run


@builds("SHF")
def _shift(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    readers = map(t.reader, operands[1:4])
    return word_function(lambda *v: lanes.shift(i.modifiers, *v), operands[0], *readers)


@builds("PRMT")
def _permute(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if i.modifiers:
        return None
    destination, readers = operands[0], [t.reader(operand) for operand in operands[1:4]]

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        read = [reader(registers) for reader in readers]
        value = None if any(v is None for v in read) else lanes.permute(*read)
        write(registers, destination, value, mask)

    return run


@builds("SGXT")
def _sign_extend(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    if not operands[2].startswith("0x"):
        return None
    readers = map(t.reader, operands[1:3])
    return word_function(lambda *v: lanes.sign_extend(i.modifiers, *v), operands[0], *readers)


@builds("IABS")
def _absolute(t: Translator, i: Instruction, operands: Sequence[str]) -> Function | None:
    return word_function(lambda a: abs(lanes.signed(a)), operands[0], t.reader(operands[1]))

"""Translate instructions into functions on the registers of warps, as far as addresses need them.

What decides trip counts and addresses is integer arithmetic. Of every other instruction the result
is not known, and neither is what is loaded from memory.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from crossvit_kernels.inspect.model import lanes
from crossvit_kernels.inspect.model.lanes import WORD, Value
from crossvit_kernels.inspect.model.sass import Instruction


class Registers:
    """The registers of warps that execute together.

    Attributes:
        special: Values of special registers, ``SR_TID.X``.
        banks: By letter: R, UR (uniform), P and UP (predicates).
        active: The lanes that go together, [warps, 32], or True for all.
        shared: Words of shared memory by block and address, or None: they are not followed.
    """

    def __init__(
        self, special: Mapping[str, Value], shared: dict[tuple[int, int], int | None] | None = None
    ) -> None:
        self.active: Value = True
        self.shared = shared
        self.special = dict(special)
        self.banks: dict[str, list[Value]] = {
            "R": [0] * 256,
            "UR": [0] * 256,
            "P": [False] * 7 + [True],
            "UP": [False] * 7 + [True],
        }

    def covers_active(self, mask: Any) -> bool:
        """Whether a condition holds in all lanes that go together."""
        return isinstance(self.active, np.ndarray) and bool((mask >= self.active).all())

    def of(self, rows: Any) -> Registers:
        """A copy for some of the warps."""

        def some(value: Value) -> Value:
            return value[rows] if isinstance(value, np.ndarray) else value

        special = {name: some(value) for name, value in self.special.items()}
        copy = Registers(special, self.shared)
        copy.banks = {name: [*map(some, bank)] for name, bank in self.banks.items()}
        return copy

    def predicate(self, name: str) -> Value:
        """``!P0``, say."""
        bank, index = _register(name.lstrip("!"))
        value = self.banks[bank][index]
        return lanes.invert(value) if name.startswith("!") else value


Reader = Callable[[Registers], Value]
#: Writes what it computes where the condition holds.
Function = Callable[[Registers, Value], None]

_REGISTER = re.compile(r"(UR|R|UP|P)(\d+)")
_NUMBER = re.compile(r"([-~]?)(0x[0-9a-f]+|\d+)$")
_CONSTANT = re.compile(r"c\[0x(\w+)\]\[(?:RZ\+)?(0x\w+|RZ)\]")
_ADDRESS = re.compile(r"(?:desc\[UR\d+\])?\[(.*)\]")


@functools.cache
def _register(name: str) -> tuple[str, int]:
    """Bank and index; those of zero and of true are past the last."""
    if name in ("RZ", "URZ"):
        return name[:-1], 255
    if name in ("PT", "UPT"):
        return name[:-1], 7
    match = _REGISTER.match(name)
    if not match:
        raise ValueError(f"{name!r} is no register")
    return match[1], int(match[2])


def is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


class Translator:
    """Translates the instructions of a kernel, launched with known constants.

    Args:
        constants: Words of the constant bank 0 by their place in bytes.
        jump_table: Bytes of the constant bank 2.
        tensor_maps: Maps among the parameters, by their place in bytes.
    """

    def __init__(
        self,
        constants: Mapping[int, int],
        jump_table: bytes = b"",
        tensor_maps: Mapping[int, Any] = types.MappingProxyType({}),
    ) -> None:
        self._constants = constants
        self.jump_table, self.tensor_maps = jump_table, tensor_maps

    def reader(self, operand: str, carried: bool = False) -> Reader:
        """Of a word. A negative one is ~x + 1 with its 33rd bit, if that may be a carry."""
        if number := _NUMBER.match(operand):
            value = int(number[2], 16 if number[2].startswith("0x") else 10)
            value = {"-": -value, "~": ~value, "": value}[number[1]] & WORD
            return lambda _: value
        if is_predicate(operand):
            return lambda registers: registers.predicate(operand)
        prefix = operand[0] if operand[0] in "-~" else ""
        plain = operand.removeprefix(prefix)
        absolute = plain.startswith("|")
        read = self._plain(plain.strip("|").removesuffix(".64"))
        if not prefix and not absolute:
            return read
        top = WORD + 1 if carried else WORD

        def changed(registers: Registers) -> Value:
            value = read(registers)
            if value is None:
                return None
            if absolute:
                value = abs(lanes.signed(value))
            if prefix == "~":
                return value ^ WORD
            return ((value ^ WORD) + 1) & (2 * top - 1 if carried else WORD) if prefix else value

        return changed

    def _plain(self, operand: str) -> Reader:
        if constant := _CONSTANT.match(operand):
            bank, place = int(constant[1], 16), _place(constant[2])
            value = self._constants.get(place) if bank == 0 else None
            return lambda _: value
        try:
            bank_name, index = _register(operand)
        except ValueError:
            return lambda _: None
        return lambda registers: registers.banks[bank_name][index]

    def pair(self, operand: str) -> Reader:
        """Of 64 bits: a register and the next."""
        low, high = self.reader(operand), self.reader(_next(operand))
        return lambda registers: lanes.pair(low(registers), high(registers))

    def upper(self, operand: str) -> Reader:
        """Of the register behind one."""
        return self.reader(_next(operand))

    def byte(self, operand: str, signed: bool) -> Reader:
        """Of a byte of the constant bank."""
        constant = _CONSTANT.match(operand)
        assert constant is not None
        place = _place(constant[2])
        word = self._constants.get(place & ~3) if int(constant[1], 16) == 0 else None
        if word is None:
            return lambda _: None
        value = word >> 8 * (place & 3) & 255
        return lambda _: (value ^ 128) - 128 & WORD if signed else value

    def address(self, operand: str) -> Reader:
        """Of ``[R4+UR5+0x10]`` or ``desc[UR6][R2.64+0x10]``."""
        match = _ADDRESS.match(operand)
        if not match:
            return lambda _: None
        terms: list[Reader] = []
        for term in match[1].replace("+-", "+_").split("+"):
            name = term.replace("_", "-")
            if name.startswith("-0x"):
                terms.append(functools.partial(_constant, int(name, 16)))
            elif name.endswith(".64"):
                terms.append(self.pair(name.removesuffix(".64")))
            else:
                terms.append(self._scaled(name))

        def total(registers: Registers) -> Value:
            values = [term(registers) for term in terms]
            return None if any(v is None for v in values) else sum(values)

        return total

    def _scaled(self, operand: str) -> Reader:
        """Of ``R4.X16``, a register times 16."""
        match = re.fullmatch(r"(.*?)(?:\.U32|\.X(\d+))?", operand)
        assert match is not None
        read, scale = self.reader(match[1]), int(match[2] or 1)
        if scale == 1:
            return read
        return lambda registers: None if (value := read(registers)) is None else value * scale

    def function(self, instruction: Instruction) -> Function | None:
        """What an instruction does to registers; None where that is nothing."""
        opcode = instruction.opcode
        plain = opcode[1:] if opcode.startswith("U") and opcode[1:] in _BUILDERS else opcode
        builder = _BUILDERS.get(plain)
        built = builder(self, instruction, instruction.operands) if builder else None
        return built or _unknown_result(instruction)


def _place(text: str) -> int:
    """Of a constant in its bank."""
    return 0 if text == "RZ" else int(text, 16)


def _constant(value: int, _: Registers) -> Value:
    return value


def _next(register: str) -> str:
    """The register that follows; zero's and immediates' is zero."""
    if constant := _CONSTANT.match(register):
        return f"c[0x{constant[1]}][{_place(constant[2]) + 4:#x}]"
    match = _REGISTER.match(register)
    return f"{match[1]}{int(match[2]) + 1}" if match and match[1] in ("R", "UR") else "RZ"


def following(register: str, distance: int) -> str:
    """The register so many further on."""
    for _ in range(distance):
        register = _next(register)
    return register


def write(registers: Registers, name: str, value: Value, mask: Value) -> None:
    """Write a register in the lanes where a condition holds."""
    bank_name, index = _register(name)
    if index == (7 if "P" in bank_name else 255):
        return
    bank = registers.banks[bank_name]
    if bank_name[0] == "U" and isinstance(mask, np.ndarray):
        mask = mask.any(axis=1, keepdims=True)  # one for all lanes of a warp
    if mask is True:
        bank[index] = value
    elif mask is None or value is None:
        bank[index] = None
    elif mask is not False:
        if bank[index] is None and (bank_name in ("R", "UR") or registers.covers_active(mask)):
            # Compilers read it only where it has been written: in the same lanes.
            bank[index] = value
            return
        bank[index] = lanes.select(mask, value, bank[index])


def _unknown_result(instruction: Instruction) -> Function | None:
    """Results that are not known: of all registers that the instruction writes."""
    operands = [operand for operand in instruction.operands[:2] if operand]
    if not operands or instruction.opcode in _WITHOUT_RESULT:
        return None
    names = []
    for operand in operands:
        if is_predicate(operand):
            names.append(operand)
            continue
        if _REGISTER.match(operand) and not any_register(names):
            names += _result_registers(instruction, operand)
        break
    if not names:
        return None

    def forget(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        for name in names:
            write(registers, name, None, True)

    return forget


def any_register(names: Sequence[str]) -> bool:
    return any(not is_predicate(name) for name in names)


_WITHOUT_RESULT = frozenset(
    (
        *("STG", "STS", "STL", "ST", "STSM", "STTM", "RED", "LDGSTS", "LDGDEPBAR", "DEPBAR"),
        *("BAR", "WARPSYNC", "MEMBAR", "FENCE", "ERRBAR", "CCTL", "BSSY", "BSYNC", "NOP"),
    )
)


def _result_registers(instruction: Instruction, first: str) -> list[str]:
    """The registers from the first on that an instruction writes."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in ("LDG", "LDS", "LDL", "LD", "LDSM", "LDC", "ULDC", "LDCU"):
        count = max(instruction.access_bytes // 4, 1)
    elif opcode == "HGMMA":
        count = int(modifiers[0].split("x")[1]) // (2 if "F32" in modifiers else 4)
    elif opcode == "LDTM":
        count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"x\d+", m)), 1)
    elif opcode in ("HMMA", "IMMA", "DMMA", "QMMA"):
        count = 4
    else:
        count = 2 if opcode.startswith("D") or "WIDE" in modifiers or "64" in modifiers else 1
    names = [first]
    while len(names) < count:
        names.append(_next(names[-1]))
    return names


_Builder = Callable[["Translator", Instruction, Sequence[str]], "Function | None"]
_BUILDERS: dict[str, _Builder] = {}


def builds(*opcodes: str) -> Callable[[_Builder], _Builder]:
    """Declare what translates some opcodes; also those of uniform registers, with U before them."""

    def declare(builder: _Builder) -> _Builder:
        _BUILDERS.update(dict.fromkeys(opcodes, builder))
        return builder

    return declare


def word_function(
    compute: Callable[..., Value], destination: str, *readers: Reader, count: int = 1
) -> Function:
    """A function that writes one word, or two, of what is computed from known operands."""
    upper = _next(destination)

    def run(registers: Registers, mask: Value) -> None:
        if mask is False:
            return
        values = [read(registers) for read in readers]
        value = None if any(v is None for v in values) else compute(*values)
        write(registers, destination, None if value is None else value & WORD, mask)
        if count == 2:
            write(registers, upper, None if value is None else value >> 32 & WORD, mask)

    return run

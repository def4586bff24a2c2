"""Read machine code (SASS) as NVIDIA's nvdisasm prints it, with its control words.

An instruction is 128 bits. Bits 105 up of it are the compiler's own schedule, on which this model
rests: the cycles until the warp's next instruction may issue (stall count), which of six
scoreboards is released when the result is there and which when the operands have been read, and
the scoreboards that must have been released before it issues.
"""

from __future__ import annotations

import bisect
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from crossvit_kernels.inspect.machine_code import disassembler, section

INSTRUCTION_BYTES = 16

_LABEL = re.compile(r"(\.\w+):")
_SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')
_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
    r"\s+/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((\.?\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        index: Its place in the kernel.
        guard: The predicate it is executed under, ``P0``, ``!P0`` or ``UP0``; "" for always.
        opcode: Its name, ``IMAD``.
        modifiers: What follows the name, ``("WIDE", "U32")``.
        operands: As they are printed, destinations first.
        stall: Cycles until the warp's next instruction may issue.
        write_scoreboard: Released when the result is there; None for none.
        read_scoreboard: Released when the operands have been read; None for none.
        waits_for: Scoreboards that must have been released.
        target: Index of the instruction that it branches to; None where it does not.
        source: File and line, ``triton_kernels.py:91``, and where that is inlined,
            ``triton_tiles.py:59 < triton_forward_pass.py:125``; "" where they are not known.
    """

    index: int
    guard: str
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    stall: int
    write_scoreboard: int | None
    read_scoreboard: int | None
    waits_for: tuple[int, ...]
    target: int | None
    source: str

    @property
    def name(self) -> str:
        """In full: ``IMAD.WIDE.U32``."""
        return ".".join((self.opcode, *self.modifiers))

    @property
    def access_bytes(self) -> int:
        """Bytes that a load, store or copy moves for each lane."""
        if self.opcode in ("LDSM", "STSM"):
            return 4 * int(self.modifiers[-1]) if self.modifiers[-1] in ("2", "4") else 4
        for modifier in self.modifiers:
            if (size := _ACCESS_BYTES.get(modifier)) is not None:
                return size
        return 4


_ACCESS_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Loop:
    """A loop: the instructions from ``first`` to the backward branch ``last``."""

    first: int
    last: int
    source: str


@dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel.

    Attributes:
        name: Its name.
        instructions: In their order.
        jump_table: Bank 2 of its constants, with the places that it jumps to.
    """

    name: str
    instructions: tuple[Instruction, ...]
    jump_table: bytes = b""

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """By their backward branches; one that branches to itself, behind the end, is none."""
        return tuple(
            Loop(i.target, i.index, self.instructions[i.target].source)
            for i in self.instructions
            if i.opcode == "BRA" and i.target is not None and i.target < i.index
        )

    def innermost(self, index: int) -> Loop | None:
        """The smallest loop around an instruction."""
        around = [loop for loop in self.loops if loop.first <= index <= loop.last]
        return min(around, key=lambda loop: loop.last - loop.first, default=None)


def disassemble(cubin: bytes, name: str = "") -> dict[str, Kernel]:
    """The kernels of a cubin, or one of them, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [disassembler("nvdisasm"), "-hex", "-c", "-gi", str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        kernel.name: replace(kernel, jump_table=section(cubin, f".nv.constant2.{kernel.name}"))
        for kernel in parse(printed, name)
    }


def parse(printed: str, name: str = "") -> Iterator[Kernel]:
    """The kernels, or one of them, in what ``nvdisasm -hex -c -gi`` printed."""
    sections = re.split(r"^\.text\.([\w$.]+):$", printed, flags=re.MULTILINE)
    for matches, code in zip(sections[1::2], sections[2::2], strict=True):
        if name in ("", matches):
            yield Kernel(matches, tuple(_instructions(code)))


def _instructions(section: str) -> Iterator[Instruction]:
    labels: dict[str, int] = {}
    matches: list[tuple[re.Match[str], int, str]] = []
    source, begins, lines = "", True, iter(section.splitlines())
    for line in lines:
        if match := _INSTRUCTION.match(line):
            upper = _SECOND_HALF.match(next(lines))
            if upper is None:
                raise ValueError(f"an instruction's second half is missing below {line!r}")
            matches.append((match, int(upper[1], 16), source))
            begins = True
        elif label := _LABEL.match(line):
            labels[label[1]] = len(matches)
        elif begins and (position := _SOURCE.match(line)):  # the callers' callers follow
            source, begins = _place(*position.groups()), False
    for index, (match, upper_half, source) in enumerate(matches):
        _, guard, name, operands, _ = match.groups()
        opcode, *modifiers = name.split(".")
        # 4 bits of stall count, 1 of yield, 3 each of the write and the read scoreboard, 6 to wait.
        control = upper_half >> 41
        yield Instruction(
            index=index,
            guard=guard or "",
            opcode=opcode,
            modifiers=tuple(modifiers),
            operands=tuple(_operands(operands)),
            stall=max(control & 15, 1),
            write_scoreboard=_scoreboard(control >> 5 & 7),
            read_scoreboard=_scoreboard(control >> 8 & 7),
            waits_for=tuple(i for i in range(6) if control >> 11 + i & 1),
            target=_target(opcode, operands, labels),
            source=source,
        )


def _place(file: str, line: str, caller: str | None, called_at: str | None) -> str:
    place = f"{Path(file).name}:{line}"
    return f"{place} < {Path(caller).name}:{called_at}" if caller else place


def _operands(text: str) -> list[str]:
    """At their commas, without hints to reuse a register's value."""
    return text.replace(".reuse", "").split(", ") if text else []


def _scoreboard(number: int) -> int | None:
    return None if number == 7 else number


def _target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    matches = _TARGET.search(operands)
    if matches:
        return labels.get(matches[1])
    if opcode in ("BRA", "BSSY", "CALL") and (address := re.search(r"0x([0-9a-f]+)$", operands)):
        return int(address[1], 16) // INSTRUCTION_BYTES
    return None


def parameters_at(compute_capability: int) -> int:
    """Where in the constant bank a kernel's parameters begin; 90 for 9.0."""
    starts = ((80, 0x160), (90, 0x210), (100, 0x380))
    return starts[bisect.bisect([cc for cc, _ in starts], compute_capability) - 1][1]

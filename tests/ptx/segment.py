"""Translates straight-line PTX to Python functions on arrays of 32 lanes.

A function gets the warp, its registers (raw bits: bool, uint16, uint32 or uint64) and the mask of
active lanes, None for all. Instructions that choose the next one are left to the warp.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import numbers
from ptx.memory import PARAM
from ptx.parse import Instruction, Kernel, Operand, Unknown, bits, number

RAW = {1: "bool_", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}
_NAMES: dict[str, Any] = {
    "np": np,
    "N": numbers,
    "where": np.where,
    "bool_": np.bool_,
    **{f"{k}{n}": np.dtype(f"{k}{n}").type for k in "ui" for n in (1, 2, 4, 8)},
    **{f"f{n}": np.dtype(f"f{n}").type for n in (2, 4, 8)},
}
#: Instructions after which a warp may stop or go elsewhere, as patterns of names.
CONTROL = re.compile(
    r"bra\b|brx\b|ret\b|exit\b|trap\b|bar\.(sync|arrive|red|warp)|barrier\.|mbarrier\.(try|test)_wait"
    r"|nanosleep"
)


#: Appends an instruction's lines to a segment.
Handler = Callable[["Segment", Instruction], None]


class Segment:
    """Collects the lines of one function, with or without a mask."""

    def __init__(
        self, kernel: Kernel, masked: bool, constants: list[Any], table: dict[str, Handler]
    ) -> None:
        self.kernel, self.masked, self.constants = kernel, masked, constants
        self.table = table
        self.lines: list[str] = []
        self.mask = "m" if masked else "None"
        self.guarded = masked

    def compile(self, instructions: list[Instruction]) -> Callable[..., None]:
        for instruction in instructions:
            self.lines.append(f"w.line = {instruction.line}")
            self._guard(instruction)
            try:
                self.table[instruction.parts[0]](self, instruction)
            except (KeyError, Unknown) as error:
                raise Unknown(f"line {instruction.line}: {instruction.text} ({error})") from error
        source = "def f(w, R, m):\n    " + "\n    ".join(self.lines or ["pass"])
        names = {**_NAMES, "K": self.constants}
        exec(compile(source, "<ptx>", "exec"), names)
        return names["f"]

    def _guard(self, instruction: Instruction) -> None:
        self.mask, self.guarded = ("m" if self.masked else "None"), self.masked
        if guard := instruction.guard:
            self.lines.append(f"g = {self.get(guard, 'pred')}{' & m' if self.masked else ''}")
            self.mask, self.guarded = "g", True

    def constant(self, value: int, kind: str) -> str:
        width = bits(kind)
        dtype = np.dtype({1: "bool", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}[width])
        self.constants.append(np.full(32, value, dtype))
        return f"K[{len(self.constants) - 1}]"

    def get(self, operand: Operand, kind: str) -> str:
        """Return an expression of an operand's lanes, of the dtype that a type asks for."""
        width = bits(kind)
        if operand.kind == "reg":
            index, own = self.kernel.registers[operand.text]
            text = f"R[{index}]"
            if own != width:
                text += f".astype({RAW[width]})"
        elif operand.kind == "number":
            text = self.constant(number(operand.text, width), kind)
        elif operand.kind == "special":
            text = f"w.special({operand.text!r})"
            text += f".astype({RAW[width]})" if width != 32 else ""
        elif operand.kind == "symbol":
            text = self.constant(self.address(operand), kind)
        else:
            raise Unknown(operand.kind)
        if width == 1:
            return f"(~{text})" if operand.negated else text
        if kind[0] == "s":
            return f"{text}.view(i{width // 8})"
        return f"{text}.view(f{width // 8})" if kind in ("f32", "f64") else text

    def address(self, operand: Operand) -> int:
        kernel = self.kernel
        params = {name: PARAM + at for name, at, _ in kernel.params}
        for space in (kernel.shared, kernel.local, params):
            if operand.text in space:
                return space[operand.text] + operand.offset
        raise Unknown(f"symbol {operand.text}")

    def pointer(self, operand: Operand) -> str:
        """Return an expression of an address as int64."""
        if operand.parts and operand.parts[0].kind == "symbol":
            return self.constant(self.address(operand), "b64") + ".view(i8)"
        base = self.get(operand.parts[0], "b64" if self.width(operand.parts[0]) == 64 else "b32")
        return f"({base}.astype(i8) + {operand.offset})"

    def width(self, operand: Operand) -> int:
        return self.kernel.registers[operand.text][1] if operand.kind == "reg" else 32

    def put(self, operand: Operand, text: str, kind: str, raw: bool = False) -> None:
        """Write an expression of a type's dtype, unless it is raw bits already."""
        if operand.kind == "sink":
            return
        index, own = self.kernel.registers[operand.text]
        width = bits(kind)
        if not raw:
            if kind == "f32":
                text = f"N.bits({text})"
            elif kind[0] == "s" or kind == "f64":
                text = f"({text}).view(u{width // 8})"
        if own != width:
            if kind[0] == "s" and own > width:
                text = f"({text}).view(i{width // 8}).astype(i{own // 8}).view(u{own // 8})"
            else:
                text = f"({text}).astype({RAW[own]})"
        if self.guarded:
            text = f"where({self.mask}, {text}, R[{index}])"
        self.lines.append(f"R[{index}] = {text}")

    def args(self, i: Instruction, kind: str, begin: int = 1) -> list[str]:
        return [self.get(operand, kind) for operand in i.operands[begin:]]

    def list(self, operand: Operand, kind: str = "b32") -> str:
        """Return an expression of a list of an operand's elements."""
        return f"[{', '.join(self.get(part, kind) for part in self.elements(operand))}]"

    def put_each(self, operand: Operand, kind: str = "b32") -> None:
        """Write the elements of t, raw bits, to those of an operand."""
        for n, target in enumerate(self.elements(operand)):
            self.put(target, f"t[{n}]", kind, raw=True)

    def elements(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.parts if operand.kind == "list" else (operand,)

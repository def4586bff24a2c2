"""Reads PTX as nvcc and Triton write it (PTX ISA, chapters 4, 5 and 9)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16}
_BITS |= {"bf16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32}
_BITS |= {"tf32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}

_TOKEN = re.compile(r"[{};]|[^{};\n]+|\n")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s*(?:\.\w+\s*)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(
    r"(?:\.extern\s+)?\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([\w$]+)(?:\[(\d*)\])?"
)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.DOTALL)


class Unknown(NotImplementedError):
    """Raised for an instruction or operand that is not modelled."""


def bits(kind: str) -> int:
    """Return the width of a type's name in bits."""
    return _BITS[kind]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand.

    Attributes:
        kind: "reg", "number", "symbol", "special", "memory", "list" or "sink".
        text: A register's, symbol's or number's text; of memory, that of its base.
        offset: Bytes added to a memory operand's or symbol's address.
        parts: Elements of a list; of memory, what follows the first comma.
    """

    kind: str
    text: str = ""
    offset: int = 0
    parts: tuple[Operand, ...] = ()
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard name operands;`` in a line of the text."""

    line: int
    guard: Operand | None
    name: str
    operands: tuple[Operand, ...]
    text: str

    @property
    def parts(self) -> list[str]:
        return re.split(r"\.|::", self.name)


@dataclasses.dataclass
class Kernel:
    """A kernel's parameters, memory and code.

    Attributes:
        params: Name, offset and size of each parameter in bytes.
        registers: Index and bits of each register.
        shared: Offsets of the static shared variables; dynamic ones begin behind these.
        static_bytes: Bytes of all static shared variables.
        local_bytes: Bytes of local memory per thread.
        labels: Indices of the instructions behind labels.
        targets: Labels in each list that brx.idx chooses from.
    """

    name: str
    params: list[tuple[str, int, int]]
    registers: dict[str, tuple[int, int]]
    shared: dict[str, int]
    static_bytes: int
    local: dict[str, int]
    local_bytes: int
    code: list[Instruction]
    labels: dict[str, int]
    targets: dict[str, list[str]]


def kernels(text: str, only: str | None = None) -> dict[str, Kernel]:
    """Return the kernels of a module, or one of them, by name."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(
        r"^\s*\.(?:file|loc|pragma|version|target|address_size)\b[^\n]*", "", text, flags=re.M
    )
    found = {}
    first = _ENTRY.search(text)
    outside = text[: first.start()] if first else text
    for match in _ENTRY.finditer(text):
        if only not in (None, match[1]):
            continue
        begin = text.index("{", match.end())
        line = text.count("\n", 0, begin) + 1
        body = text[begin : _end(text, begin)]
        found[match[1]] = _kernel(match[1], match[2], outside, body, line)
    return found


def _end(text: str, begin: int) -> int:
    depth = 0
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return begin + brace.end()
    raise ValueError("a kernel's braces do not match")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _kernel(name: str, params: str, outside: str, body: str, line: int) -> Kernel:
    kernel = Kernel(name, [], {}, {}, 0, {}, 0, [], {}, {})
    offset = 0
    for align, kind, param, count in _PARAM.findall(params):
        size = bits(kind) // 8
        offset = _aligned(offset, int(align or size))
        kernel.params.append((param, offset, size * int(count or 1)))
        offset += size * int(count or 1)
    for variable in _VARIABLE.finditer(outside):
        _declare(kernel, variable)
    _body(kernel, body, line)
    for symbol, at in kernel.shared.items():
        if at < 0:  # dynamic
            kernel.shared[symbol] = _aligned(kernel.static_bytes, 16)
    return kernel


def _declare(kernel: Kernel, match: re.Match[str]) -> None:
    space, align, kind, name, count = match.groups()
    size = bits(kind) // 8
    if space == "shared":
        if match[0].startswith(".extern"):
            kernel.shared[name] = -1
            return
        at = _aligned(kernel.static_bytes, int(align or size))
        kernel.shared[name] = at
        kernel.static_bytes = at + size * int(count or 1)
    elif space == "local":
        at = _aligned(kernel.local_bytes, int(align or size))
        kernel.local[name] = at
        kernel.local_bytes = at + size * int(count or 1)


def _body(kernel: Kernel, body: str, line: int) -> None:
    scopes: list[dict[str, str]] = []
    statement, started, vector = "", line, 0
    for token in _TOKEN.findall(body):
        if token == "\n":
            line += 1
            statement += " "
        elif token == "{" and (not statement.strip() or statement.strip().endswith(":")):
            _labels(kernel, statement, scopes)
            statement = ""
            scopes.append({})
        elif token == "}" and not vector:
            scopes.pop()
            statement = ""
        elif token in "{}":
            vector += 1 if token == "{" else -1
            statement += token
        elif token == ";":
            listed = re.fullmatch(r"\s*([\w$]+)\s*:\s*\.branchtargets\s(.*)", statement)
            rest = _labels(kernel, statement, scopes)
            if listed:
                kernel.targets[listed[1]] = [name.strip() for name in listed[2].split(",")]
            elif rest:
                _statement(kernel, rest, scopes, started)
            statement = ""
        else:
            if not statement.strip():
                started = line
            statement += token


def _labels(kernel: Kernel, statement: str, scopes: list[dict[str, str]]) -> str:
    while match := re.match(r"\s*([\w$]+)\s*:(?!:)", statement):
        name = match[1]
        if len(scopes) > 1:
            name = f"{name}@{len(kernel.labels)}"
            scopes[-1][match[1]] = name
        kernel.labels[name] = len(kernel.code)
        statement = statement[match.end() :]
    return statement.strip()


def _statement(kernel: Kernel, text: str, scopes: list[dict[str, str]], line: int) -> None:
    if match := _VARIABLE.match(text):
        _declare(kernel, match)
    elif text.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()  # type: ignore[union-attr]
        for name in map(str.strip, names.split(",")):
            match = re.fullmatch(r"(.*)<(\d+)>", name)
            for each in [f"{match[1]}{i}" for i in range(int(match[2]))] if match else [name]:
                own = each
                if len(scopes) > 1:
                    own = scopes[-1][each] = f"{each}@{len(kernel.registers)}"
                kernel.registers[own] = len(kernel.registers), bits(kind)
    elif not text.startswith("."):
        kernel.code.append(_instruction(kernel, text, scopes, line))


def _instruction(kernel: Kernel, text: str, scopes: list[dict[str, str]], line: int) -> Instruction:
    match = re.match(r"(?:@(!?)\s*(\S+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL)
    assert match, text
    guard = None
    if match[2]:
        operand = _operand(kernel, match[2], scopes)
        guard = dataclasses.replace(operand, negated=bool(match[1]))
    operands = tuple(_operand(kernel, each, scopes) for each in _split(match[4]))
    return Instruction(line, guard, match[3], operands, " ".join(text.split()))


def _split(text: str, separators: str = ",") -> list[str]:
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char in separators and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def _operand(kernel: Kernel, text: str, scopes: list[dict[str, str]]) -> Operand:
    def resolve(part: str) -> Operand:
        return _operand(kernel, part, scopes)

    if text.startswith("{"):
        return Operand("list", parts=tuple(map(resolve, _split(text[1:-1]))))
    if text.startswith("["):
        first, *rest = _split(text[1:-1])
        base, _, offset = first.partition("+")
        operand = resolve(base.strip())
        return Operand(
            "memory",
            operand.text,
            int(offset or "0", 0) + operand.offset,
            (operand, *map(resolve, rest)),
        )
    if "|" in text:
        return Operand("list", parts=tuple(map(resolve, _split(text, "|"))))
    if text == "_":
        return Operand("sink")
    if text.startswith("!"):
        return dataclasses.replace(resolve(text[1:].strip()), negated=True)
    for scope in reversed(scopes):
        text = scope.get(text, text)
    if text in kernel.registers:
        return Operand("reg", text)
    if re.fullmatch(r"-?(0[fFdDxX][0-9a-fA-F]+|\d+)U?", text):
        return Operand("number", text)
    if text.startswith("%"):
        return Operand("special", text)
    base, _, offset = text.partition("+")
    return Operand("symbol", base.strip(), int(offset or "0", 0))


def number(text: str, width: int) -> int:
    """Return a literal's bits."""
    if re.match(r"0[fFdD]", text):
        return int(text[2:], 16)
    value: Any = int(text.rstrip("U"), 0)
    return int(value) & ((1 << max(width, 8)) - 1)

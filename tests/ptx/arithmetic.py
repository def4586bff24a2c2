"""Translates instructions that compute in registers."""

from __future__ import annotations

from ptx import numbers
from ptx.parse import Instruction, Unknown, bits, number
from ptx.segment import Handler, Segment

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_SIMPLE = {"add": "{} + {}", "sub": "{} - {}", "and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}"}
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")
_ROUND = {
    *["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna", "ftz", "sat", "relu", "satfinite"]
}


def _flush(i: Instruction, args: list[str]) -> list[str]:
    return [f"N.flush({a})" for a in args] if "ftz" in i.parts else args


def _arithmetic(s: Segment, i: Instruction) -> None:
    name, kind = i.parts[0], i.parts[-1]
    if kind in _HALVES:
        args = ", ".join(s.args(i, "b32" if kind.endswith("x2") else "b16"))
        s.put(i.operands[0], f"w.halves({name!r}, {kind!r}, {args})", kind, raw=True)
        return
    a = s.args(i, kind)
    floating = kind in ("f32", "f64")
    if i.name == "fma.rm.f32":  # of expf
        s.put(i.operands[0], f"N.fma_down({', '.join(a)})", kind)
        return
    if floating:
        if {"rz", "rm", "rp"} & set(i.parts) or "sat" in i.parts:
            raise Unknown("rounding")
        a = _flush(i, a)
    if name in _SIMPLE:
        text = _SIMPLE[name].format(*a)
    elif name in ("min", "max"):
        text = f"N.minimum({a[0]}, {a[1]}, {name == 'max'}, {'NaN' in i.parts})"
        for third in a[2:]:
            text = f"N.minimum({text}, {third}, {name == 'max'}, {'NaN' in i.parts})"
    elif name in ("neg", "abs", "not"):
        text = {"neg": f"-({a[0]})", "abs": f"np.abs({a[0]})", "not": f"~({a[0]})"}[name]
        if floating:
            flip = {"neg": "^ u4(0x80000000)", "abs": "& u4(0x7fffffff)"}[name]
            if kind == "f32":
                s.put(i.operands[0], f"({a[0]}).view(u4) {flip}", kind, raw=True)
                return
    elif name == "copysign":
        text = f"np.copysign({a[1]}, {a[0]})"
    elif floating and name == "mul":
        text = f"{a[0]} * {a[1]}"
    elif floating and name in ("fma", "mad"):
        text = f"N.fma({', '.join(a)})" if kind == "f32" else f"{a[0]} * {a[1]} + {a[2]}"
    elif floating and name == "div":
        text = f"{a[0]} / {a[1]}"
    elif floating and name in numbers.APPROXIMATE:
        text = f"N.approximate({name!r}, {a[0]})"
    elif name in ("div", "rem"):
        text = f"N.divide({a[0]}, {a[1]}, {name == 'rem'})"
    else:
        raise Unknown(name)
    s.put(i.operands[0], f"N.flush({text})" if "ftz" in i.parts else text, kind)


def _multiply(s: Segment, i: Instruction) -> None:
    kind, mode = i.parts[-1], i.parts[1]
    if mode not in ("lo", "hi", "wide"):
        _arithmetic(s, i)
        return
    a, b = s.args(i, kind)[:2]
    out = kind
    if mode == "lo":
        text = f"({a} * {b})"
    elif mode == "hi":
        text = f"N.high({a}, {b}, {bits(kind)})"
    else:
        out = f"{kind[0]}{2 * bits(kind)}"
        wide = f"{'i' if kind[0] == 's' else 'u'}{bits(kind) // 4}"
        text = f"({a}.astype({wide}) * {b}.astype({wide}))"
    if i.parts[0] == "mad":
        text = f"{text} + {s.get(i.operands[3], out)}"
    s.put(i.operands[0], text, out)


def _shift(s: Segment, i: Instruction) -> None:
    kind = i.parts[-1]
    which = {"shl": "shift_left", "shr": "shift_right"}[i.parts[0]]
    a, n = s.get(i.operands[1], kind), s.get(i.operands[2], "b32")
    s.put(i.operands[0], f"N.{which}({a}, {n}, {bits(kind)})", kind)


def _funnel(s: Segment, i: Instruction) -> None:
    low, high, n = s.args(i, "b32")
    left = "l" in i.parts
    count = f"({n} & u4(31))" if "wrap" in i.parts else f"np.minimum({n}, u4(32))"
    both = f"(({high}.astype(u8) << u8(32)) | {low}.astype(u8))"
    moved = f"({both} << {count}.astype(u8)) >> u8(32)" if left else f"{both} >> {count}.astype(u8)"
    s.put(i.operands[0], f"({moved}).astype(u4)", "b32")


def _bits_of(s: Segment, i: Instruction) -> None:
    name, kind = i.parts[0], i.parts[-1]
    if name in ("bfe", "bfi") and bits(kind) != 32:
        raise Unknown("64 bits")
    a = s.args(i, "b32")
    if name == "bfe":
        text = f"N.extract({', '.join(a)}, {kind[0] == 's'})"
    elif name == "bfi":
        text = f"N.insert({', '.join(a)})"
    elif name == "prmt" and kind == "b32" and len(i.parts) == 2:
        text = f"N.permute({', '.join(a)})"
    elif name == "popc":
        text = f"np.bitwise_count({a[0]}).astype(u4)"
    elif name == "clz":
        text = f"(u4(32) - np.ceil(np.log2({a[0]}.astype(f8) + 1)).astype(u4))"
    elif name == "lop3":
        table = number(i.operands[4].text, 32)
        x, y, z = a[:3]
        terms = [
            f"({x if n & 4 else '~' + x} & {y if n & 2 else '~' + y} & {z if n & 1 else '~' + z})"
            for n in range(8)
            if table >> n & 1
        ]
        text = " | ".join(terms) or f"{x} & u4(0)"
    else:
        raise Unknown(name)
    s.put(i.operands[0], text, "b32", raw=True)


def _move(s: Segment, i: Instruction) -> None:
    kind = i.parts[-1]
    to, source = i.operands
    wide = f"u{bits(kind) // 8}"
    if source.kind == "list":
        width = bits(kind) // len(source.parts)
        parts = [
            f"({s.get(p, f'b{width}')}.astype({wide}) << {wide}({n * width}))"
            for n, p in enumerate(source.parts)
        ]
        s.put(to, " | ".join(parts), kind, raw=True)
    elif to.kind == "list":
        width = bits(kind) // len(to.parts)
        raw = s.get(source, f"b{bits(kind)}")
        for n, part in enumerate(to.parts):
            shifted = f"({raw} >> u{bits(kind) // 8}({n * width})).astype(u{width // 8})"
            s.put(part, shifted, f"b{width}", raw=True)
    else:
        width = bits(kind)
        s.put(to, s.get(source, "pred" if width == 1 else f"b{width}"), kind, raw=True)


def _convert(s: Segment, i: Instruction) -> None:
    kinds = [p for p in i.parts[1:] if p not in _ROUND]
    how = {*i.parts} & _ROUND
    if len(kinds) != 2 or how & {"relu", "satfinite", "rm", "rp"}:
        raise Unknown("form")
    to, source = kinds
    if "sat" in how and to not in ("f32", "f64"):
        raise Unknown("form")
    a = s.args(i, source if source not in ("f16", "bf16") else "b16")
    if source in ("f16", "bf16"):
        a = [f"N.from_{source}({x})" for x in a]
        source = "f32"
    if to in ("f16x2", "bf16x2"):
        low, high = (f"N.to_{to[:-2]}({x})" for x in (a[1], a[0]))
        s.put(i.operands[0], f"N.pack({low}, {high})", to, raw=True)
    elif to in ("f16", "bf16", "tf32"):
        value = a[0] if source == "f32" else f"{a[0]}.astype(f4)"
        s.put(i.operands[0], f"N.to_{to}({value})", to, raw=True)
    elif to in ("f32", "f64"):
        flush = "ftz" in how and source == "f32"
        value = f"N.flush({a[0]})" if flush else a[0]
        integral = next((r for r in ("rni", "rzi", "rmi", "rpi") if r in how), None)
        if integral:
            function = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[integral]
            value = f"np.{function}({value})"
        if "sat" in how:  # NaN becomes 0
            value = f"np.fmin(np.fmax({value}, 0), 1)"
        s.put(i.operands[0], f"{value}.astype(f{bits(to) // 8})", to)
    elif source in ("f32", "f64"):
        rounding = next(r for r in ("rni", "rzi", "rmi", "rpi") if r in how)
        dtype = f"{'i' if to[0] == 's' else 'u'}{bits(to) // 8}"
        s.put(i.operands[0], f"N.to_integer({a[0]}, {dtype}, {rounding!r})", to)
    else:
        dtype = f"{'i' if to[0] == 's' else 'u'}{bits(to) // 8}"
        s.put(i.operands[0], f"{a[0]}.astype({dtype})", to)


def _compare(s: Segment, i: Instruction) -> None:
    kind, parts = i.parts[-1], i.parts
    name = parts[1]
    if kind in ("f16", "bf16"):
        a = [f"N.from_{kind}({s.get(o, 'b16')})" for o in i.operands[1:3]]
    else:
        a = [s.get(o, kind) for o in i.operands[1:3]]
    a = _flush(i, a)
    floating = kind in ("f16", "bf16", "f32", "f64")
    unordered = f"(({a[0]} != {a[0]}) | ({a[1]} != {a[1]}))"
    if floating and name in ("num", "nan"):
        text = unordered if name == "nan" else f"(~{unordered})"
    elif floating and name == "ne":
        text = f"(({a[0]} < {a[1]}) | ({a[0]} > {a[1]}))"
    elif floating and name.endswith("u"):
        text = f"(({a[0]} {_COMPARE[name[:-1]]} {a[1]}) | {unordered})"
    else:
        text = f"({a[0]} {_COMPARE[name]} {a[1]})"
    targets = s.elements(i.operands[0])
    texts = [text, f"(~{text})"]
    if len(i.operands) > 3:
        combine = {"and": "&", "or": "|", "xor": "^"}[parts[2]]
        texts = [f"{t} {combine} {s.get(i.operands[3], 'pred')}" for t in texts]
    if len(targets) > 1:
        s.lines.append(f"t = {texts[1]}")
    s.put(targets[0], texts[0], "pred")
    if len(targets) > 1:
        s.put(targets[1], "t", "pred")


def _select(s: Segment, i: Instruction) -> None:
    kind = f"b{bits(i.parts[-1])}"
    a, b = (s.get(o, kind) for o in i.operands[1:3])
    s.put(i.operands[0], f"where({s.get(i.operands[3], 'pred')}, {a}, {b})", kind, raw=True)


TABLE: dict[str, Handler] = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor", "min", "max", "neg", "abs"), _arithmetic),
    **dict.fromkeys(("not", "copysign", "fma", "div", "rem"), _arithmetic),
    **dict.fromkeys(numbers.APPROXIMATE, _arithmetic),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(["bfe", "bfi", "prmt", "popc", "clz", "lop3"], _bits_of),
    **{"shf": _funnel, "mov": _move, "cvt": _convert, "setp": _compare, "selp": _select},
}

"""Translates instructions on memory, between lanes and on matrices."""

from __future__ import annotations

import re

from ptx.parse import Instruction, Operand, Unknown, bits, number
from ptx.segment import Handler, Segment


def _space(i: Instruction) -> str:
    return next((p for p in i.parts if p in ("global", "shared", "local", "param")), "generic")


def _count(i: Instruction) -> int:
    return next((int(p[1]) for p in i.parts if p in ("v2", "v4", "v8")), 1)


def _load(s: Segment, i: Instruction) -> None:
    kind = i.parts[-1]
    targets = s.elements(i.operands[0])
    if _space(i) == "param":
        s.lines.append(f"a = {s.pointer(i.operands[1])}")
        size = bits(kind) // 8
        for n, target in enumerate(targets):
            s.put(target, f"w.param(a + {n * size}, {size}, {s.mask})", kind, raw=True)
        return
    pointer = s.pointer(i.operands[1])
    s.lines.append(
        f"t = w.load({_space(i)!r}, {pointer}, {bits(kind) // 8}, {len(targets)}, {s.mask})"
    )
    s.put_each(i.operands[0], kind)


def _store(s: Segment, i: Instruction) -> None:
    kind = f"b{bits(i.parts[-1])}"
    if i.parts[1] == "async":
        raise Unknown("st.async")
    values, pointer = s.list(i.operands[1], kind), s.pointer(i.operands[0])
    s.lines.append(f"w.store({_space(i)!r}, {pointer}, {bits(kind) // 8}, {values}, {s.mask})")


def _atomic(s: Segment, i: Instruction) -> None:
    kind = i.parts[-1]
    reduction = i.parts[0] == "red"
    operands = i.operands if reduction else i.operands[1:]
    which = next(
        p for p in i.parts[1:] if p in ("add", "min", "max", "and", "or", "exch", "cas", "inc")
    )
    values, pointer = ", ".join(s.get(v, kind) for v in operands[1:]), s.pointer(operands[0])
    call = f"w.atomic({i.name!r}, {which!r}, {_space(i)!r}, {pointer}, [{values}], {s.mask})"
    if reduction:
        s.lines.append(call)
    else:
        s.put(i.operands[0], call, kind)


def _shuffle(s: Segment, i: Instruction) -> None:
    targets = s.elements(i.operands[0])
    a, b, c = (s.get(o, "b32") for o in i.operands[1:4])
    s.lines.append(f"t, p = w.shuffle({i.parts[2]!r}, {a}, {b}, {c}, {s.mask})")
    s.put(targets[0], "t", "b32", raw=True)
    if len(targets) > 1:
        s.put(targets[1], "p", "pred")


def _together(s: Segment, i: Instruction) -> None:
    """Votes, redux, elect, activemask."""
    name = ".".join(i.parts[:2]) if i.parts[0] == "activemask" else ".".join(i.parts)
    targets = s.elements(i.operands[0])
    if i.parts[0] == "elect":
        s.lines.append(f"t, p = w.elect({s.mask})")
        s.put(targets[0], "t", "b32", raw=True)
        s.put(targets[1], "p", "pred")
        return
    values = (
        s.get(i.operands[1], "pred" if "pred" in name or "ballot" in name else i.parts[-1])
        if len(i.operands) > 1
        else "None"
    )
    out = "pred" if i.parts[-1] == "pred" else "b32"
    s.put(targets[0], f"w.vote({name!r}, {values}, {s.mask})", out, raw=True)


def _matrix(s: Segment, i: Instruction) -> None:
    """ldmatrix and stmatrix."""
    transposed = "trans" in i.parts
    if i.parts[0] == "ldmatrix":
        pointer, count = s.pointer(i.operands[1]), len(s.elements(i.operands[0]))
        s.lines.append(f"t = w.load_matrix({pointer}, {count}, {transposed}, {s.mask})")
        s.put_each(i.operands[0])
        return
    pointer, values = s.pointer(i.operands[0]), s.list(i.operands[1])
    s.lines.append(f"w.store_matrix({pointer}, {values}, {transposed}, {s.mask})")


def _shape(i: Instruction) -> str:
    return next(p for p in i.parts if re.fullmatch(r"m\d+n\d+k\d+", p))


def _mma(s: Segment, i: Instruction) -> None:
    kinds = i.parts[-4:]
    if kinds[0] != "f32" or kinds[1] != kinds[2] or kinds[1] not in ("f16", "bf16", "tf32"):
        raise Unknown("types")
    a, b, c = map(s.list, i.operands[1:4])
    s.lines.append(f"t = w.mma({_shape(i)!r}, {kinds[1]!r}, {a}, {b}, {c}, {s.mask})")
    s.put_each(i.operands[0])


def _wgmma(s: Segment, i: Instruction) -> None:
    if i.parts[1] == "mma_async":
        targets = [s.kernel.registers[o.text][0] for o in s.elements(i.operands[0])]
        a, right, scale = i.operands[1], s.get(i.operands[2], "b64"), i.operands[3]
        left = s.list(a) if a.kind == "list" else s.get(a, "b64")
        keep = s.get(scale, "pred")
        flags = [int(o.text, 0) for o in i.operands[4:]]
        args = f"{_shape(i)!r}, {i.parts[-3:]!r}, {targets}, {left}, {right}, {keep}, {flags}"
        s.lines.append(f"w.wgmma({args}, {s.mask})")
    elif i.parts[1] == "wait_group":
        s.lines.append(f"w.wgmma_wait({number(i.operands[0].text, 32)})")
    else:
        s.lines.append(f"w.wgmma_{i.parts[1]}()")


def _copy(s: Segment, i: Instruction) -> None:
    """cp.async and the bulk copies."""
    name = i.name
    if name == "cp.async.commit_group":
        s.lines.append("w.commit_copies()")
    elif name in ("cp.async.wait_group", "cp.async.wait_all"):
        left = number(i.operands[0].text, 32) if i.operands else -1
        s.lines.append(f"w.wait_copies({left})")
    elif i.parts[2] in ("cg", "ca"):
        size = number(i.operands[2].text, 32)
        used = s.get(i.operands[3], "b32") if len(i.operands) > 3 else "None"
        to, source = map(s.pointer, i.operands[:2])
        bypass = i.parts[2] == "cg"
        s.lines.append(f"w.copy({to}, {source}, {size}, {used}, {bypass}, {s.mask})")
    elif i.parts[2] == "bulk":
        _bulk(s, i)
    elif name.startswith("cp.async.mbarrier.arrive"):
        s.lines.append(f"w.copies_arrive({s.pointer(i.operands[0])}, {'noinc' in name}, {s.mask})")
    else:
        raise Unknown(name)


def _bulk(s: Segment, i: Instruction) -> None:
    """Bulk copies: a tensor's boxes, or bytes in a row; to shared memory or from it."""
    name = i.name
    if i.parts[3] == "commit_group":
        s.lines.append(f"w.commit_stores({s.mask})")
        return
    if i.parts[3] == "wait_group":
        left = number(i.operands[0].text, 32)
        s.lines.append(f"w.wait_stores({left}, {'read' in i.parts}, {s.mask})")
        return
    if {"reduce", "prefetch", "im2col", "gather4", "scatter4"} & set(i.parts):
        raise Unknown(name)
    is_box = i.parts[3] == "tensor"
    first = i.parts[5 if is_box else 3]
    if first == "shared" and "global" in i.parts:
        to, source, *rest = i.operands
        size = [] if is_box else [s.get(rest.pop(0), "b32")]
        barrier, *rest = rest
        ranks = s.get(rest[0], "b32") if "multicast" in i.parts else "None"
        what = _box(s, source) if is_box else [s.pointer(source), *size]
        args = [s.pointer(to), *what, s.pointer(barrier), ranks, s.mask]
        s.lines.append(f"w.{'load_box' if is_box else 'copy_bulk'}({', '.join(args)})")
    elif first == "global" and "bulk_group" in i.parts:
        to, source, *rest = i.operands
        if is_box:
            args = [*_box(s, to), s.pointer(source), s.mask]
        else:
            args = [s.pointer(to), s.pointer(source), s.get(rest[0], "b32"), s.mask]
        s.lines.append(f"w.{'store_box' if is_box else 'store_bulk'}({', '.join(args)})")
    else:
        raise Unknown(name)


def _box(s: Segment, operand: Operand) -> list[str]:
    """Return the address of a tensor map, and coordinates."""
    return [s.pointer(operand), s.list(operand.parts[1])]


def _mbarrier(s: Segment, i: Instruction) -> None:
    which = i.parts[1]
    at = next(o for o in i.operands if o.kind == "memory")
    pointer = s.pointer(at)
    rest = i.operands[i.operands.index(at) + 1 :]
    count = s.get(rest[0], "b32") if rest else "None"
    if which == "arrive" and "expect_tx" in i.parts:
        s.lines.append(f"w.expect({pointer}, {count}, {s.mask})")
        count = "None"
    if which in ("init", "inval", "arrive"):
        s.lines.append(f"w.{which}({pointer}, {count}, {s.mask})")
    elif which == "expect_tx":
        s.lines.append(f"w.expect({pointer}, {count}, {s.mask})")
    else:
        raise Unknown(which)


def _fence(s: Segment, i: Instruction) -> None:
    s.lines.append(f"w.fence({i.name!r})")


def _mapa(s: Segment, i: Instruction) -> None:
    kind = f"b{bits(i.parts[-1])}"
    a = s.get(i.operands[1], kind)
    s.put(i.operands[0], f"w.mapa({a}, {s.get(i.operands[2], 'b32')})", kind, raw=True)


def _to_space(s: Segment, i: Instruction) -> None:
    kind = i.parts[-1]
    space = _space(i)
    base = {"shared": "w.window", "local": "w.local_window"}.get(space)
    a = s.get(i.operands[1], kind)
    sign = "-" if "to" in i.parts else "+"
    text = f"({a} {sign} u{bits(kind) // 8}({base}))" if base else a
    s.put(i.operands[0], text, kind, raw=True)


def _nothing(s: Segment, i: Instruction) -> None:
    """Register counts, prefetches and programmatic launches change no result."""


TABLE: dict[str, Handler] = {
    **dict.fromkeys(("vote", "redux", "elect", "activemask"), _together),
    **dict.fromkeys(("atom", "red"), _atomic),
    **dict.fromkeys(("ldmatrix", "stmatrix"), _matrix),
    **dict.fromkeys(("membar", "fence"), _fence),
    **dict.fromkeys(
        ("setmaxnreg", "prefetch", "prefetchu", "griddepcontrol", "createpolicy"), _nothing
    ),
    **{"ld": _load, "ldu": _load, "st": _store, "shfl": _shuffle, "mma": _mma, "wgmma": _wgmma},
    **{"cp": _copy, "mbarrier": _mbarrier, "mapa": _mapa, "cvta": _to_space},
}

"""What a warp's lanes compute together: shuffles, votes, and packed arithmetic in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx import numbers as N
from ptx.memory import Fault, lanes_of

Array = np.ndarray[Any, Any]

_LANES = np.arange(32)


class Lanes:
    """Exchanges between a warp's lanes."""

    def shuffle(self, mode: str, a: Array, b: Array, c: Array, mask: Any) -> tuple[Array, Array]:
        lane, b, c = _LANES, b.astype(np.int64) & 31, c.astype(np.int64)
        clamp, segment = c & 31, c >> 8 & 31
        last = (lane & segment) | (clamp & ~segment)
        source = {
            "up": lambda: lane - b, "down": lambda: lane + b, "bfly": lambda: lane ^ b,
            "idx": lambda: (lane & segment) | (b & ~segment & 31),
        }[mode]()  # fmt: skip
        valid = source >= last if mode == "up" else source <= last
        source = np.where(valid, source, lane)
        if mask is not None and not mask[source[mask]].all():
            raise Fault("a shuffle reads a lane that does not take part")
        return a[source], valid

    def vote(self, name: str, values: Any, mask: Any) -> Array:
        lanes = lanes_of(mask)
        if name.startswith("activemask"):
            return np.full(32, sum(1 << int(n) for n in lanes), np.uint32)
        if name.startswith("vote"):
            active = values[lanes]
            if "ballot" in name:
                return np.full(32, sum(1 << int(n) for n in lanes[active]), np.uint32)
            result = active.all() if ".all" in name else active.any()
            if ".uni" in name:
                result = active.all() or not active.any()
            if ".any" in name:
                self.counters.add("votes", 1)
                self.counters.add("votes that hold", int(result))
            return np.full(32, bool(result))
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                    "or": np.bitwise_or, "xor": np.bitwise_xor}[name.split(".")[2]]  # fmt: skip
        return np.full(32, function.reduce(values[lanes]), values.dtype).view(np.uint32)

    def elect(self, mask: Any) -> tuple[Array, Array]:
        first = 0 if mask is None else int(_LANES[mask][0]) if mask.any() else 0
        return np.full(32, first, np.uint32), first == _LANES

    def halves(self, name: str, kind: str, *args: Array) -> Array:
        """Compute in 16 bits, rounded once."""
        if kind.endswith("x2"):
            low, high = zip(*(N.halves(a) for a in args), strict=True)
            return N.pack(self.halves(name, kind[:-2], *low), self.halves(name, kind[:-2], *high))
        x = [getattr(N, f"from_{kind}")(a) for a in args]
        if name in ("neg", "abs"):
            return args[0] ^ np.uint16(0x8000) if name == "neg" else args[0] & np.uint16(0x7FFF)
        if name in ("min", "max"):
            return getattr(N, f"to_{kind}")(N.minimum(x[0], x[1], name == "max", False))
        wide = [v.astype(np.float64) for v in x]
        if name in N.APPROXIMATE:
            value = N.APPROXIMATE[name](wide[0])
        else:
            value = {
                "add": lambda a, b: a + b,
                "sub": lambda a, b: a - b,
                "mul": lambda a, b: a * b,
                "fma": lambda a, b, c: a * b + c,
            }[name](*wide)
        if kind == "f16":
            return np.where(
                value != value, np.uint16(0x7FFF), value.astype(np.float16).view(np.uint16)
            )
        raw = value.view(np.uint64)
        odd = raw >> np.uint64(45) & np.uint64(1)
        near = (raw + np.uint64((1 << 44) - 1) + odd) & ~np.uint64((1 << 45) - 1)
        normal = np.abs(value) > 2.0**-126
        return N.to_bf16(
            np.where(normal & np.isfinite(value), near.view(np.float64), value).astype(np.float32)
        )

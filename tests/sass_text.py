"""Machine code for tests of the cycle model, as nvdisasm prints it."""

from __future__ import annotations

from crossvit_kernels.inspect.model import sass


def code(*lines: str, control: int = 0x1) -> sass.Kernel:
    """Return a kernel, every instruction of which has the same control word.

    By default each may be followed by the next a cycle later, and uses no scoreboard.
    """
    word = (control | 7 << 5 | 7 << 8) << 41
    printed = [".text.made:"]
    for number, line in enumerate(lines):
        if line.endswith(":") or line.startswith("//"):
            printed.append(line)
            continue
        printed.append(f"        /*{16 * number:04x}*/    {line} ;   /* 0x{number:016x} */")
        printed.append(f"                     /* 0x{word:016x} */")
    (kernel,) = sass.parse("\n".join(printed) + "\n")
    return kernel

"""Small kernels in PTX, to test the executor and the faults it has to find."""

from __future__ import annotations

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"


def kernel(body: str, registers: str = "") -> str:
    """Return a kernel of (out, in) with 16 registers of each kind; out is %rd1, in %rd2."""
    return f"""{HEADER}
.extern .shared .align 16 .b8 memory[];
.visible .entry test(.param .u64 out, .param .u64 in)
{{
    .reg .pred %p<16>; .reg .b16 %rs<16>; .reg .b32 %r<16>; .reg .f32 %f<16>; .reg .b64 %rd<16>;
    .reg .f64 %fd<16>; {registers}
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [in];
    mov.u32 %r1, %tid.x;
    {body}
    ret;
}}
"""


#: Reverses 128 words through shared memory.
REVERSE = kernel("""
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    ld.global.b32 %r2, [%rd4];
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r2;
    bar.sync 0;
    sub.s32 %r4, 508, %r3;
    ld.shared.b32 %r5, [%r4];
    add.s64 %rd5, %rd1, %rd3;
    st.global.b32 [%rd5], %r5;
""")

#: The same by cp.async in two groups, of 4 bytes a thread each; adds both.
COPIES = kernel("""
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
    shl.b32 %r3, %r1, 2;
    cp.async.ca.shared.global [%r3], [%rd4], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r3+512], [%rd4+512], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    sub.s32 %r4, 508, %r3;
    ld.shared.b32 %r5, [%r4];
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r6, [%r4+512];
    add.s32 %r5, %r5, %r6;
    add.s64 %rd5, %rd1, %rd3;
    st.global.b32 [%rd5], %r5;
""")

_BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"

#: Two bulk copies into one buffer after another, each awaited at an mbarrier's next phase.
BULK = kernel(
    """
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd5, %rd1, %rd3;
    shl.b32 %r3, %r1, 2;
    setp.eq.u32 %p1, %r1, 0;
    mov.b32 %r7, 1024;
    @%p1 mbarrier.init.shared::cta.b64 [%r7], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r7], 512;
    mov.b32 %r8, 0;
    @%p1 {_BULK} [%r8], [%rd2], 512, [%r7];
first:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r7], 0;
    @!%p2 bra first;
    ld.shared.b32 %r5, [%r3];
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r7], 512;
    @%p1 {_BULK} [%r8], [%rd2+512], 512, [%r7];
second:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r7], 1;
    @!%p2 bra second;
    ld.shared.b32 %r6, [%r3];
    add.s32 %r5, %r5, %r6;
    st.global.b32 [%rd5], %r5;
""".replace("{_BULK}", _BULK)
)

#: Two CTAs of a cluster exchange 128 words through distributed shared memory.
CLUSTER = kernel("""
    mul.wide.u32 %rd3, %r1, 4;
    mov.u32 %r9, %ctaid.x;
    mul.wide.u32 %rd6, %r9, 512;
    add.s64 %rd3, %rd3, %rd6;
    add.s64 %rd4, %rd2, %rd3;
    add.s64 %rd5, %rd1, %rd3;
    ld.global.b32 %r2, [%rd4];
    shl.b32 %r3, %r1, 2;
    st.shared.b32 [%r3], %r2;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mov.u32 %r10, %cluster_ctarank;
    xor.b32 %r10, %r10, 1;
    mapa.shared::cluster.u32 %r11, %r3, %r10;
    ld.shared::cluster.b32 %r5, [%r11];
    st.global.b32 [%rd5], %r5;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
""")

_WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"


def warp_group(swizzle: int = 1) -> str:
    """Return a product of A [64, 16] and B [8, 16] of bfloat16, in rows of 32 bytes.

    Each thread stores 16 bytes of A in shared memory, the first 16 also of B behind it, in a
    swizzle of 32 bytes.
    """
    return kernel(f"""
    shl.b32 %r3, %r1, 4;
    cvt.u64.u32 %rd3, %r3;
    add.s64 %rd4, %rd2, %rd3;
    shr.u32 %r4, %r3, 7;
    and.b32 %r4, %r4, {swizzle};
    shl.b32 %r4, %r4, 4;
    xor.b32 %r4, %r4, %r3;
    ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd4];
    st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
    setp.lt.u32 %p1, %r1, 16;
    @%p1 ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd4+2048];
    @%p1 st.shared.v4.b32 [%r4+2048], {{%r5, %r6, %r7, %r8}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %rd6, 0xC000001000010000;
    mov.b64 %rd7, 0xC000001000010080;
    setp.ne.b32 %p2, %r3, %r3;
    wgmma.fence.sync.aligned;
    {_WGMMA} {{%f1, %f2, %f3, %f4}}, %rd6, %rd7, %p2, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.s64 %rd5, %rd1, %rd3;
    st.global.v4.f32 [%rd5], {{%f1, %f2, %f3, %f4}};
    """)


#: Found in some schedules only: other warps than needed may happen to meet.
IN_SOME_ORDERS = {"barrier of fewer warps"}
#: Name of a fault: kernel, text and what replaces it.
FAULTS = {
    "barrier left out": (REVERSE, "bar.sync 0;", ""),
    "barrier of fewer warps": (REVERSE, "bar.sync 0;", "bar.sync 0, 64;"),
    "barrier that one warp misses": (
        REVERSE,
        "bar.sync 0;",
        "setp.gt.u32 %p1, %r1, 31; @%p1 bar.sync 0;",
    ),
    "read one word off": (REVERSE, "sub.s32 %r4, 508", "sub.s32 %r4, 512"),
    "read two bytes off": (REVERSE, "sub.s32 %r4, 508", "sub.s32 %r4, 510"),
    "global read one word off": (
        REVERSE,
        "ld.global.b32 %r2, [%rd4]",
        "ld.global.b32 %r2, [%rd4+512]",
    ),
    "wait count raised by one": (COPIES, "wait_group 1", "wait_group 2"),
    "last wait count raised by one": (COPIES, "wait_group 0", "wait_group 1"),
    "barrier after a copy left out": (COPIES, "wait_group 1;\n    bar.sync 0;", "wait_group 1;"),
    "copy over what is read": (COPIES, "[%r3+512], [%rd4+512]", "[%r3], [%rd4+512]"),
    "phase inverted": (BULK, "[%r7], 1;\n    @!%p2 bra second", "[%r7], 0;\n    @!%p2 bra second"),
    "first phase inverted": (
        BULK,
        "[%r7], 0;\n    @!%p2 bra first",
        "[%r7], 1;\n    @!%p2 bra first",
    ),
    "fewer bytes expected": (BULK, "_, [%r7], 512;", "_, [%r7], 496;"),
    "more bytes expected": (BULK, "_, [%r7], 512;", "_, [%r7], 528;"),
    "barrier before a bulk copy left out": (
        BULK,
        "cta;\n    bar.sync 0;",
        "cta;",
    ),
    "proxy fence before a bulk copy left out": (BULK, "fence.proxy.async.shared::cta;", ""),
    "fence after an mbarrier's start left out": (BULK, "fence.mbarrier_init.release.cluster;", ""),
    "mbarrier not initialised": (BULK, "@%p1 mbarrier.init.shared::cta.b64 [%r7], 1;", ""),
    "cluster barrier left out": (
        CLUSTER,
        "barrier.cluster.arrive.release.aligned;\n    "
        "barrier.cluster.wait.acquire.aligned;\n    mov",
        "mov",
    ),
    "proxy fence left out": (warp_group(), "fence.proxy.async.shared::cta;", ""),
    "swizzle by another bit": (warp_group(), "shr.u32 %r4, %r3, 7", "shr.u32 %r4, %r3, 8"),
    "swizzle left out": (warp_group(), "and.b32 %r4, %r4, 1;", "and.b32 %r4, %r4, 0;"),
    "wgmma not waited for": (warp_group(), "wgmma.wait_group.sync.aligned 0;", ""),
    "wgmma wait count raised by one": (
        warp_group(),
        "wait_group.sync.aligned 0",
        "wait_group.sync.aligned 1",
    ),
    "descriptor 32 bytes off": (warp_group(), "0xC000001000010080", "0xC000001000010082"),
}

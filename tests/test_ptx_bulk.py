"""The executor of PTX: tensor maps and bulk stores, and the order of CTAs in global memory."""

from __future__ import annotations

import itertools

import numpy as np
import ptx
import pytest
from ptx_text import HEADER, kernel

_LOAD = "cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes"
_STORE = "cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group"
#: Of a box in shared memory, at most 2048 bytes, the mbarrier is behind.
_BARRIER = 2048
#: Loads a box of a tensor map `from`, copies shared memory to `raw`, adds 1 to the box's words and
#: stores it by the map `to`, twice.
BOX = """
.extern .shared .align 1024 .b8 memory[];
.visible .entry test(.param .align 64 .b8 from[128], .param .align 64 .b8 to[128],
                     .param .u64 raw, .param .b32 x, .param .b32 y, .param .b32 z)
{
    .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
    mov.b64 %rd1, from;
    cvta.param.u64 %rd1, %rd1;
    mov.b64 %rd2, to;
    ld.param.u64 %rd3, [raw];
    ld.param.b32 %r2, [x];
    ld.param.b32 %r3, [y];
    ld.param.b32 %r4, [z];
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    mov.b32 %r5, 0;
    mov.b32 %r6, BARRIER;
    @%p1 mbarrier.init.shared::cta.b64 [%r6], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], BYTES;
    @%p1 LOAD [%r5], [%rd1, {AT}], [%r6];
wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r6], 0;
    @!%p2 bra wait;
    mad.wide.u32 %rd4, %r1, 4, %rd3;
    shl.b32 %r7, %r1, 2;
next:
    setp.ge.u32 %p3, %r7, BYTES;
    @%p3 bra done;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd4], %r8;
    add.s32 %r8, %r8, 1;
    st.shared.b32 [%r7], %r8;
    add.s32 %r7, %r7, 128;
    add.s64 %rd4, %rd4, 128;
    bra next;
done:
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 STORE [%rd2, {AT}], [%r5];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    bar.sync 0;
    shl.b32 %r7, %r1, 2;
    ld.shared.b32 %r8, [%r7];
    st.shared.b32 [%r7], %r8;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @%p1 STORE [%rd2, {AT}], [%r5];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    ret;
}
"""


def _box_text(rank: int, num_bytes: int) -> str:
    text = BOX.replace("BARRIER", str(_BARRIER)).replace("BYTES", str(num_bytes))
    text = text.replace("LOAD", _LOAD.format(rank=rank)).replace("STORE", _STORE.format(rank=rank))
    return HEADER + text.replace("AT", ", ".join(("%r2", "%r3", "%r4")[:rank]))


def _maps(source: np.ndarray, box: tuple[int, ...], swizzle: int, out: np.ndarray) -> list[bytes]:
    return [
        ptx.TensorMap(
            int(array.ctypes.data),
            array.shape[::-1],
            array.strides[-2::-1],
            box[::-1],
            array.itemsize,
            swizzle,
        ).encode()
        for array in (source, out)
    ]


def _run_box(
    text: str,
    source: np.ndarray,
    box: tuple[int, ...],
    at: tuple[int, ...],
    swizzle: int = 0,
    order: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return shared memory after the load, and the tensor that is stored into."""
    (code,) = ptx.kernels(text).values()
    out = np.zeros_like(source)
    raw = np.zeros(int(np.prod(box)) * source.itemsize, np.uint8)
    memory = ptx.Memory()
    for array in (source, out, raw):
        memory.add(array)
    where = [np.int32(n) for n in (*at[::-1], 0, 0)[:3]]
    arguments = [*_maps(source, box, swizzle, out), np.uint64(raw.ctypes.data), *where]
    ptx.run(code, (1,), 32, arguments, memory, _BARRIER + 8, order)
    return raw, out


def _part(source: np.ndarray, box: tuple[int, ...], at: tuple[int, ...]) -> np.ndarray:
    """Return a box of a tensor, zero outside."""
    part = np.zeros(box, source.dtype)
    for index in itertools.product(*map(range, box)):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, source.shape, strict=True)):
            part[index] = source[place]
    return part


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    "shape, box, at",
    [
        ((100,), (32,), (4,)),
        ((100,), (32,), (-6,)),
        ((12, 20), (8, 8), (3, 8)),
        ((12, 20), (8, 8), (-2, 15)),
        ((12, 20), (8, 8), (40, 0)),
        ((3, 9, 12), (2, 5, 4), (2, -1, 10)),
    ],
)
def test_boxes(
    shape: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], order: int
) -> None:
    """What is outside of the tensor is zero in shared memory, and is not stored."""
    source = np.arange(1, 1 + np.prod(shape), dtype=np.uint32).reshape(shape)
    text = _box_text(len(shape), int(np.prod(box)) * 4)
    raw, out = _run_box(text, source, box, at, order=order)
    expected = _part(source, box, at)
    assert (raw.view(np.uint32).reshape(box) == expected).all()
    written = _part(np.ones_like(source), shape, tuple(0 for _ in shape)) * 0
    for index in itertools.product(*map(range, box)):
        place = tuple(a + i for a, i in zip(at, index, strict=True))
        if all(0 <= p < n for p, n in zip(place, shape, strict=True)):
            written[place] = source[place] + 1
    assert (out == written).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("swizzle, period", [(32, 4), (64, 2), (128, 1)])
def test_swizzles(swizzle: int, period: int, dtype: type) -> None:
    """Row r's unit c of 16 bytes is at c ^ (r / period) within the row."""
    columns = swizzle // np.dtype(dtype).itemsize
    source = np.arange(40 * columns, dtype=dtype).reshape(40, columns)
    raw, out = _run_box(_box_text(2, 16 * swizzle), source, (16, columns), (7, 0), swizzle)
    units, rows = swizzle // 16, np.arange(16)[:, None]
    unit = np.arange(units)[None, :] ^ (rows // period % units)
    stored = raw.reshape(16, units, 16)[rows, unit].reshape(16, swizzle)
    assert (stored == source[7:23].view(np.uint8)).all()
    words = source[7:23].view(np.uint32) + 1
    assert (out[7:23].view(np.uint32) == words).all() and not out[23:].any()


#: Text and what replaces it.
_FAULTS = {
    "wait left out": (
        "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r6], 0",
        "setp.eq.u32 %p2, 0, 0",
    ),
    "phase inverted": ("[%r6], 0;", "[%r6], 1;"),
    "fewer bytes expected": ("[%r6], 256;", "[%r6], 128;"),
    "more bytes expected": ("[%r6], 256;", "[%r6], 512;"),
    "two arrivals expected": ("b64 [%r6], 1;", "b64 [%r6], 2;"),
    "fence before a load left out": ("[%r6], 1;\n    fence.proxy.async.shared::cta;", "[%r6], 1;"),
    "fence before a store left out": ("done:\n    fence.proxy.async.shared::cta;", "done:"),
    "wait for a store left out": ("    cp.async.bulk.wait_group.read 0;\n", ""),
    "count of a wait raised": ("wait_group.read 0", "wait_group.read 1"),
    "group not committed": (
        "bulk.commit_group;\n    cp.async.bulk.wait_group.read",
        "bulk.wait_group.read",
    ),
    "exit before a store has read": ("    cp.async.bulk.wait_group 0;\n", ""),
    "coordinates changed round": ("[%rd1, {%r2, %r3}]", "[%rd1, {%r3, %r2}]"),
    "no tensor map": ("mov.b64 %rd2, to;", "add.s64 %rd2, %rd1, 64;"),
    "shared address off": ("[%r5], [%rd1", "[%r5+64], [%rd1"),
}


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("name", _FAULTS)
def test_faults_are_found(name: str, order: int) -> None:
    old, new = _FAULTS[name]
    text = _box_text(2, 256)
    assert text.count(old) == 1
    source = np.arange(1, 241, dtype=np.uint32).reshape(12, 20)
    try:
        raw, _ = _run_box(text.replace(old, new), source, (8, 8), (3, 8), order=order)
    except ptx.Fault:
        return
    assert (raw.view(np.uint32).reshape(8, 8) != source[3:11, 8:16]).any()


def test_a_wrong_swizzle_makes_wrong_numbers() -> None:
    source = np.arange(40 * 32, dtype=np.uint32).reshape(40, 32)
    raw, _ = _run_box(_box_text(2, 16 * 128), source, (16, 32), (0, 0), 0)
    swizzled, _ = _run_box(_box_text(2, 16 * 128), source, (16, 32), (0, 0), 128)
    assert (raw != swizzled).any()


@pytest.mark.parametrize(
    "change",
    [
        {"address": 8},
        {"strides": (72,)},
        {"box": (2, 4)},
        {"box": (16, 300)},
        {"swizzle": 128},
        {"sizes": (20,)},
    ],
)
def test_wrong_tensor_maps(change: dict[str, object]) -> None:
    right = {"address": 1 << 41, "sizes": (20, 12), "strides": (80,), "box": (16, 4), "element": 4}
    ptx.TensorMap(**right)
    with pytest.raises(ValueError, match="expected"):
        ptx.TensorMap(**{**right, **change})


#: One CTA of a cluster copies 256 bytes to both, and each copies them to its part of the result.
MULTICAST = kernel("""
    mov.u32 %r9, %cluster_ctarank;
    mul.wide.u32 %rd3, %r9, 256;
    add.s64 %rd3, %rd1, %rd3;
    mov.b32 %r5, 0;
    mov.b32 %r6, 2048;
    setp.eq.u32 %p1, %r1, 0;
    setp.eq.u32 %p3, %r9, 0;
    and.pred %p3, %p1, %p3;
    @%p1 mbarrier.init.shared::cta.b64 [%r6], 1;
    fence.mbarrier_init.release.cluster;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 256;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mov.b16 %rs1, 3;
    @%p3 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r5], [%rd2], 256, [%r6], %rs1;
wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r6], 0;
    @!%p2 bra wait;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r5], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
""")
_CLUSTER_BARRIER = """    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mov"""


def _run_multicast(text: str, order: int) -> None:
    (code,) = ptx.kernels(text).values()
    memory = ptx.Memory()
    source, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    arguments = [np.uint64(memory.add(array)) for array in (out, source)]
    ptx.run(code, (2,), 32, arguments, memory, _BARRIER + 8, order, cluster=2)
    assert (out == np.tile(source[:64], 2)).all()


@pytest.mark.parametrize("order", range(3))
def test_a_copy_to_several_ctas(order: int) -> None:
    _run_multicast(MULTICAST, order)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    "old, new",
    [("%rs1, 3", "%rs1, 1"), (_CLUSTER_BARRIER, "    mov"), ("_, [%r6], 256", "_, [%r6], 512")],
)
def test_faults_of_a_copy_to_several_ctas(old: str, new: str, order: int) -> None:
    assert MULTICAST.count(old) == 1
    with pytest.raises(ptx.Fault):
        _run_multicast(MULTICAST.replace(old, new), order)


#: CTAs add up their words: the last one to count itself adds what all have written.
LAST = kernel("""
    mul.wide.u32 %rd3, %r1, 4;
    mov.u32 %r9, %ctaid.x;
    mul.wide.u32 %rd6, %r9, 512;
    add.s64 %rd4, %rd2, %rd3;
    add.s64 %rd4, %rd4, %rd6;
    add.s64 %rd5, %rd1, %rd3;
    add.s64 %rd7, %rd5, %rd6;
    ld.global.b32 %r2, [%rd4];
    st.global.b32 [%rd7], %r2;
    fence.acq_rel.gpu;
    bar.sync 0;
    setp.eq.u32 %p1, %r1, 0;
    mov.b32 %r4, 0;
    mov.b32 %r8, 0;
    @%p1 atom.global.add.u32 %r4, [%rd1+1024], 1;
    @%p1 st.shared.b32 [%r8], %r4;
    bar.sync 0;
    ld.shared.b32 %r4, [%r8];
    setp.ne.u32 %p2, %r4, 1;
    @%p2 bra end;
    membar.gl;
    ld.global.b32 %r5, [%rd5];
    ld.global.b32 %r6, [%rd5+512];
    add.s32 %r5, %r5, %r6;
    st.global.b32 [%rd5+1536], %r5;
end:
""")


def _run_ctas(text: str, order: int) -> None:
    (code,) = ptx.kernels(text).values()
    memory = ptx.Memory()
    source = np.arange(512, dtype=np.uint32) ** 2
    out = np.zeros(512, np.uint32)
    arguments = [np.uint64(memory.add(array)) for array in (out, source)]
    ptx.run(code, (2,), 128, arguments, memory, 64, order)
    assert (out[384:] == source[:128] + source[128:256]).all()


@pytest.mark.parametrize("order", range(3))
def test_the_last_cta_sees_what_the_others_wrote(order: int) -> None:
    _run_ctas(LAST, order)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(
    "old, new",
    [
        ("    fence.acq_rel.gpu;\n", ""),
        ("    fence.acq_rel.gpu;\n    bar.sync 0;\n", "    fence.acq_rel.gpu;\n"),
        ("    membar.gl;\n", ""),
        ("membar.gl", "membar.cta"),
        ("add.s64 %rd7, %rd5, %rd6", "add.s64 %rd7, %rd5, 4"),
        ("setp.ne.u32 %p2, %r4, 1", "setp.ne.u32 %p2, %r4, %r4"),
    ],
)
def test_races_between_ctas(old: str, new: str, order: int) -> None:
    assert LAST.count(old) == 1
    with pytest.raises(ptx.Fault, match="a race in global memory"):
        _run_ctas(LAST.replace(old, new), order)

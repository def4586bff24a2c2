"""A linear layer for sm_90: y = act(LN(x) W^T + b) + r for rows of up to 384 channels.

Each SM runs one program of two consumers, groups of four warps, and a producer, one warp, which
streams rows of x and tiles of W through a ring in shared memory. A consumer takes 64 rows into
registers, normalises them, and keeps them as the left operand of products with all of W that
follows. While a tile [64, 64] is multiplied, the one before it gets its bias, activation and
residual and is stored. All programs have equally many tiles, row by row.
"""

from __future__ import annotations

from crossvit_kernels.gpu import gluon
from crossvit_kernels.gpu.gluon import language as gl

load_tile = gluon.load_tile
store_tile = gluon.store_tile
fence = gluon.hopper.fence_async_shared
barrier = gluon.hopper.mbarrier
store_wait = gluon.hopper.tma.store_wait
multiply_async = gluon.hopper.warpgroup_mma
multiply_wait = gluon.hopper.warpgroup_mma_wait


@gluon.jit
def gelu(x):
    """x times the normal distribution; the error is below 6e-7 (csrc/common/cuda/activations.h)."""
    size = gl.abs(x)
    power = x * x * -0.72134752
    density = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=gl.float32, is_pure=True, pack=1
    )
    t = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [0.23 * size + 1.0],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    ratio = 0.599980137 * t - 0.946215317
    ratio = ratio * t + 1.00769368
    ratio = ratio * t - 0.353475154
    ratio = ratio * t + 0.20338157
    ratio = ratio * t - 0.011364827
    return gl.maximum(x, 0.0) - size * (ratio * density)


@gluon.jit
def _produce(x, weight, r, ws, rs, barriers, first, last, c: gl.constexpr):
    """Load rows, weights and residuals as soon as the consumers have used the last ones."""
    boxes: gl.constexpr = c.boxes
    together: gl.constexpr = c.together
    consumers: gl.constexpr = c.consumers
    wfull, wempty, rfull, rempty = barriers
    stage = 0
    tiles = 0
    for t in range(first, last):
        block = t // c.tiles
        column = (t - block * c.tiles) * 64
        if (column == 0) | (t == first):
            for w in gl.static_range(consumers):
                row = (block * c.consumers + w) * 64
                for g in gl.static_range(boxes // together):
                    s = stage % c.stages
                    barrier.wait(wempty.index(s), ((stage // c.stages) & 1) ^ 1)
                    barrier.expect(wfull.index(s), 64 * 128 * c.together)
                    for k in gl.static_range(together):
                        at = ws.index(s * c.together + k)
                        load_tile(x, [row, (g * c.together + k) * 64], wfull.index(s), at)
                    stage += 1
        for g in gl.static_range(boxes // together):
            s = stage % c.stages
            barrier.wait(wempty.index(s), ((stage // c.stages) & 1) ^ 1)
            barrier.expect(wfull.index(s), 64 * 128 * c.together)
            for k in gl.static_range(together):
                at = ws.index(s * c.together + k)
                load_tile(weight, [column, (g * c.together + k) * 64], wfull.index(s), at)
            stage += 1
        if c.residual:
            for w in gl.static_range(consumers):
                q = w * 2 + (tiles & 1)
                barrier.wait(rempty.index(q), ((tiles >> 1) & 1) ^ 1)
                barrier.expect(rfull.index(q), 64 * 128)
                row = (block * c.consumers + w) * 64
                load_tile(r, [row, column], rfull.index(q), rs.index(q))
            tiles += 1


@gluon.jit
def _start(a, ws, wfull, stage, zero, c: gl.constexpr):
    """Start the products of a tile."""
    boxes: gl.constexpr = c.boxes
    together: gl.constexpr = c.together
    acc = zero
    for g in gl.static_range(boxes // together):
        s = (stage + g) % c.stages
        barrier.wait(wfull.index(s), ((stage + g) // c.stages) & 1)
        for k in gl.static_range(together):
            part = ws.index(s * c.together + k).permute((1, 0))
            rows = a[g * c.together + k]
            acc = multiply_async(rows, part, acc, use_acc=g + k > 0, is_async=True)
    return acc


@gluon.jit
def _end(acc, wempty, stage, c: gl.constexpr):
    """Wait for the products of a tile and give its weights back to the producer."""
    steps: gl.constexpr = c.boxes // c.together
    acc = multiply_wait(0, deps=(acc,))
    for g in gl.static_range(steps):
        barrier.arrive(wempty.index((stage + g) % c.stages), count=1)
    return acc


@gluon.jit
def _finish(acc, y, ys, bs, rs, rfull, rempty, row, n, j, w: gl.constexpr, c: gl.constexpr):
    """Add bias and residual around the activation, and store a tile."""
    layout: gl.constexpr = acc.type.layout
    out = acc + bs.index(n).load(gl.SliceLayout(0, layout))[None, :]
    if c.gelu:
        out = gelu(out)
    if c.residual:
        q = w * 2 + (j & 1)
        barrier.wait(rfull.index(q), (j >> 1) & 1)
        out += rs.index(q).load(layout).to(gl.float32)
        fence()  # as in _rows
        barrier.arrive(rempty.index(q), count=1)
    store_wait(pendings=0)
    ys.store(out.to(y.dtype))
    fence()
    store_tile(y, [row, n * 64], ys)


@gluon.jit
def _box(ws, stage, k, c: gl.constexpr):
    """Return 64 channels of rows that lie in the ring from a stage on."""
    s = (stage + k // c.together) % c.stages
    return ws.index(s * c.together + k % c.together)


@gluon.jit
def _normalize(ws, stage, gs, statistics, row, num_rows, eps, c: gl.constexpr):
    """Replace 64 rows in the ring by LayerNorm of them."""
    mean_ptr, rstd_ptr = statistics
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    # In one pass, as distances from the mean of some channels: no digits are lost.
    pivot = gl.sum(_box(ws, stage, 0, c).load(layout).to(gl.float32), 1) * (1.0 / 64)
    total = gl.zeros((64, 64), gl.float32, layout=layout)
    squares = gl.zeros((64, 64), gl.float32, layout=layout)
    for k in range(c.boxes):
        d = _box(ws, stage, k, c).load(layout).to(gl.float32) - pivot[:, None]
        total += d
        squares += d * d
    offset = gl.sum(total, 1) * (1.0 / c.channels)
    variance = gl.sum(squares, 1) * (1.0 / c.channels) - offset * offset
    mean = pivot + offset
    rstd = gl.rsqrt(gl.maximum(variance, 0.0) + eps)
    if mean_ptr is not None:
        at = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        gl.store(mean_ptr + at, mean, mask=at < num_rows)
        gl.store(rstd_ptr + at, rstd, mask=at < num_rows)
    for k in range(c.boxes):
        box = _box(ws, stage, k, c)
        v = (box.load(layout).to(gl.float32) - mean[:, None]) * rstd[:, None]
        v = v * gs.index(k).load(gl.SliceLayout(0, layout))[None, :]
        v += gs.index(c.boxes + k).load(gl.SliceLayout(0, layout))[None, :]
        box.store(v.to(box.dtype))


@gluon.jit
def _rows(ws, gs, ring, stage, statistics, run, row, w: gl.constexpr, c: gl.constexpr):
    """Take 64 rows out of the ring, normalised, and let those of other consumers pass."""
    wfull, wempty = ring
    num_rows, eps, _first, _last = run
    boxes: gl.constexpr = c.boxes
    steps: gl.constexpr = c.boxes // c.together
    consumers: gl.constexpr = c.consumers
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    own = stage + w * steps
    rows = ()
    for v in gl.static_range(consumers):
        for g in gl.static_range(steps):
            i = stage + v * steps + g
            barrier.wait(wfull.index(i % c.stages), (i // c.stages) & 1)
            if v != w:
                barrier.arrive(wempty.index(i % c.stages), count=1)
        if v == w:
            if c.norm:
                _normalize(ws, own, gs, statistics, row, num_rows, eps, c)
            for k in gl.static_range(boxes):
                rows = rows + (_box(ws, own, k, c).load(layout),)
            fence()  # TMA writes next where this group read: without it, before that is done
            for g in gl.static_range(steps):
                barrier.arrive(wempty.index((own + g) % c.stages), count=1)
    return rows


@gluon.jit
def _consume(y, ws, ys, shared, statistics, run, w: gl.constexpr, c: gl.constexpr):
    """Compute the tiles of 64 rows at a time, of which there are ``c.consumers`` side by side."""
    steps: gl.constexpr = c.boxes // c.together
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    bs, gs, rs, barriers = shared
    _num_rows, _eps, first, last = run
    wfull, wempty, rfull, rempty = barriers
    zero = gl.zeros((64, 64), gl.float32, layout=layout)
    i = 0
    j = 0
    t = first
    while t < last:
        block = t // c.tiles
        n = t - block * c.tiles
        row = (block * c.consumers + w) * 64
        stop = gl.minimum(last - block * c.tiles, c.tiles)
        t += stop - n
        x = _rows(ws, gs, (wfull, wempty), i, statistics, run, row, w, c)
        i += steps * c.consumers
        a = _end(_start(x, ws, wfull, i, zero, c), wempty, i, c)
        i += steps
        while n + 2 < stop:  # two accumulators by turns: no register is copied
            b = _start(x, ws, wfull, i, zero, c)
            _finish(a, y, ys, bs, rs, rfull, rempty, row, n, j, w, c)
            b = _end(b, wempty, i, c)
            i += steps
            a = _start(x, ws, wfull, i, zero, c)
            _finish(b, y, ys, bs, rs, rfull, rempty, row, n + 1, j + 1, w, c)
            a = _end(a, wempty, i, c)
            i += steps
            n += 2
            j += 2
        if n + 1 < stop:
            b = _start(x, ws, wfull, i, zero, c)
            _finish(a, y, ys, bs, rs, rfull, rempty, row, n, j, w, c)
            b = _end(b, wempty, i, c)
            i += steps
            _finish(b, y, ys, bs, rs, rfull, rempty, row, n + 1, j + 1, w, c)
            j += 2
        else:
            _finish(a, y, ys, bs, rs, rfull, rempty, row, n, j, w, c)
            j += 1
    store_wait(pendings=0)


@gluon.jit
def _stage(to, at, vector, count: gl.constexpr):
    """Copy a vector to count rows of 64 in shared memory from one on; zeros for None."""
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = gl.arange(0, 64, layout=spread)
    parts = ()
    for n in gl.static_range(count):  # all are on the way before the first is waited for
        if vector is not None:
            parts = parts + (gl.load(vector + n * 64 + column),)
        else:
            parts = parts + (gl.zeros((64,), gl.float32, layout=spread),)
    for n in gl.static_range(count):
        to.index(at + n).store(parts[n].to(gl.float32))


@gluon.jit(do_not_specialize=["num_rows"])
def sm90_linear(
    x,
    weight,
    y,
    r,
    bias_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    eps,
    c: gl.constexpr,
):
    """Compute y [M, N]; a program each SM.

    x, weight, y and r are tiles of x [M, K], W [N, K], y [M, N] and r [M, N], or of y without a
    residual. bias [N], beta [K], and mean and rstd [M], which it writes, may be None; gamma [K] is
    any tensor without LayerNorm. num_rows is M; c is a Sm90Shape.
    """
    consumers: gl.constexpr = c.consumers
    stages: gl.constexpr = c.stages
    total = (num_rows + c.consumers * 64 - 1) // (c.consumers * 64) * c.tiles
    first = total * gl.program_id(0) // gl.num_programs(0)
    last = total * (gl.program_id(0) + 1) // gl.num_programs(0)
    ws = gl.allocate_shared_memory(x.dtype, [c.stages * c.together, 64, 64], weight.layout)
    ys = gl.allocate_shared_memory(x.dtype, [c.consumers, 64, 64], y.layout)
    if c.residual:
        rs = gl.allocate_shared_memory(x.dtype, [2 * c.consumers, 64, 64], r.layout)
    else:
        rs = ys
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bs = gl.allocate_shared_memory(gl.float32, [c.tiles, 64], flat)
    gs = gl.allocate_shared_memory(gl.float32, [2 * c.boxes if c.norm else 1, 64], flat)
    _stage(bs, 0, bias_ptr, c.tiles)
    if c.norm:
        _stage(gs, 0, gamma_ptr, c.boxes)
        _stage(gs, c.boxes, beta_ptr, c.boxes)
    one: gl.constexpr = barrier.MBarrierLayout()
    wfull = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    wempty = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    rfull = gl.allocate_shared_memory(gl.int64, [2 * c.consumers, 1], one)
    rempty = gl.allocate_shared_memory(gl.int64, [2 * c.consumers, 1], one)
    for q in gl.static_range(2 * consumers):
        barrier.init(rfull.index(q), count=1)
        barrier.init(rempty.index(q), count=1)
    for s in gl.static_range(stages):
        barrier.init(wfull.index(s), count=1)
        barrier.init(wempty.index(s), count=c.consumers)
    fence()
    barriers = (wfull, wempty, rfull, rempty)
    shared = (bs, gs, rs, barriers)
    statistics = (mean_ptr, rstd_ptr)
    run = (num_rows, eps, first, last)
    gl.warp_specialize(
        [
            (_consume, (y, ws, ys.index(0), shared, statistics, run, 0, c)),
            (_consume, (y, ws, ys.index(1), shared, statistics, run, 1, c)),
            (_produce, (x, weight, r, ws, rs, barriers, first, last, c)),
        ],
        [4, 1],
        [232, 24],
    )

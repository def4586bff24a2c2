"""A linear layer for sm_90: y = act(LN(x) W^T + b) + r for rows of up to 384 channels.

Each SM runs one program of two consumers, groups of four warps, and a producer, one warp. A
consumer holds 64 normalised rows of x in registers, as the left operand of products with tiles of
W, which the producer streams through a ring in shared memory. While a tile [64, 64] is multiplied,
the one before it gets its bias, activation and residual and is stored. All programs have equally
many tiles, row by row.
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
def gelu(x, dtype: gl.constexpr):
    """x times the normal distribution, for results in dtype: as in triton_activations."""
    size = gl.abs(x)
    if dtype == gl.float16:
        power = -1.78168047e-06 * size + 6.06695262e-05
        power = (power * size - 0.00092431097) * size + 0.00848785019
        power = (power * size - 0.0539279067) * size - 0.458488116
        power = (power * size - 1.15124477) * size - 0.999995562
    else:
        power = -0.000256385217 * size + 0.00515643039
        power = (power * size - 0.045810577) * size - 0.467650187
        power = (power * size - 1.14741397) * size - 1.00025812
    tail = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.maximum(x, 0.0) - size * tail


@gluon.jit
def _produce(x, weight, r, xs, ws, rs, barriers, first, last, c: gl.constexpr):
    """Load rows, weights and residuals as soon as the consumers have used the last ones."""
    boxes: gl.constexpr = c.boxes
    together: gl.constexpr = c.together
    consumers: gl.constexpr = c.consumers
    xfull, xempty, wfull, wempty, rfull, rempty = barriers
    stage = 0
    blocks = 0
    tiles = 0
    previous = -1
    for t in range(first, last):
        block = t // c.tiles
        column = (t - block * c.tiles) * 64
        if block != previous:
            for w in gl.static_range(consumers):
                barrier.wait(xempty.index(w), (blocks & 1) ^ 1)
                barrier.expect(xfull.index(w), 128 * c.channels)
                for k in gl.static_range(boxes):
                    at = xs.index(w * c.boxes + k)
                    load_tile(x, [(block * c.consumers + w) * 64, k * 64], xfull.index(w), at)
            blocks += 1
        previous = block
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
        out = gelu(out, y.dtype)
    if c.residual:
        q = w * 2 + (j & 1)
        barrier.wait(rfull.index(q), (j >> 1) & 1)
        out += rs.index(q).load(layout).to(gl.float32)
        fence()  # as for x
        barrier.arrive(rempty.index(q), count=1)
    store_wait(pendings=0)
    ys.store(out.to(y.dtype))
    fence()
    store_tile(y, [row, n * 64], ys)


@gluon.jit
def _normalize(xs, gs, mean_ptr, rstd_ptr, row, num_rows, eps, w: gl.constexpr, c: gl.constexpr):
    """Replace 64 rows in shared memory by LayerNorm of them."""
    accumulator: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator, 2)
    # In one pass, as distances from the mean of 64 channels: offset^2 is at most C / 64 - 1 times
    # the variance, so that their difference loses no digits.
    pivot = gl.sum(xs.index(w * c.boxes).load(layout).to(gl.float32), 1) * (1.0 / 64)
    total = gl.zeros((64, 64), gl.float32, layout=layout)
    squares = gl.zeros((64, 64), gl.float32, layout=layout)
    for k in range(c.boxes):
        d = xs.index(w * c.boxes + k).load(layout).to(gl.float32) - pivot[:, None]
        total += d
        squares += d * d
    offset = gl.sum(total, 1) * (1.0 / c.channels)
    variance = gl.sum(squares, 1) * (1.0 / c.channels) - offset * offset
    mean = pivot + offset
    rstd = gl.rsqrt(gl.maximum(variance, 0.0) + eps)
    if mean_ptr is not None:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        gl.store(mean_ptr + rows, mean, mask=rows < num_rows)
        gl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    for k in range(c.boxes):
        box = xs.index(w * c.boxes + k)
        v = (box.load(layout).to(gl.float32) - mean[:, None]) * rstd[:, None]
        v = v * gs.index(k).load(gl.SliceLayout(0, layout))[None, :]
        v += gs.index(c.boxes + k).load(gl.SliceLayout(0, layout))[None, :]
        box.store(v.to(box.dtype))


@gluon.jit
def _consume(y, xs, ws, ys, shared, statistics, run, w: gl.constexpr, c: gl.constexpr):
    """Compute the tiles of 64 rows at a time, of which there are ``c.consumers`` side by side."""
    boxes: gl.constexpr = c.boxes
    steps: gl.constexpr = c.boxes // c.together
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    bs, gs, rs, barriers = shared
    num_rows, eps, first, last = run
    mean_ptr, rstd_ptr = statistics
    xfull, xempty, wfull, wempty, rfull, rempty = barriers
    zero = gl.zeros((64, 64), gl.float32, layout=layout)
    i = 0
    blocks = 0
    j = 0
    t = first
    while t < last:
        block = t // c.tiles
        n = t - block * c.tiles
        row = (block * c.consumers + w) * 64
        stop = gl.minimum(last - block * c.tiles, c.tiles)
        t += stop - n
        barrier.wait(xfull.index(w), blocks & 1)
        blocks += 1
        if c.norm:
            _normalize(xs, gs, mean_ptr, rstd_ptr, row, num_rows, eps, w, c)
        x = ()
        for k in gl.static_range(boxes):
            x = x + (xs.index(w * c.boxes + k).load(left),)
        a = _end(_start(x, ws, wfull, i, zero, c), wempty, i, c)
        i += steps
        fence()  # TMA writes next where this group read: without it, before that is done
        barrier.arrive(xempty.index(w), count=1)
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
    xs = gl.allocate_shared_memory(x.dtype, [c.consumers * c.boxes, 64, 64], x.layout)
    ws = gl.allocate_shared_memory(x.dtype, [c.stages * c.together, 64, 64], weight.layout)
    ys = gl.allocate_shared_memory(x.dtype, [c.consumers, 64, 64], y.layout)
    waiting: gl.constexpr = 2 * c.consumers if c.residual else 1
    rs = gl.allocate_shared_memory(x.dtype, [waiting, 64, 64], r.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = gl.arange(0, 64, layout=spread)
    bs = gl.allocate_shared_memory(gl.float32, [c.tiles, 64], flat)
    for n in range(c.tiles):
        if bias_ptr is not None:
            bs.index(n).store(gl.load(bias_ptr + n * 64 + column).to(gl.float32))
        else:
            bs.index(n).store(gl.zeros((64,), gl.float32, layout=spread))
    gs = gl.allocate_shared_memory(gl.float32, [2 * c.boxes if c.norm else 1, 64], flat)
    if c.norm:
        for k in range(c.boxes):
            gs.index(k).store(gl.load(gamma_ptr + k * 64 + column).to(gl.float32))
            if beta_ptr is not None:
                gs.index(c.boxes + k).store(gl.load(beta_ptr + k * 64 + column).to(gl.float32))
            else:
                gs.index(c.boxes + k).store(gl.zeros((64,), gl.float32, layout=spread))
    one: gl.constexpr = barrier.MBarrierLayout()
    xfull = gl.allocate_shared_memory(gl.int64, [c.consumers, 1], one)
    xempty = gl.allocate_shared_memory(gl.int64, [c.consumers, 1], one)
    wfull = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    wempty = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    rfull = gl.allocate_shared_memory(gl.int64, [2 * c.consumers, 1], one)
    rempty = gl.allocate_shared_memory(gl.int64, [2 * c.consumers, 1], one)
    for w in gl.static_range(consumers):
        barrier.init(xfull.index(w), count=1)
        barrier.init(xempty.index(w), count=1)
    for q in gl.static_range(2 * consumers):
        barrier.init(rfull.index(q), count=1)
        barrier.init(rempty.index(q), count=1)
    for s in gl.static_range(stages):
        barrier.init(wfull.index(s), count=1)
        barrier.init(wempty.index(s), count=c.consumers)
    fence()
    barriers = (xfull, xempty, wfull, wempty, rfull, rempty)
    shared = (bs, gs, rs, barriers)
    statistics = (mean_ptr, rstd_ptr)
    run = (num_rows, eps, first, last)
    gl.warp_specialize(
        [
            (_consume, (y, xs, ws, ys.index(0), shared, statistics, run, 0, c)),
            (_consume, (y, xs, ws, ys.index(1), shared, statistics, run, 1, c)),
            (_produce, (x, weight, r, xs, ws, rs, barriers, first, last, c)),
        ],
        [4, 1],
        [232, 24],
    )

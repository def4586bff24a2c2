"""A linear layer for sm_90 of any width: y = r + scale act(x W^T + b), x and W by TMA.

Each SM runs one program of two consumers, groups of four warps, and a producer, one warp. A tile is
128 rows, 64 for each consumer, by up to 384 columns, which are in registers until all channels are
multiplied. Both operands come through one ring in shared memory, 64 channels at a time, and after a
tile's channels its residuals, 64 columns at a time: while the consumers finish a tile, the producer
loads the next one's first stages.
"""

from __future__ import annotations

from crossvit_kernels.gpu import gluon
from crossvit_kernels.gpu.gluon import language as gl
from crossvit_kernels.ops.common.triton_sm90_kernels import gelu

load_tile = gluon.load_tile
store_tile = gluon.store_tile
fence = gluon.hopper.fence_async_shared
barrier = gluon.hopper.mbarrier
store_wait = gluon.hopper.tma.store_wait
multiply_async = gluon.hopper.warpgroup_mma
multiply_wait = gluon.hopper.warpgroup_mma_wait


@gluon.jit
def _produce(x, weight, r, xs, ws, full, empty, total, c: gl.constexpr):
    """Load operands and residuals as soon as the consumers have used a stage."""
    pieces: gl.constexpr = c.pieces
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block = t // c.tiles
        column = (t - block * c.tiles) * c.tile_columns
        for k in range(c.steps):
            s = i % c.stages
            barrier.wait(empty.index(s), ((i // c.stages) & 1) ^ 1)
            barrier.expect(full.index(s), 128 * (128 + c.tile_columns))
            for w in gl.static_range(2):
                load_tile(x, [block * 128 + w * 64, k * 64], full.index(s), xs.index(s * 2 + w))
            for p in gl.static_range(pieces):
                at = ws.index(s * c.pieces + p)
                if c.transposed:
                    load_tile(weight, [k * 64, column + p * c.piece], full.index(s), at)
                else:
                    load_tile(weight, [column + p * c.piece, k * 64], full.index(s), at)
            i += 1
        if c.residual:
            for n in range(c.tile_columns // 64):
                s = i % c.stages
                barrier.wait(empty.index(s), ((i // c.stages) & 1) ^ 1)
                barrier.expect(full.index(s), 128 * 128)
                for w in gl.static_range(2):
                    at = xs.index(s * 2 + w)
                    load_tile(r, [block * 128 + w * 64, column + n * 64], full.index(s), at)
                i += 1


@gluon.jit
def _halves(a):
    """Split a tile into its left and right half, whose registers stay where they are."""
    half: gl.constexpr = a.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16])
    left, right = a.reshape([64, 2, half]).permute((0, 2, 1)).split()
    left = gl.convert_layout(left, layout, assert_trivial=True)
    return left, gl.convert_layout(right, layout, assert_trivial=True)


@gluon.jit
def _finish(
    acc, y, bias_ptr, shared, scale, place, m: gl.constexpr, w: gl.constexpr, c: gl.constexpr
):
    """Add bias and residual to the m-th 64 columns of a tile, with GELU between, and store them."""
    xs, _ws, ys, full, empty = shared
    row, first_column, i, j = place
    column = first_column + m * 64
    layout: gl.constexpr = acc.type.layout
    out = acc
    if bias_ptr is not None:
        at = column + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
        if c.columns % c.tile_columns == 0:
            bias = gl.load(bias_ptr + at)
        else:
            bias = gl.load(bias_ptr + at, mask=at < c.columns, other=0.0)
        out += bias.to(gl.float32)[None, :]
    if c.gelu:
        out = gelu(out)
    if scale is not None:
        out = out * scale[:, None]
    if c.residual:
        s = (i + m) % c.stages
        barrier.wait(full.index(s), ((i + m) // c.stages) & 1)
        out += xs.index(s * 2 + w).load(layout).to(gl.float32)
        fence()  # TMA writes next where this group read: without it, before that is done
        barrier.arrive(empty.index(s), count=1)
    to = ys.index(w * 2 + ((j + m) & 1))
    store_wait(pendings=1)
    to.store(out.to(y.dtype))
    fence()
    store_tile(y, [row, column], to)


@gluon.jit
def _consume(y, bias_ptr, scale_ptr, shared, sizes, w: gl.constexpr, c: gl.constexpr):
    """Compute 64 rows of each tile."""
    pieces: gl.constexpr = c.pieces
    piece: gl.constexpr = c.piece
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, piece, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    xs, ws, _ys, full, empty = shared
    num_rows, num_tokens, total = sizes
    zero = gl.zeros((64, piece), gl.float32, layout=layout)
    i = 0
    j = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block = t // c.tiles
        column = (t - block * c.tiles) * c.tile_columns
        row = block * 128 + w * 64
        accs = ()
        for _ in gl.static_range(pieces):
            accs = accs + (zero,)
        for k in range(c.steps):
            s = i % c.stages
            barrier.wait(full.index(s), (i // c.stages) & 1)
            sums = ()
            for p in gl.static_range(pieces):
                box = ws.index(s * c.pieces + p)
                part = box if c.transposed else box.permute((1, 0))
                product = multiply_async(
                    xs.index(s * 2 + w), part, accs[p], use_acc=k > 0, is_async=True
                )
                sums = sums + (product,)
            # Of one it returns no tuple.
            accs = (multiply_wait(0, deps=sums),) if pieces == 1 else multiply_wait(0, deps=sums)
            barrier.arrive(empty.index(s), count=1)
            i += 1
        scale = None
        if scale_ptr is not None:
            rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, narrow))
            scale = gl.load(scale_ptr + rows // num_tokens, mask=rows < num_rows, other=0.0)
            scale = scale.to(gl.float32)
        halves: gl.constexpr = piece // 64
        place = (row, column, i, j)
        for p in gl.static_range(pieces):
            parts = (accs[p],) if piece == 64 else _halves(accs[p])
            for h in gl.static_range(halves):
                _finish(parts[h], y, bias_ptr, shared, scale, place, p * halves + h, w, c)
        if c.residual:
            i += pieces * halves
        j += pieces * halves
    store_wait(pendings=0)


@gluon.jit(do_not_specialize=["num_rows", "num_tokens"])
def sm90_wide_linear(
    x,
    weight,
    y,
    r,
    bias_ptr,
    scale_ptr,
    num_rows,
    num_tokens,
    c: gl.constexpr,
):
    """Compute y [M, N]; a program each SM.

    x, weight, y and r are tiles of x [M, K], W [N, K] or, transposed, [K, N], y [M, N] and
    r [M, N], or of y without a residual. bias [N] and scale [images] may be None. num_rows is M,
    num_tokens rows are an image; c is a WideShape.
    """
    stages: gl.constexpr = c.stages
    total = (num_rows + 127) // 128 * c.tiles
    xs = gl.allocate_shared_memory(x.dtype, [c.stages * 2, 64, 64], x.layout)
    piece: gl.constexpr = c.piece
    rows: gl.constexpr = 64 if c.transposed else piece
    columns: gl.constexpr = piece if c.transposed else 64
    ws = gl.allocate_shared_memory(x.dtype, [c.stages * c.pieces, rows, columns], weight.layout)
    ys = gl.allocate_shared_memory(x.dtype, [4, 64, 64], y.layout)
    one: gl.constexpr = barrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    empty = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    for s in gl.static_range(stages):
        barrier.init(full.index(s), count=1)
        barrier.init(empty.index(s), count=2)
    fence()
    shared = (xs, ws, ys, full, empty)
    sizes = (num_rows, num_tokens, total)
    gl.warp_specialize(
        [
            (_consume, (y, bias_ptr, scale_ptr, shared, sizes, 0, c)),
            (_consume, (y, bias_ptr, scale_ptr, shared, sizes, 1, c)),
            (_produce, (x, weight, r, xs, ws, full, empty, total, c)),
        ],
        [4, 1],
        [232, 24],
    )

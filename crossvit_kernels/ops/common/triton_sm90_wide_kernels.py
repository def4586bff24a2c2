"""A linear layer for sm_90 of any width: y = r + scale act(x W^T + b), x and W by TMA.

Each SM runs one program of two consumers, groups of four warps, and a producer, one warp. A tile is
up to 256 rows, half of them for each consumer, by up to 256 columns, which are in registers until
all channels are multiplied. Both operands come through one ring in shared memory, 64 channels at a
time. After a tile's channels come stages for its results, 64 columns at a time: residuals, if there
are some, and in their place what TMA then stores. Meanwhile the producer loads the next tile.
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
def _piece(weight, columns: gl.constexpr, c: gl.constexpr):
    """Return room for so many columns of W in all stages."""
    if c.transposed:
        shape: gl.constexpr = (c.stages, 64, columns)
    else:
        shape: gl.constexpr = (c.stages, columns, 64)
    return gl.allocate_shared_memory(weight.dtype, shape, weight.layout)


@gluon.jit
def _box(ws, s, n: gl.constexpr, c: gl.constexpr):
    """Return where the n-th 64 columns of W lie in a stage."""
    boxes: gl.constexpr = c.first_piece // 64
    piece = ws[n // boxes].index(s)
    if boxes == 1 or (n == c.tile_columns // 64 - 1 and c.last_piece == 64):
        return piece
    return piece.slice(n % boxes * 64, 64, dim=1 if c.transposed else 0)


@gluon.jit
def _produce(x, weight, r, xs, ws, full, empty, total, c: gl.constexpr):
    """Load operands and residuals as soon as a stage is free."""
    row_boxes: gl.constexpr = c.rows // 64
    column_boxes: gl.constexpr = c.tile_columns // 64
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block = t // c.tiles
        column = (t - block * c.tiles) * c.tile_columns
        row = block * c.rows
        for k in range(c.steps):
            s = i % c.stages
            barrier.wait(empty.index(s), ((i // c.stages) & 1) ^ 1)
            barrier.expect(full.index(s), 128 * (c.rows + c.tile_columns))
            for w in gl.static_range(row_boxes):
                at = xs.index(s * row_boxes + w)
                load_tile(x, [row + w * 64, k * 64], full.index(s), at)
            for n in gl.static_range(column_boxes):
                at = _box(ws, s, n, c)
                if c.transposed:
                    load_tile(weight, [k * 64, column + n * 64], full.index(s), at)
                else:
                    load_tile(weight, [column + n * 64, k * 64], full.index(s), at)
            i += 1
        for n in range(column_boxes):
            s = i % c.stages
            barrier.wait(empty.index(s), ((i // c.stages) & 1) ^ 1)
            if c.residual:
                barrier.expect(full.index(s), 128 * c.rows)
                for w in gl.static_range(row_boxes):
                    at = xs.index(s * row_boxes + w)
                    load_tile(r, [row + w * 64, column + n * 64], full.index(s), at)
            else:
                barrier.arrive(full.index(s), count=1)
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
def _bias(bias_ptr, column, zero, c: gl.constexpr):
    """Return what sums start from."""
    sums = zero
    if bias_ptr is not None:
        layout: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
        at = column + gl.arange(0, zero.shape[1], layout=layout)
        if c.columns % c.tile_columns == 0:
            bias = gl.load(bias_ptr + at)
        else:
            bias = gl.load(bias_ptr + at, mask=at < c.columns, other=0.0)
        sums = zero + bias.to(gl.float32)[None, :]
    return sums


@gluon.jit
def _finish(acc, y, box, scale, row, column, c: gl.constexpr):
    """Store 64 columns of 64 rows by way of box, in which their residual is."""
    out = acc
    if c.gelu:
        out = gelu(out, y.dtype)
    if scale is not None:
        out = out * scale[:, None]
    if c.residual:
        out += box.load(acc.type.layout).to(gl.float32)
    box.store(out.to(y.dtype))
    fence()
    store_tile(y, [row, column], box)


@gluon.jit
def _consume(y, bias_ptr, scale_ptr, shared, sizes, w: gl.constexpr, c: gl.constexpr):
    """Compute half of the rows of each tile."""
    pieces: gl.constexpr = c.pieces
    halves: gl.constexpr = c.halves
    row_boxes: gl.constexpr = c.rows // 64
    first_piece: gl.constexpr = c.first_piece
    last_piece: gl.constexpr = c.last_piece
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, first_piece, 16])
    last: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, last_piece, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    xs, ws, full, empty = shared
    num_rows, num_tokens, total = sizes
    zeros = ()
    for _ in gl.static_range(halves):
        for p in gl.static_range(pieces):
            if p == pieces - 1:
                zeros = zeros + (gl.zeros((64, last_piece), gl.float32, layout=last),)
            else:
                zeros = zeros + (gl.zeros((64, first_piece), gl.float32, layout=wide),)
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block = t // c.tiles
        column = (t - block * c.tiles) * c.tile_columns
        row = block * c.rows + w * (64 * halves)
        accs = ()
        for h in gl.static_range(halves):
            for p in gl.static_range(pieces):
                at = column + p * first_piece
                accs = accs + (_bias(bias_ptr, at, zeros[h * pieces + p], c),)
        for _step in range(c.steps):
            s = i % c.stages
            barrier.wait(full.index(s), (i // c.stages) & 1)
            sums = ()
            for h in gl.static_range(halves):
                for p in gl.static_range(pieces):
                    box = ws[p].index(s)
                    part = box if c.transposed else box.permute((1, 0))
                    rows = xs.index(s * row_boxes + w * halves + h)
                    acc = accs[h * pieces + p]
                    product = multiply_async(rows, part, acc, use_acc=True, is_async=True)
                    sums = sums + (product,)
            accs = multiply_wait(0, deps=sums)
            barrier.arrive(empty.index(s), count=1)
            i += 1
        scales = ()
        for h in gl.static_range(halves):
            if scale_ptr is not None:
                rows = row + h * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, narrow))
                scale = gl.load(scale_ptr + rows // num_tokens, mask=rows < num_rows, other=0.0)
                scales = scales + (scale.to(gl.float32),)
            else:
                scales = scales + (0.0,)  # not used
        for n in gl.static_range(c.tile_columns // 64):
            s = (i + n) % c.stages
            barrier.wait(full.index(s), ((i + n) // c.stages) & 1)
            for h in gl.static_range(halves):
                acc = accs[h * pieces + n * 64 // first_piece]
                part = acc if acc.shape[1] == 64 else _halves(acc)[n % 2]
                scale = None if scale_ptr is None else scales[h]
                box = xs.index(s * row_boxes + w * halves + h)
                _finish(part, y, box, scale, row + h * 64, column + n * 64, c)
            if n > 0:
                store_wait(pendings=halves)
                barrier.arrive(empty.index((i + n - 1) % c.stages), count=1)
        i += c.tile_columns // 64
        store_wait(pendings=0)
        barrier.arrive(empty.index((i - 1) % c.stages), count=1)


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
    pieces: gl.constexpr = c.pieces
    total = (num_rows + c.rows - 1) // c.rows * c.tiles
    xs = gl.allocate_shared_memory(x.dtype, [c.stages * (c.rows // 64), 64, 64], x.layout)
    ws = ()
    for p in gl.static_range(pieces):
        ws = ws + (_piece(weight, c.last_piece if p == pieces - 1 else c.first_piece, c),)
    one: gl.constexpr = barrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    empty = gl.allocate_shared_memory(gl.int64, [c.stages, 1], one)
    for s in gl.static_range(stages):
        barrier.init(full.index(s), count=1)
        barrier.init(empty.index(s), count=2)
    fence()
    shared = (xs, ws, full, empty)
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

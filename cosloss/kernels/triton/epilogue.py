"""The gradient of a program's rows, in registers, on its way to the embeddings they came from."""

import triton
import triton.language as tl

POWER = tl.constexpr(2.0**100)
PART = tl.constexpr(32)  # columns of a gradient in registers that are taken at once


@triton.jit
def write_whole_grads(part, grad_r, row, common, D, COLUMNS: tl.constexpr):
    """Write the gradient on rows of a part's embeddings, and <r, grad_r> if asked for.

    As `cosloss.kernels.triton.sources` has it, from all columns of grad_r, float32. Registers are
    short here: numbers are in float32, of unit rows, which neither overflow nor vanish, and rows
    are loaded again for each use.
    """
    x, stride, norm, grad_x, along, count, pair, pair_stride, pair_norm, _, _, _ = part
    pulls, scale, learnt_scale, factor = common
    if learnt_scale is not None:
        scale = tl.load(learnt_scale).to(tl.float32)
    inside = row < count
    row = row.to(tl.int64)
    x += row * stride
    near, power = _inverse(norm + row, inside)
    near_pair, power_pair = near, power
    if pair is not None:
        pair += row * pair_stride
        near_pair, power_pair = _inverse(pair_norm + row, inside)
        pull = tl.load(pulls[0] + row, mask=inside, other=0)
        if pulls[1] is not None:
            pull += tl.load(pulls[1] + row, mask=inside, other=0)
        near_pair *= pull.to(tl.float32) * scale
    parts = _columns(grad_r, COLUMNS)
    WIDTH: tl.constexpr = min(COLUMNS, PART)
    inner = tl.zeros(near.shape, tl.float64)
    of_own = tl.zeros(near.shape, tl.float64)
    for k in tl.static_range(COLUMNS // WIDTH):
        u = _unit(x, near, power, k * WIDTH, inside, D, WIDTH)
        h = parts[k]
        if along is not None:
            of_own += tl.sum((h * u).to(tl.float64), 1)
        if pair is not None:
            h += _unit(pair, near_pair, power_pair, k * WIDTH, inside, D, WIDTH)
        inner += tl.sum((h * u).to(tl.float64), 1)
        tl.debug_barrier()
    if along is not None:
        tl.store(along + row, of_own * scale, mask=inside)
    if factor is not None:
        scale *= tl.load(factor).to(tl.float32)
    # in one dimension nothing but rounding is left
    zero = (near == 0) | (D == 1)
    to_x = near * scale
    for k in tl.static_range(COLUMNS // WIDTH):
        h = parts[k] - inner.to(tl.float32)[:, None] * _unit(
            x, near, power, k * WIDTH, inside, D, WIDTH
        )
        if pair is not None:
            h += _unit(pair, near_pair, power_pair, k * WIDTH, inside, D, WIDTH)
        found = tl.where(zero[:, None], 0.0, h * to_x[:, None] * power[:, None])
        column = k * WIDTH + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < D)[None, :]
        tl.store((grad_x + row * D)[:, None] + column[None, :], found, mask=mask)
        tl.debug_barrier()


@triton.jit
def _columns(x, COLUMNS: tl.constexpr):
    """The columns of x in parts of PART, from left to right."""
    parts = (x,)
    for _ in tl.static_range(4):
        if len(parts) * PART < COLUMNS:
            parts = _in_halves(parts)
    return parts


@triton.jit
def _in_halves(parts):
    halves = ()
    for k in tl.static_range(len(parts)):
        halves = halves + _halves(parts[k])
    return halves


@triton.jit
def _halves(x):
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _unit(rows, near, power, start, inside, D, COLUMNS: tl.constexpr):
    """Columns from `start` of rows that begin at these pointers, scaled in float32."""
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    x = tl.load(rows[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    return x * power[:, None] * near[:, None]


@triton.jit
def _inverse(norm, inside):
    """1 / norm as two factors in float32, of which one is a power of 2, mostly 1; 0 of a zero row.

    norm: pointers to numbers of float64.
    """
    length = tl.load(norm, mask=inside, other=0)
    power = tl.where(length > 1e30, 1 / POWER, tl.where(length < 1e-30, POWER, 1.0))
    near = (length * power).to(tl.float32)
    inverse = 1 / near
    inverse = tl.fma(inverse, tl.fma(-near, inverse, 1.0), inverse)  # to its last digit
    return tl.where(near == 0, 0.0, inverse), power.to(tl.float32)

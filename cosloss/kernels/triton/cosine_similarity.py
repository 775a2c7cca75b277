"""Row-wise cosine similarity over the last dimension. Shapes: x1, x2 (..., D); similarity (...).

A program has a few whole rows in registers, or goes over one long row in parts. With the clamped
norms n = max(|x|, eps), m = max(|y|, eps),

    S = <x, y> / (n m),    grad_x = (g / (n m)) y - (g S / n^2) x [|x| > eps].

Most rows take this in float32. The others are done again in float64, where no square of a narrower
dtype over- or underflows: rows whose squares leave float32's range, rows that eps clamps, and rows
with S near +-1, where the formulas cancel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosloss.kernels.triton.layout import launch_rows

PARALLEL = tl.constexpr(0.99)  # up to this |S| float32 loses at most 3 bits of the gradient
NEAR_ONE = tl.constexpr(0.9375)  # up to this S, 1 - S loses at most 4 bits
# products of four norms, and of a gradient with two, stay in float32's range
SMALLEST, LARGEST = tl.constexpr(3.3e-10), tl.constexpr(3.0e9)
SMALLEST_GRAD, LARGEST_GRAD = tl.constexpr(1.1e-19), tl.constexpr(9.2e18)


def forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """<x1, x2> / (max(|x1|, eps) max(|x2|, eps)), in [-1, 1]; of a row with itself, exactly 1."""
    return _forward(x1, x2, eps, distance=False)


def backward(
    grad: Tensor, x1: Tensor, x2: Tensor, eps: float, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients on x1 and x2 from the gradient on the similarity, each only where `needs` asks."""
    grad1 = torch.empty_like(x1) if needs[0] else None
    grad2 = torch.empty_like(x2) if needs[1] else None
    launch_rows(cosine_similarity_bwd_kernel, (x1, x2, grad1, grad2), grad, eps=eps)
    return grad1, grad2


def distance_forward(x1: Tensor, x2: Tensor, eps: float) -> Tensor:
    """1 - similarity, accurate relative to itself where the similarity is near 1."""
    return _forward(x1, x2, eps, distance=True)


def _forward(x1: Tensor, x2: Tensor, eps: float, distance: bool) -> Tensor:
    out = x1.new_empty(x1.shape[:-1])
    launch_rows(cosine_similarity_fwd_kernel, (x1, x2), out, eps=eps, DISTANCE=distance)
    return out


@triton.jit
def cosine_similarity_fwd_kernel(
    x1,
    x2,
    out,
    strides1,
    strides2,
    strides_out,
    rows,
    columns,
    sizes,
    eps: tl.constexpr,
    DISTANCE: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    x = x1 + _row_offsets(row, sizes, strides1), strides1[-1]
    y = x2 + _row_offsets(row, sizes, strides2), strides2[-1]
    out += _row_offsets(row, sizes, strides_out)
    sums = _sums(x, y, inside, columns, tl.float32, ROWS, COLUMNS)
    scale1, clamped1 = _scale(sums[0], eps)
    scale2, clamped2 = _scale(sums[1], eps)
    value = _similarity(sums, scale1, scale2, clamped1 | clamped2)
    direct = _in_range(sums[0], eps) & _in_range(sums[1], eps)
    if DISTANCE:
        direct &= value <= NEAR_ONE
        value = 1 - value
    else:
        direct &= tl.abs(value) <= PARALLEL
    tl.store(out, value, mask=inside & direct)

    again = inside & ~direct
    if tl.max(again.to(tl.int32), 0) > 0:
        wide = _sums(x, y, again, columns, tl.float64, ROWS, NARROW)
        wide1, below1 = _scale(wide[0], eps)
        wide2, below2 = _scale(wide[1], eps)
        if DISTANCE:
            # 1 - <u, v> = (|u - v|^2 + (1 - |u|^2) + (1 - |v|^2)) / 2; the last two are 0 unless
            # clamped
            short1 = tl.where(below1, 1 - wide[0] * wide1 * wide1, 0)
            short2 = tl.where(below2, 1 - wide[1] * wide2 * wide2, 0)
            between = tl.zeros((ROWS, NARROW), tl.float64)
            for start in range(0, columns, NARROW):
                u = _load(x, start, again, columns, tl.float64, NARROW) * wide1[:, None]
                v = _load(y, start, again, columns, tl.float64, NARROW) * wide2[:, None]
                between += (u - v) * (u - v)
            precise = (tl.sum(between, 1) + short1 + short2) / 2
        else:
            precise = _similarity(wide, wide1, wide2, below1 | below2)
            precise = tl.where(precise > 1, 1, tl.where(precise < -1, -1, precise))  # NaN stays
        tl.store(out, precise.to(tl.float32), mask=again)


@triton.jit
def cosine_similarity_bwd_kernel(
    x1,
    x2,
    grad1,
    grad2,
    grad,
    strides1,
    strides2,
    strides_grad1,
    strides_grad2,
    strides_grad,
    rows,
    columns,
    sizes,
    eps: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    x = x1 + _row_offsets(row, sizes, strides1), strides1[-1]
    y = x2 + _row_offsets(row, sizes, strides2), strides2[-1]
    if grad1 is not None:
        grad1 = grad1 + _row_offsets(row, sizes, strides_grad1), strides_grad1[-1]
    if grad2 is not None:
        grad2 = grad2 + _row_offsets(row, sizes, strides_grad2), strides_grad2[-1]
    g = tl.load(grad + _row_offsets(row, sizes, strides_grad), mask=inside, other=0)
    g = g.to(tl.float32)

    if WHOLE:
        part1 = _load(x, 0, inside, columns, tl.float32, COLUMNS)
        part2 = _load(y, 0, inside, columns, tl.float32, COLUMNS)
        sums = tl.sum(part1 * part1, 1), tl.sum(part2 * part2, 1), tl.sum(part1 * part2, 1)
    else:
        sums = _sums(x, y, inside, columns, tl.float32, ROWS, COLUMNS)
    across, along1, along2, similarity = _coefficients(g, sums, eps)
    direct = _in_range(sums[0], eps) & _in_range(sums[1], eps) & (tl.abs(similarity) <= PARALLEL)
    direct &= (g == 0) | ((tl.abs(g) >= SMALLEST_GRAD) & (tl.abs(g) <= LARGEST_GRAD))
    written = inside & direct
    if WHOLE:
        _store(grad1, part2, part1, across, along1, 0, written, columns, COLUMNS)
        _store(grad2, part1, part2, across, along2, 0, written, columns, COLUMNS)
    else:
        for start in range(0, columns, COLUMNS):
            part1 = _load(x, start, written, columns, tl.float32, COLUMNS)
            part2 = _load(y, start, written, columns, tl.float32, COLUMNS)
            _store(grad1, part2, part1, across, along1, start, written, columns, COLUMNS)
            _store(grad2, part1, part2, across, along2, start, written, columns, COLUMNS)

    again = inside & ~direct
    if tl.max(again.to(tl.int32), 0) > 0:
        wide = _sums(x, y, again, columns, tl.float64, ROWS, NARROW)
        a, b1, b2, _ = _coefficients(g.to(tl.float64), wide, eps)
        for start in range(0, columns, NARROW):
            wide_x = _load(x, start, again, columns, tl.float64, NARROW)
            wide_y = _load(y, start, again, columns, tl.float64, NARROW)
            _store(grad1, wide_y, wide_x, a, b1, start, again, columns, NARROW)
            _store(grad2, wide_x, wide_y, a, b2, start, again, columns, NARROW)


@triton.jit
def _row_offsets(row, sizes, strides):
    """The offsets of rows: see `layout`."""
    outer = row // sizes[2]
    offset = (row % sizes[2]) * strides[2]
    return offset + (outer % sizes[1]) * strides[1] + (outer // sizes[1]) * strides[0]


@triton.jit
def _sums(x, y, mask, columns, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """<x, x>, <y, y> and <x, y> of the rows."""
    square1 = tl.zeros((ROWS, COLUMNS), DTYPE)
    square2 = tl.zeros((ROWS, COLUMNS), DTYPE)
    product = tl.zeros((ROWS, COLUMNS), DTYPE)
    for start in range(0, columns, COLUMNS):
        part1 = _load(x, start, mask, columns, DTYPE, COLUMNS)
        part2 = _load(y, start, mask, columns, DTYPE, COLUMNS)
        square1 += part1 * part1
        square2 += part2 * part2
        product += part1 * part2
    return tl.sum(square1, 1), tl.sum(square2, 1), tl.sum(product, 1)


@triton.jit
def _scale(square, eps: tl.constexpr):
    """1 / max(|x|, eps), and 0 for a zero row, from |x|^2; and whether eps clamps the row."""
    norm = _sqrt(square)
    clamped = norm <= eps
    scale = tl.where(clamped, 1 / (eps or 1.0), _divide(1.0, norm))
    return tl.where(square == 0, 0, scale), clamped


@triton.jit
def _similarity(sums, scale1, scale2, clamped):
    # the quotient of a row with itself is exactly 1
    whole = _divide(sums[2], _sqrt(sums[0] * sums[1]))
    return tl.where(clamped, sums[2] * scale1 * scale2, whole)


@triton.jit
def _coefficients(g, sums, eps: tl.constexpr):
    """g / (n m), g S / n^2 and g S / m^2, the last two 0 where clamped; and S."""
    scale1, clamped1 = _scale(sums[0], eps)
    scale2, clamped2 = _scale(sums[1], eps)
    similarity = sums[2] * scale1 * scale2
    along1 = tl.where(clamped1, 0, g * similarity * scale1 * scale1)
    along2 = tl.where(clamped2, 0, g * similarity * scale2 * scale2)
    return g * scale1 * scale2, along1, along2, similarity


@triton.jit
def _in_range(square, eps: tl.constexpr):
    norm = tl.sqrt(square)  # a NaN is not in range
    return (norm >= SMALLEST) & (norm > 1.00001 * eps) & (norm <= LARGEST)


@triton.jit
def _load(rows, start, mask, columns, DTYPE: tl.constexpr, COLUMNS: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)
    pointers = rows[0][:, None] + column.to(tl.int64)[None, :] * rows[1]
    inside = mask[:, None] & (column < columns)[None, :]
    return tl.load(pointers, mask=inside, other=0).to(DTYPE)


@triton.jit
def _store(grad, other, own, across, along, start, mask, columns, COLUMNS: tl.constexpr):
    """A part of grad = across other - along own, if that gradient is asked for."""
    if grad is not None:
        column = start + tl.arange(0, COLUMNS)
        pointers = grad[0][:, None] + column.to(tl.int64)[None, :] * grad[1]
        value = across[:, None] * other - along[:, None] * own
        inside = mask[:, None] & (column < columns)[None, :]
        tl.store(pointers, value.to(tl.float32), mask=inside)


@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _divide(a, b):
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)

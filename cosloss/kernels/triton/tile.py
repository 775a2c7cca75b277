"""A tile of the logit matrix in registers: its logits, and f and f' of them.

KIND is the criterion's statistic, as in `cosloss.criteria`; f is exp for "exp".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosloss.modes import multiplies_tf32
from cosloss.problem import Mask

EMPTY = tl.constexpr(-8.5e37)  # a finite stand-in for log 0, far below any logit
LOG2_E = tl.constexpr(1.4426950408889634)


def diagonals_of(mask: Mask) -> tuple[int, int, int]:
    """The diagonals as a kernel takes them, which is told how many there are: three at most."""
    first, second, third = (*sorted(mask.diagonals), 0, 0, 0)[:3]
    return first, second, third


def ids_of(mask: Mask) -> tuple[Tensor | None, ...]:
    """The ids as a kernel takes them: one after the other in memory."""
    return tuple(ids if ids is None else ids.contiguous() for ids in mask.ids)


def limits_of(mask: Mask) -> tuple[Tensor | None, ...]:
    """The limits as a kernel takes them: float32, one after the other in memory."""
    limits = mask.row_limits, mask.column_limits
    return tuple(x if x is None else x.float().contiguous() for x in limits)


def precision(dtype: torch.dtype) -> str:
    """How the tensor cores multiply float32: three TF32 products, unless torch allows one.

    The split keeps 22 of the 24 bits of each factor. AMD's matrix cores multiply float32 as it is,
    and a narrower dtype is always multiplied as it is.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if multiplies_tf32() else "tf32x3"


def launch(kernel: Any, grid: Any, like: Tensor, *arguments: Any, **named: Any) -> None:
    """Run a kernel on the device of `like`."""
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **named)


@triton.jit
def load_rows(
    x, row, rows, start, columns, BLOCK_D: tl.constexpr, INSIDE: tl.constexpr, EVEN: tl.constexpr
):
    """Rows of a contiguous matrix (rows, columns), BLOCK_D columns from `start`; 0 outside.

    INSIDE: whether all of these rows are there. EVEN: whether all of these columns are.
    """
    column = start + tl.arange(0, BLOCK_D)
    pointers = x + row.to(tl.int64)[:, None] * columns + column[None, :]
    if INSIDE and EVEN:
        result = tl.load(pointers)
    elif INSIDE:
        result = tl.load(pointers, mask=(column < columns)[None, :], other=0)
    elif EVEN:
        result = tl.load(pointers, mask=(row < rows)[:, None], other=0)
    else:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        result = tl.load(pointers, mask=inside, other=0)
    return result


@triton.jit
def products(
    r,
    c,
    row,
    column,
    rows,
    columns,
    D,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS_INSIDE: tl.constexpr,
    COLUMNS_INSIDE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """r[row] c[column]^T, in parts along D."""
    x = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        a = load_rows(r, row, rows, start, D, BLOCK_D, ROWS_INSIDE, EVEN)
        b = load_rows(c, column, columns, start, D, BLOCK_D, COLUMNS_INSIDE, EVEN)
        x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
    return x


@triton.jit
def with_mask(
    x,
    row,
    column,
    rows,
    columns,
    ids,
    limits,
    diagonals,
    DIAGONALS: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """The logits, -inf at masked pairs and outside of the matrix.

    INSIDE: whether the tile is one that no diagonal crosses and that the matrix fills.
    """
    if limits[0] is not None:
        x = tl.where(x > _numbers(limits[0], row, rows)[:, None], float("-inf"), x)
    if limits[1] is not None:
        x = tl.where(x > _numbers(limits[1], column, columns)[None, :], float("-inf"), x)
    if ids[0] is not None:
        masked = same_ids((ids[0], ids[1]), row, column, rows, columns)
        if ids[2] is not None:
            masked &= ~same_ids((ids[2], ids[3]), row, column, rows, columns)
        x = tl.where(masked, float("-inf"), x)
    if not INSIDE:
        outside = (row >= rows)[:, None] | (column >= columns)[None, :]
        for k in tl.static_range(DIAGONALS):
            outside |= column[None, :] - row[:, None] == diagonals[k]
        x = tl.where(outside, float("-inf"), x)
    return x


@triton.jit
def same_ids(ids, row, column, rows, columns):
    """Whether the row's id is the column's; ids: pointers to those of the rows and the columns."""
    return _numbers(ids[0], row, rows)[:, None] == _numbers(ids[1], column, columns)[None, :]


@triton.jit
def _numbers(pointer, index, count):
    return tl.load(pointer + index, mask=index < count, other=0)


@triton.jit
def exponential(x):
    """exp of float32 numbers; a result below the normal ones is 0."""
    return tl.exp2(x * LOG2_E)  # two instructions, where tl.exp takes four for the others


@triton.jit
def exponentials(x, POLYNOMIAL: tl.constexpr):
    """exp of a tile, of one column in POLYNOMIAL by a polynomial, unless that is 0.

    A multiprocessor has few special units beside its others, 16 and 128 on an H100, and they bind
    where logits are products of few numbers. Columns go by eights, so that each register of a
    thread is of one kind.
    """
    result = exponential(x)
    if POLYNOMIAL:
        chosen = (tl.arange(0, x.shape[1]) // 8) % POLYNOMIAL == 0
        result = tl.where(chosen[None, :], _exponential_by_polynomial(x), result)
    return result


@triton.jit
def _exponential_by_polynomial(x):
    """exp as exact as the special units'; a result below the normal ones is, and 0 from 2^-127 on.

    2^(n + f) of an integer n, which the last bits of its sum with 1.5 x 2^23 have, and |f| <= 1/2,
    of which 1 and the minimax polynomial of 2^f are within 1e-7.
    """
    x = tl.maximum(x * LOG2_E, -127.0, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + 12582912.0
    f = x - (shifted - 12582912.0)
    power = 0.001326472734
    power = power * f + 0.009671512859
    power = power * f + 0.05550733745
    power = power * f + 0.2402224208
    power = power * f + 0.6931469776
    power = power * f + 1.0
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def value(x, margin, KIND: tl.constexpr, POLYNOMIAL: tl.constexpr = 0):
    """f of a logit; 0 at -inf. POLYNOMIAL: see `exponentials`."""
    if KIND == "exp":
        result = exponentials(x, POLYNOMIAL)
    elif KIND == "softplus":
        # log(1 + e) = 2 artanh(e / (2 + e)); a logarithm near 1 would lose small e
        e = exponential(-tl.abs(x))
        s = e / (2 + e)
        q = s * s
        series = 1.0 / 15 + q / 17
        for k in tl.static_range(7):
            series = series * q + 1.0 / (13 - 2 * k)
        result = tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL) + 2 * s * series
    else:
        tl.static_assert(KIND == "hinge")
        result = tl.maximum(x - margin, 0, propagate_nan=tl.PropagateNan.ALL)
    return result


@triton.jit
def slope(x, margin, KIND: tl.constexpr):
    """f' of a logit; 0 at -inf."""
    if KIND == "exp":
        result = exponential(x)
    elif KIND == "softplus":
        result = 1 / (1 + exponential(-x))
    else:
        tl.static_assert(KIND == "hinge")
        result = tl.where(x > margin, 1.0, 0.0)
    return result

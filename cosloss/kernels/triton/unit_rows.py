"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: x (N, D), of a first view or of two; r (N, D) or (2N, D), first view first. A row's norm is
in float64, whose squares neither overflow nor vanish for any narrower number; a zero row's is 0,
and so are its r and its gradient.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosloss.kernels.triton.tile import launch

BLOCK = 2048  # elements of a program's block of each tensor: 8 for each of its threads
WARPS = 8


def forward(
    views: Sequence[Tensor], scale: float | Tensor = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """r = scale x / |x| of the views' rows, their norms, and of two views <r_i, r_pair(i)>.

    dtype: r's, to which it is rounded; None for float32. The products are of the unrounded r.
    """
    n, d = views[0].shape
    r = views[0].new_empty(len(views) * n, d, dtype=dtype or torch.float32)
    norm = r.new_empty(r.shape[0], dtype=torch.float64)
    products = norm.new_empty(r.shape[0], dtype=torch.float32) if len(views) == 2 else None
    _launch(unit_rows_fwd_kernel, views, r, norm, products, *_scale(scale, r))
    return r, norm, products


def backward(
    grads: Sequence[Tensor | None],
    grad_products: Tensor | None,
    views: Sequence[Tensor],
    norm: Tensor,
    needs: Sequence[bool],
    scale: float | Tensor = 1.0,
    factor: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients on the views, where needed, from those on their rows of r and on the products.

    grads: one for each view, of any dtype.
    factor: of all of them, 0-d.
    """
    first, second = (*(None if grad is None else grad.contiguous() for grad in grads), None)[:2]
    grad_products = None if grad_products is None else grad_products.contiguous()
    found = [x.new_empty(x.shape) if need else None for x, need in zip(views, needs, strict=True)]
    on_views = (*found, None)[:2]
    given = first, second, grad_products, norm
    _launch(unit_rows_bwd_kernel, views, *given, *on_views, *_scale(scale, norm), factor)
    return found


def _scale(scale: float | Tensor, rows: Tensor) -> tuple[float, Tensor | None]:
    """A number as a kernel takes it: from the host, or where it lies on the rows' device."""
    if isinstance(scale, Tensor) and scale.device == rows.device:
        return 1.0, scale
    return float(scale), None


def _launch(kernel: object, views: Sequence[Tensor], *arguments: object) -> None:
    n, d = views[0].shape
    views = [x if x.stride(1) == 1 else x.contiguous() for x in views]
    first, second = (*((x, x.stride(0)) for x in views), (None, 0))[:2]
    columns = min(triton.next_power_of_2(d), BLOCK)
    rows = min(BLOCK // columns, triton.next_power_of_2(n))
    constants = {"ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}
    launch(
        kernel, (triton.cdiv(n, rows),), views[0], *first, *second, *arguments, n, d, **constants
    )


@triton.jit
def unit_rows_fwd_kernel(
    x1,
    stride1,
    x2,
    stride2,
    r,
    norm,
    products,
    scale,
    learnt_scale,
    n,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if learnt_scale is not None:
        scale = tl.load(learnt_scale)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    x1 += row * stride1
    factor1 = _normalise(x1, r + row * D, norm + row, inside, scale, D, ROWS, COLUMNS)
    if x2 is not None:
        x2 += row * stride2
        second = n + row
        factor2 = _normalise(x2, r + second * D, norm + second, inside, scale, D, ROWS, COLUMNS)
        product = tl.zeros((ROWS,), tl.float64)
        for start in range(0, D, COLUMNS):
            x = _load(x1, start, inside, D, COLUMNS)
            product += tl.sum(x * _load(x2, start, inside, D, COLUMNS), 1)
        product *= factor1 * factor2
        tl.store(products + row, product.to(tl.float32), mask=inside)
        tl.store(products + second, product.to(tl.float32), mask=inside)


@triton.jit
def unit_rows_bwd_kernel(
    x1,
    stride1,
    x2,
    stride2,
    grad_r1,
    grad_r2,
    grad_products,
    norm,
    grad_x1,
    grad_x2,
    scale,
    learnt_scale,
    factor,
    n,
    D,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if learnt_scale is not None:
        scale = tl.load(learnt_scale)
    all_of = 1.0
    if factor is not None:
        all_of = tl.load(factor).to(tl.float64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    x1 += row * stride1
    norm1 = tl.load(norm + row, mask=inside, other=0)
    factor1 = _factor(norm1, scale)
    pull1 = None
    if x2 is not None:
        x2 += row * stride2
        norm2 = tl.load(norm + n + row, mask=inside, other=0)
        factor2 = _factor(norm2, scale)
        pull2 = None
        if grad_products is not None:
            pull = tl.load(grad_products + row, mask=inside, other=0).to(tl.float64)
            pull += tl.load(grad_products + n + row, mask=inside, other=0)
            pull1, pull2 = pull * factor2, pull * factor1
        if grad_x2 is not None:
            if grad_r2 is not None:
                grad_r2 += row * D
            to = grad_x2 + row * D
            _through(grad_r2, pull2, x1, x2, norm2, inside, to, scale, all_of, D, COLUMNS)
    if grad_x1 is not None:
        if grad_r1 is not None:
            grad_r1 += row * D
        to = grad_x1 + row * D
        _through(grad_r1, pull1, x2, x1, norm1, inside, to, scale, all_of, D, COLUMNS)


@triton.jit
def _normalise(x, r, norm, inside, scale, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write rows of r and their norms from rows of x; all are pointers to where rows begin."""
    square = tl.zeros((ROWS,), tl.float64)
    for start in range(0, D, COLUMNS):
        part = _load(x, start, inside, D, COLUMNS)
        square += tl.sum(part * part, 1)
    length = tl.sqrt(square)
    tl.store(norm, length, mask=inside)
    factor = _factor(length, scale)
    for start in range(0, D, COLUMNS):
        part = _load(x, start, inside, D, COLUMNS)
        _store(r, start, part * factor[:, None], inside, D, COLUMNS)
    return factor


@triton.jit
def _factor(norm, scale):
    """The factor from a row of x to its row of r."""
    return tl.where(norm == 0, 0.0, scale / norm)


@triton.jit
def _through(grad_r, pull, pair, x, norm, inside, grad_x, scale, all_of, D, COLUMNS: tl.constexpr):
    """Write the gradient on rows of x; all are pointers to where rows begin.

    (h - <h, x> x / <x, x>) all_of scale / norm, with h = grad_r + pull pair the gradient on r.
    """
    zero = norm == 0
    along, square = tl.zeros_like(norm), tl.zeros_like(norm)
    for start in range(0, D, COLUMNS):
        own = _load(x, start, inside, D, COLUMNS)
        h = _gradient(grad_r, pull, pair, own, start, inside, D, COLUMNS)
        along += tl.sum(h * own, 1)
        square += tl.sum(own * own, 1)
    along = tl.where(zero, 0.0, along / square)
    # in one dimension nothing but rounding is left
    factor = tl.where(D == 1, 0.0, _factor(norm, scale) * all_of)
    for start in range(0, D, COLUMNS):
        own = _load(x, start, inside, D, COLUMNS)
        h = _gradient(grad_r, pull, pair, own, start, inside, D, COLUMNS)
        found = (h - along[:, None] * own) * factor[:, None]
        _store(grad_x, start, tl.where(zero[:, None], 0.0, found), inside, D, COLUMNS)


@triton.jit
def _gradient(grad_r, pull, pair, own, start, inside, D, COLUMNS: tl.constexpr):
    h = tl.zeros_like(own)
    if grad_r is not None:
        h += _load(grad_r, start, inside, D, COLUMNS)
    if pull is not None:
        h += pull[:, None] * _load(pair, start, inside, D, COLUMNS)
    return h


@triton.jit
def _load(rows, start, inside, D, COLUMNS: tl.constexpr):
    """COLUMNS columns from `start` of the rows that begin at these pointers, in float64."""
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    values = tl.load(rows[:, None] + column[None, :], mask=mask, other=0)
    return values.to(tl.float32).to(tl.float64)


@triton.jit
def _store(rows, start, values, inside, D, COLUMNS: tl.constexpr):
    column = start + tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < D)[None, :]
    tl.store(rows[:, None] + column[None, :], values.to(tl.float32), mask=mask)

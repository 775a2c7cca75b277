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

from cosloss.kernels.inputs import Inputs, Source
from cosloss.kernels.triton.row_parts import (
    BLOCK,
    WARPS,
    along_rows,
    inverse_of,
    load_part,
    scale_of,
    store_part,
)
from cosloss.kernels.triton.sources import reach
from cosloss.kernels.triton.tile import launch


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
    _launch_forward(views, r, norm, products, *scale_of(scale, r))
    return r, norm, products


def backward(
    grads: Sequence[Tensor | None],
    grad_products: Tensor | None,
    views: Sequence[Tensor],
    norm: Tensor,
    needs: Sequence[bool],
    scale: float | Tensor = 1.0,
) -> list[Tensor | None]:
    """The gradients on the views, where needed, from those on their rows of r and on the products.

    grads: one for each view, of any dtype.
    """
    n = views[0].shape[0]
    norms = norm.split(n)
    sources = [Source(x, own, need) for x, own, need in zip(views, norms, needs, strict=True)]
    pulls: Sequence[Tensor] = ()
    if grad_products is not None:
        pulls = grad_products.split(n)
        pairs = zip(views[::-1], norms[::-1], strict=True)
        sources = [
            own._replace(pair=x, pair_norm=norm)
            for own, (x, norm) in zip(sources, pairs, strict=True)
        ]
    parts = [None if grad is None else grad[None] for grad in grads]
    inputs = Inputs(sources, (), (), scale, pulls, None, along=False, bias=False)
    return reach(parts, sources, inputs)[0]


def _launch_forward(views: Sequence[Tensor], *arguments: object) -> None:
    n, d = views[0].shape
    views = [along_rows(x) for x in views]
    first, second = (*((x, x.stride(0)) for x in views), (None, 0))[:2]
    columns = min(triton.next_power_of_2(d), BLOCK)
    rows = min(BLOCK // columns, triton.next_power_of_2(n))
    constants = {"ROWS": rows, "COLUMNS": columns, "num_warps": WARPS}
    grid = (triton.cdiv(n, rows),)
    launch(unit_rows_fwd_kernel, grid, views[0], *first, *second, *arguments, n, d, **constants)


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
            x = load_part(x1, start, inside, D, COLUMNS)
            product += tl.sum(x * load_part(x2, start, inside, D, COLUMNS), 1)
        product *= factor1 * factor2
        tl.store(products + row, product.to(tl.float32), mask=inside)
        tl.store(products + second, product.to(tl.float32), mask=inside)


@triton.jit
def _normalise(x, r, norm, inside, scale, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write rows of r and their norms from rows of x; all are pointers to where rows begin."""
    square = tl.zeros((ROWS,), tl.float64)
    for start in range(0, D, COLUMNS):
        part = load_part(x, start, inside, D, COLUMNS)
        square += tl.sum(part * part, 1)
    length = tl.sqrt(square)
    tl.store(norm, length, mask=inside)
    factor = inverse_of(length, scale)
    for start in range(0, D, COLUMNS):
        part = load_part(x, start, inside, D, COLUMNS)
        store_part(r, start, part * factor[:, None], inside, D, COLUMNS)
    return factor

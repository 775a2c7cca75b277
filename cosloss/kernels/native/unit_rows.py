"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: x (N, D), of a first view or of two; r (N, D) or (2N, D), first view first. A row's norm is
max(|x|, eps) in float64; a zero row's is 0, and so are its r and its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosloss.kernels.native.library import function


def forward(
    views: Sequence[Tensor], eps: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """r = scale x / norm of the views' rows, their norms, and <r_i, r_pair(i)> of two views' rows.

    None if the squares of float64 rows leave float64's range, or are not numbers.
    """
    n, d = views[0].shape
    r = views[0].new_empty(len(views) * n, d)
    norm = r.new_empty(r.shape[0], dtype=torch.float64)
    products = r.new_empty(r.shape[0]) if len(views) == 2 else None
    views = [x if x.stride(1) == 1 else x.contiguous() for x in views]
    where = [(x.data_ptr(), x.stride(0)) for x in views]
    first, second = where if len(where) == 2 else (where[0], (None, 0))
    in_range = function("unit_rows_forward", r.dtype)(
        *(*first, *second, n, d, eps, scale), *(_at(r), _at(norm), _at(products))
    )
    return (r, norm, products) if in_range else None


def backward(
    grad_r: Tensor | None,
    grad_products: Tensor | None,
    r: Tensor,
    norm: Tensor,
    needs: Sequence[bool],
    eps: float = 0.0,
    scale: float = 1.0,
) -> list[Tensor | None]:
    """The gradient on each view, where needed, from those on r and on the pairs' products."""
    n, d = r.shape[0] // len(needs), r.shape[1]
    grad_r = None if grad_r is None else grad_r.contiguous()
    grad_products = None if grad_products is None else grad_products.contiguous()
    found = [r.new_empty(n, d) if need else None for need in needs]
    first, second = (*found, None)[:2]
    function("unit_rows_backward", r.dtype)(
        *(_at(grad_r), _at(grad_products), _at(r), _at(norm)),
        *(n, d, eps, scale, _at(first), _at(second)),
    )
    return found


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

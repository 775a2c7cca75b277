"""Rows scaled to one length, the inner products of paired rows, and the gradient through both.

Shapes: x (N, D), of a first view or of two; r (N, D) or (2N, D), first view first. A row's norm is
max(|x|, eps) in float64; a zero row's is 0, and so are its r and its gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cosloss.kernels.native.library import function


def forward(
    views: Sequence[Tensor],
    eps: float = 0.0,
    scale: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """r = scale x / norm of the views' rows, their norms, and <r_i, r_pair(i)> of two views' rows.

    dtype: r's, to which it is rounded; None for the views', widened.

    None if the squares of float64 rows leave float64's range, or are not numbers.
    """
    views, (n, d) = _adjacent(views), views[0].shape
    r = views[0].new_empty(len(views) * n, d)
    norm = r.new_empty(r.shape[0], dtype=torch.float64)
    products = r.new_empty(r.shape[0]) if len(views) == 2 else None
    in_range = function("unit_rows_forward", r.dtype)(
        *(*_where(views), n, d, eps, float(scale)), *(_at(r), _at(norm), _at(products))
    )
    return (r if dtype is None else r.to(dtype), norm, products) if in_range else None


def backward(
    grads: Sequence[Tensor | None],
    grad_products: Tensor | None,
    views: Sequence[Tensor],
    norm: Tensor,
    needs: Sequence[bool],
    eps: float = 0.0,
    scale: float | Tensor = 1.0,
) -> list[Tensor | None]:
    """The gradients on the views, where needed, from those on their rows of r and on the products.

    grads: one for each view, in its dtype, widened.
    """
    views, (n, d) = _adjacent(views), views[0].shape
    grads = [None if grad is None else grad.contiguous() for grad in grads]
    grad_products = None if grad_products is None else grad_products.contiguous()
    found = [x.new_empty(n, d) if need else None for x, need in zip(views, needs, strict=True)]
    first, second = (*map(_at, grads), None)[:2]
    function("unit_rows_backward", views[0].dtype)(
        *(first, second, _at(grad_products), *_where(views), _at(norm)),
        *(n, d, eps, float(scale), *(*map(_at, found), None)[:2]),
    )
    return found


def _adjacent(views: Sequence[Tensor]) -> list[Tensor]:
    """The views in at least float32, the numbers of a row one after the other."""
    wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in views)
    return [x if x.stride(1) == 1 else x.contiguous() for x in wide]


def _where(views: Sequence[Tensor]) -> tuple[int | None, ...]:
    """The address and the row stride of a first and a second view, null and 0 without one."""
    first, second = (*((x.data_ptr(), x.stride(0)) for x in views), (None, 0))[:2]
    return *first, *second


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

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
) -> tuple[Tensor, Tensor] | None:
    """r = scale x / norm of the views' rows, and their norms.

    None if the squares of float64 rows leave float64's range, or are not numbers.
    """
    n, d = views[0].shape
    r = views[0].new_empty(len(views) * n, d)
    norm = r.new_empty(r.shape[0], dtype=torch.float64)
    kernel = function("unit_rows_forward", r.dtype)
    in_range = True
    for view, x in enumerate(views):
        x = x if x.stride(1) == 1 else x.contiguous()
        to = _row(r, view * n), _row(norm, view * n)
        in_range &= bool(kernel(x.data_ptr(), x.stride(0), n, d, eps, scale, *to))
    return (r, norm) if in_range else None


def products(r: Tensor) -> Tensor:
    """<r_i, r_i+N> of both views' rows, once for each of the 2N."""
    n = r.shape[0] // 2
    found = r.new_empty(2 * n)
    function("paired_products", r.dtype)(r.data_ptr(), n, r.shape[1], found.data_ptr())
    return found


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
    for view, grad_x in enumerate(found):
        if grad_x is not None:
            function("unit_rows_backward", r.dtype)(
                None if grad_r is None else grad_r.data_ptr(),
                None if grad_products is None else grad_products.data_ptr(),
                r.data_ptr(),
                norm.data_ptr(),
                r.shape[0] // 2,
                view * n,
                n,
                d,
                eps,
                scale,
                grad_x.data_ptr(),
            )
    return found


def _row(x: Tensor, index: int) -> int:
    return x.data_ptr() + index * x.stride(0) * x.element_size()
